"""Configs: closed, frozen, all problems at once, and where each value came from."""

from __future__ import annotations

from typing import Literal, Self

import pytest
from pydantic import field_validator, model_validator

from ds_core.ground.settings import Origin
from ds_core.setup.config import Config, ConfigError, Layer, Problem, flatten, nearest


class Inner(Config):
    window: int = 1000
    kind: Literal["log", "linear"] = "log"


class Outer(Config):
    stage: Literal[1, 2, 3]
    rate: float = 0.1
    inner: Inner = Inner()

    @field_validator("rate")
    @classmethod
    def _positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError(f"rate is {value}; it must be above 0")
        return value


FILE = Layer({"stage": 2, "inner": {"window": 5}}, Origin("file", "ds.json"))
CLI = Layer({"inner": {"kind": "linear"}, "stage": 3}, Origin("cli", "--stage"))


def test_every_value_knows_where_it_came_from() -> None:
    made = Outer.from_layers(FILE, CLI)
    assert (made.stage, made.inner.window, made.inner.kind) == (3, 5, "linear")
    assert str(made.origin("stage")) == "command line --stage"
    assert str(made.origin("inner.window")) == "file ds.json"
    assert str(made.origin("rate")) == "default"
    assert str(Outer(stage=1).origin("stage")) == "code"
    assert ("inner.kind", "linear", CLI.origin) in made.rows()


def test_derived_values_say_why_and_are_checked() -> None:
    made = Outer.from_layers(FILE).derived("half of 4", rate=2.0)
    assert str(made.origin("rate")) == "derived: half of 4"
    assert str(made.origin("stage")) == "file ds.json"
    assert made.stage == 2
    with pytest.raises(ConfigError, match="must be above 0"):
        made.derived("no", rate=-1.0)


def test_all_problems_at_once_with_the_nearest_key() -> None:
    bad = Layer({"stge": 1, "rate": -1, "inner": {"windw": 1, "kind": "cubic"}}, Origin("file", "ds.json"))
    with pytest.raises(ConfigError) as caught:
        Outer.from_layers(bad)
    text = str(caught.value)
    assert "Outer: 5 problems" in text
    assert 'stge: unknown key; did you mean "stage"? [file ds.json]' in text
    assert "stage: needed, but not given" in text
    assert "rate: rate is -1.0; it must be above 0" in text
    assert 'inner.windw: unknown key; did you mean "window"?' in text
    assert "inner.kind: given 'cubic'; input should be 'log' or 'linear' [file ds.json]" in text
    assert isinstance(caught.value, ValueError)


def test_direct_construction_reads_the_same() -> None:
    with pytest.raises(ConfigError, match="stage: given 4; input should be 1, 2 or 3"):
        Outer(stage=4)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="known: inner, rate, stage"):
        Outer(stage=1, zzz=1)  # type: ignore[call-arg]


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Outer(stage=1).stage = 2  # type: ignore[misc]


def test_conflicts_name_values_and_places() -> None:
    class Pair(Config):
        low: int = 1
        high: int = 0

        @model_validator(mode="after")
        def _ordered(self) -> Self:
            return self

    error = Pair.from_layers(Layer({"low": 5}, Origin("code"))).conflict("low exceeds high", "low", "high")
    assert str(error).endswith("low and high: low exceeds high; given low = 5 (code), high = 0 (default)")


def test_small_pieces() -> None:
    assert dict(flatten({"a": {"b": 1, "c": {}}, "d": 2})) == {"a.b": 1, "a.c": {}, "d": 2}
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
    assert str(Problem("k", "bad")) == "k: bad"
    cleared = Layer({"inner": {}}, Origin("code"))
    assert Outer.from_layers(FILE, cleared).inner.window == 1000
