"""The base of every config: frozen, closed, and every value knows where it came from."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from ds_core.ground.settings import Origin


@dataclass(frozen=True, slots=True)
class Layer:
    """Values from one place. Where several layers speak, the last one wins."""

    values: Mapping[str, Any]
    origin: Origin


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to mend: the key, what is wrong with it and where it was written."""

    key: str
    message: str
    origin: Origin | None = None

    def __str__(self) -> str:
        place = f" [{self.origin}]" if self.origin else ""
        return f"{self.key}: {self.message}{place}"


class ConfigError(ValueError):
    """Everything that is wrong with a config, at once."""

    def __init__(self, what: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        super().__init__("\n  ".join([f"{what}: {count}", *map(str, problems)]))


class Config(BaseModel):
    """Frozen base of every config, living beside what it builds.

    Raises ConfigError (a ValueError) with every problem: unknown keys with the nearest known one, values
    with what is allowed. `origin(key)` says where a value came from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    _origins: dict[str, Origin] = PrivateAttr(default_factory=dict)

    if not TYPE_CHECKING:  # so that type checkers keep seeing the fields as arguments

        def __init__(self, /, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError(type(self).__name__, list(_problems(type(self), error))) from None

    @classmethod
    def from_layers(cls, *layers: Layer) -> Self:
        """Merge the layers, validate the result, remember where each value came from."""
        tree, origins = merge(layers)
        try:
            made = cls(**tree)
        except ConfigError as error:
            raise ConfigError(
                cls.__name__, [Problem(p.key, p.message, origins.get(p.key)) for p in error.problems]
            ) from None
        made._origins.update(origins)
        return made

    def origin(self, key: str) -> Origin:
        """Where the value of `key` (dotted for a section's) came from."""
        part = key
        while part:
            if part in self._origins:
                return self._origins[part]
            part = part.rpartition(".")[0]
        return Origin("code") if key.partition(".")[0] in self.model_fields_set else Origin("default")

    def derived(self, why: str, **values: Any) -> Self:
        """A copy with values worked out from others, validated like any other."""
        fields = {name: getattr(self, name) for name in self.model_fields_set} | values
        made = type(self)(**fields)
        made._origins.update(self._origins)
        made._origins.update({name: Origin("derived", why) for name in values})
        return made

    def conflict(self, message: str, *keys: str) -> ConfigError:
        """The error for values that cannot stand together, naming each value and where it came from."""
        given = ", ".join(f"{key} = {getattr(self, key)!r} ({self.origin(key)})" for key in keys)
        return ConfigError(type(self).__name__, [Problem(" and ".join(keys), f"{message}; given {given}")])

    def rows(self) -> list[tuple[str, Any, Origin]]:
        """(key, value, origin) of every value, sections flattened."""
        return [(key, value, self.origin(key)) for key, value in flatten(self.model_dump())]


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an "unknown name" message: the likeliest intended one, else all that are known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f'did you mean "{close[0]}"?'
    return f"known: {', '.join(names)}"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; an empty section is a leaf."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{key}.")
        else:
            yield key, value


def merge(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[str, Origin]]:
    """One tree out of several, section by section, and the origin of every leaf."""
    tree: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for layer in layers:
        _overlay(tree, layer.values, origins, layer.origin, "")
    return tree, origins


def _overlay(
    tree: dict[str, Any], values: Mapping[str, Any], origins: dict[str, Origin], origin: Origin, prefix: str
) -> None:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            under = tree.get(name)
            tree[name] = under if isinstance(under, dict) else {}
            origins.pop(key, None)
            _overlay(tree[name], value, origins, origin, f"{key}.")
        else:
            for replaced in [old for old in origins if old.startswith(f"{key}.")]:
                del origins[replaced]
            tree[name] = {} if isinstance(value, Mapping) else value
            origins[key] = origin


def _problems(cls: type[BaseModel], error: ValidationError, prefix: str = "") -> Iterator[Problem]:
    for item in error.errors(include_url=False):
        key = prefix + ".".join(str(part) for part in item["loc"])
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError):  # a section that is a Config itself
            yield from (Problem(f"{key}.{p.key}", p.message, p.origin) for p in inner.problems)
        elif item["type"] == "extra_forbidden":
            yield Problem(key, f"unknown key; {nearest(str(item['loc'][-1]), cls.model_fields)}")
        elif item["type"] == "missing":
            yield Problem(key, "needed, but not given")
        else:
            said = item["msg"].removeprefix("Value error, ")
            message = said if inner is not None else f"given {item['input']!r}; {said[:1].lower()}{said[1:]}"
            yield Problem(key or cls.__name__, message)
