"""The `zenflow` section of a DeepSpeed file, read strictly, as the fields of ds_offload's ZenFlow (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_core.setup.config import nearest
from ds_core.setup.readers import Reader, as_bool, as_mapping, one_of, share, whole

_NO_EFFECT = {
    "select_strategy": "columns are chosen every select_interval steps",
    "offload": "the states of the chosen columns stay beside them",
    "pt_reserved_cores_perc": "updates run on threads of this process; bind cores with `ds launch`",
}


def _interval(value: Any) -> Any:
    return value if value == "auto" else whole(1)(value)


# key of a zenflow section -> (how it is read, the field of ds_offload's ZenFlow; None: no effect)
_ZENFLOW: Mapping[str, tuple[Reader, str | None]] = {
    "topk_ratio": (share, "topk_ratio"),
    "select_strategy": (one_of("auto", "step"), None),
    "select_interval": (_interval, "select_interval"),
    "update_interval": (_interval, "update_interval"),
    "overlap_step": (as_bool, "overlap"),
    "auto_ratio": (share, "auto_ratio"),
    "full_warm_up_rounds": (whole(0), "warmup"),
    "offload": (as_bool, None),
    "pt_reserved_cores_perc": (share, None),
}


def as_zenflow(value: Any) -> dict[str, Any] | None:
    """A zenflow section, every value read. Raises ValueError for an unknown key or value."""
    if value is None:
        return None
    found = {}
    for name, given in as_mapping(value).items():
        if name not in _ZENFLOW:
            raise ValueError(f"given {name!r}; {nearest(name, _ZENFLOW)}")
        try:
            found[name] = _ZENFLOW[name][0](given)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found


def fields_of(section: Mapping[str, Any]) -> dict[str, Any]:
    """What of a section acts, by ds_offload's names."""
    return {field: section[name] for name, (_, field) in _ZENFLOW.items() if field and name in section}


def without_effect(section: Mapping[str, Any]) -> dict[str, str]:
    """What of a section does nothing here, and why."""
    return {name: why for name, why in _NO_EFFECT.items() if name in section}
