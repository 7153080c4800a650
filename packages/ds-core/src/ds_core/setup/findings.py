"""Each key of a config looked up in the table of DeepSpeed's keys: values read, refusals noted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_core.ground.settings import Origin, Setting
from ds_core.setup.config import ConfigError, Layer, Problem, nearest
from ds_core.setup.deepspeed_keys import ALIASES, GATES, IDLE, ROWS, SECTIONS, Row

DEFAULT = Origin("default")


@dataclass
class Findings:
    """What the walk over the tree collects."""

    origins: Mapping[str, Origin]
    auto: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    rows: list[Setting] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def origin(self, key: str) -> Origin:
        """Of a key, or of the section that was written as a whole."""
        for name, origin in self.origins.items():
            if name == key or name.startswith(f"{key}."):
                return origin
        parent = key.rpartition(".")[0]
        return self.origin(parent) if parent else DEFAULT

    def get(self, key: str) -> Any:
        """The value that was given, else DeepSpeed's default."""
        return self.values.get(key, ROWS[key].default)

    def given(self, key: str) -> bool:
        return key in self.values

    def source(self, key: str) -> Origin:
        return self.sources.get(key, DEFAULT)

    def add(self, key: str, message: str) -> None:
        self.problems.append(Problem(key, message, self.sources.get(key) or self.origin(key)))


def with_aliases(layer: Layer) -> Layer:
    """The layer with old spellings of keys replaced. Raises ConfigError when both are there."""
    values = dict(layer.values)
    for old, new in ALIASES.items():
        if old in values and new in values:
            raise ConfigError(
                "DeepSpeed config", [Problem(old, f'the same as "{new}"; keep one', layer.origin)]
            )
        if old in values:
            values[new] = values.pop(old)
    return Layer(values, layer.origin)


def walk(tree: Mapping[str, Any], prefix: str, found: Findings) -> None:
    """Look every key up in the table; descend into sections, checking only names where a gate is off."""
    section = prefix.rstrip(".")
    closed = section in GATES and _gate_is_off(tree, section)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if closed and name != GATES[section] and (key in ROWS or name in IDLE.get(section, ())):
            found.rows.append(
                Setting(key, value, found.origin(key), f"off, since {section}.{GATES[section]} is", False)
            )
        elif key in ROWS:
            _take(ROWS[key], value, found)
        elif name in IDLE.get(section, ()):
            continue  # the gate itself is refused
        elif key in SECTIONS:
            if isinstance(value, Mapping):
                walk(value, f"{key}.", found)
            elif value is not None:
                found.add(key, f"given {value!r}; allowed: a section {{...}}{_section_hint(key)}")
        else:
            found.add(key, _unknown_key(name, prefix))


def _gate_is_off(tree: Mapping[str, Any], section: str) -> bool:
    key = f"{section}.{GATES[section]}"
    value = tree.get(GATES[section], ROWS[key].default)
    return value in (False, None, "none", 0, "false")


def _section_hint(key: str) -> str:
    return ', such as {"stage": 1}' if key == "zero_optimization" else ""


def _unknown_key(name: str, prefix: str) -> str:
    siblings = {key[len(prefix) :].partition(".")[0] for key in ROWS if key.startswith(prefix)}
    siblings |= set(IDLE.get(prefix.rstrip("."), ())) | (set(ALIASES) if not prefix else set())
    elsewhere = [key for key in ROWS if key.rpartition(".")[2] == name]
    if elsewhere:
        return f'unknown key here; it belongs in "{elsewhere[0]}"'
    return f"unknown key; {nearest(name, siblings)}"


def _take(row: Row, value: Any, found: Findings) -> None:
    """Read one value as its row says, or note what is wrong with it."""
    found.sources[row.key] = found.origin(row.key)
    if value == "auto" and not _resolve_auto(row, found):
        return
    value = found.values.pop(row.key, value)
    if row.kind == "refused":
        if not _is_off(value):
            found.add(row.key, _refusal(row, value))
        else:
            found.rows.append(Setting(row.key, value, found.source(row.key), f"off ({row.why})", False))
    elif row.kind == "always":
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in row.only):
            found.add(row.key, _refusal(row, value))
        else:
            found.rows.append(Setting(row.key, value, found.source(row.key), f"always so: {row.why}"))
    else:
        try:
            found.values[row.key] = row.read(value)
        except ValueError as error:
            found.add(row.key, str(error))
            return
        if row.kind == "no effect":
            found.rows.append(Setting(row.key, value, found.source(row.key), f"no effect: {row.why}", False))
            if found.values[row.key] != row.default:
                found.notices.append(f"{row.key} = {value!r} has no effect here: {row.why}")


def _is_off(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not value or value.get("enabled", True) is False
    return value is None or value is False


def _refusal(row: Row, value: Any) -> str:
    shown = "a section" if isinstance(value, Mapping) else f"given {json.dumps(value, default=str)}"
    allowed = ", ".join(json.dumps(one) for one in row.only) or "leaving it out"
    why = f"{row.why} needs {row.package}: pip install {row.package}" if row.package else row.why
    return f"{shown}; allowed: {allowed}; {why}"


def _resolve_auto(row: Row, found: Findings) -> bool:
    """True when "auto" became a value, which then stands in `found.values`."""
    if row.key in found.auto:
        found.values[row.key] = found.auto[row.key]
        found.sources[row.key] = Origin("code", "for auto")
        return True
    if row.kind == "always":
        found.values[row.key] = row.only[0]
        return True
    if row.auto == "default" and row.default is not None:
        found.values[row.key] = row.default
        found.sources[row.key] = Origin("derived", "auto, the default")
        return True
    if row.auto == "no":
        found.add(row.key, 'given "auto"; it cannot be derived: give a value, or pass one for it in code')
    return False  # derived later, as if it had been left out
