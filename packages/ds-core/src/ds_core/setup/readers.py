"""Readers of single config values: strict about meaning, lenient about spelling ("8", 5e8, "bf16")."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Reader = Callable[[Any], Any]

DTYPES: Mapping[str, str] = {
    "fp32": "float32",
    "float": "float32",
    "float32": "float32",
    "torch.float32": "float32",
    "fp16": "float16",
    "half": "float16",
    "float16": "float16",
    "torch.float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "torch.bfloat16": "bfloat16",
}


def as_bool(value: Any) -> bool:
    """true or false; "true" and "false" from a command line too."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError(f"given {value!r}; allowed: true, false")


def as_number(value: Any) -> float:
    """A finite number; "1e-3" counts, true does not."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"given {value!r}; allowed: a finite number")
    return number


def whole(low: int = 0) -> Reader:
    """A reader of whole numbers from `low` up; 8, "8", 5e8 and "5e8" all count."""

    def read(value: Any) -> int:
        try:
            number = as_number(value)
        except ValueError:
            number = math.nan
        if number != number or number < low or number != int(number):
            raise ValueError(f"given {value!r}; allowed: a whole number, at least {low}")
        return int(value) if isinstance(value, int) else int(number)

    return read


def as_stage(value: Any) -> int:
    """0 replicates; 1 shards optimizer state, 2 gradients too, 3 parameters too."""
    if not isinstance(value, bool) and str(value) in ("0", "1", "2", "3"):
        return int(value)
    raise ValueError(f"given {value!r}; allowed: 0, 1, 2, 3")


def at_least(low: float) -> Reader:
    """A reader of numbers from `low` up."""

    def read(value: Any) -> float:
        number = as_number(value)
        if number < low:
            raise ValueError(f"given {value!r}; allowed: a number, at least {low:g}")
        return number

    return read


def share(value: Any) -> float:
    """A fraction from 0 to 1."""
    number = as_number(value)
    if not 0 <= number <= 1:
        raise ValueError(f"given {value!r}; allowed: a number from 0 to 1")
    return number


def one_of(*names: str) -> Reader:
    """A reader of one of the names, in any case."""

    def read(value: Any) -> str:
        for name in names:
            if isinstance(value, str) and value.lower() == name.lower():
                return name
        raise ValueError(f"given {value!r}; allowed: {', '.join(names)}")

    return read


def or_null(reader: Reader) -> Reader:
    """The same reader, letting null pass."""
    return lambda value: None if value is None else reader(value)


def as_dtype(value: Any) -> str:
    """The torch name of a dtype that goes by several: "bf16" is "bfloat16"."""
    if str(value) in DTYPES:
        return DTYPES[str(value)]
    raise ValueError(f"given {value!r}; allowed: fp32, fp16, bf16")


def as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"given {value!r}; allowed: a string")


def as_mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise ValueError(f"given {value!r}; allowed: a section {{...}}")


def as_names(value: Any) -> list[str]:
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return list(value)
    raise ValueError(f"given {value!r}; allowed: a list of strings")


# DeepSpeed's names of collectives -> the five that travel here
_COMM_OPS: Mapping[str, str] = {
    old: new
    for new, names in {
        "all_gather": "all_gather all_gather_base all_gather_into_tensor all_gather_coalesced allgather_fn",
        "reduce_scatter": "reduce_scatter reduce_scatter_base reduce_scatter_tensor reduce_scatter_fn",
        "all_reduce": "all_reduce all_reduce_coalesced inference_all_reduce",
        "all_to_all": "all_to_all all_to_all_single",
        "broadcast": "broadcast",
    }.items()
    for old in names.split()
}


def comm_ops(value: Any) -> list[str]:
    """A list of collectives under DeepSpeed's names, by ours."""
    names = as_names(value)
    for name in names:
        if name not in _COMM_OPS:
            raise ValueError(f"given {name!r}; allowed: {', '.join(_COMM_OPS)}")
    return [_COMM_OPS[name] for name in names]


def anything(value: Any) -> Any:
    """For keys whose value is not looked at, only refused or without effect."""
    return value
