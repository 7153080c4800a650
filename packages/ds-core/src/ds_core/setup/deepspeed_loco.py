"""The `zeropp_loco_param` section of a DeepSpeed file, as arguments of ds_comm's LoCo (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_core.setup.config import nearest
from ds_core.setup.readers import Reader, as_mapping, as_number, whole


def _beta(value: Any) -> float:
    beta = float(as_number(value))
    if not 0 <= beta < 1:
        raise ValueError(f"given {value!r}; allowed: from 0 to below 1")
    return beta


# key of a zeropp_loco_param section -> (how it is read, the argument of ds_comm's LoCo)
_LOCO: Mapping[str, tuple[Reader, str]] = {
    "err_beta": (_beta, "beta"),
    "reset_T": (whole(1), "reset_steps"),
}


def as_loco(value: Any) -> dict[str, Any] | None:
    """A zeropp_loco_param section, every value read. Raises ValueError for an unknown key or value."""
    if value is None:
        return None
    found = {}
    for name, given in as_mapping(value).items():
        if name not in _LOCO:
            raise ValueError(f"given {name!r}; {nearest(name, _LOCO)}")
        try:
            found[name] = _LOCO[name][0](given)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found


def arguments_of(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section that was read, by LoCo's names."""
    return {_LOCO[name][1]: value for name, value in section.items()}
