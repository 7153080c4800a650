"""What goes with what: one table, which refuses the rest when objects are joined and makes the docs page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

STAGES = (0, 1, 2, 3)

_MATRIX = "integration-tests/parity/test_parity.py::test_sharded_training_equals_its_twin"
_REPLICAS = "integration-tests/limits/test_limits.py::test_what_goes_with_replicas_equals_the_unsharded_model"
_TOGETHER = "integration-tests/limits/test_limits.py::test_what_goes_together_equals_the_unsharded_model"


@dataclass(frozen=True, slots=True)
class Cell:
    """Yes, and which test says so; or no, and why."""

    test: str = ""
    why: str = ""

    def __post_init__(self) -> None:
        if bool(self.test) == bool(self.why):
            raise ValueError(f"a cell has a test or a reason, got {self}")

    @property
    def works(self) -> bool:
        return not self.why


@dataclass(frozen=True, slots=True)
class Feature:
    """Something that is joined to a run, and its cell at each stage."""

    what: str
    stages: tuple[Cell, Cell, Cell, Cell]


def _yes(test: str) -> tuple[Cell, Cell, Cell, Cell]:
    cell = Cell(test)
    return (cell, cell, cell, cell)


def _from_one(test: str, why: str) -> tuple[Cell, Cell, Cell, Cell]:
    cell = Cell(test)
    return (Cell(why=why), cell, cell, cell)


_NO_SECOND = Cell(why="a second shard of the parameters needs stage 3, where they are cut")
ACROSS_NODES = frozenset({"replicas", "second shard"})
_WHOLE = "its parameters are whole all the time: set persist_numel=0, or use stage 3"

FEATURES: Mapping[str, Feature] = {
    "fp32": Feature("parameters in fp32", _yes(_MATRIX)),
    "bf16": Feature("parameters in bf16 with fp32 masters", _yes(_MATRIX)),
    "fp16": Feature("parameters in fp16 with fp32 masters", _yes(_MATRIX)),
    "loss scale": Feature("`Engine(scaler=...)`", _yes(_TOGETHER)),
    "accumulation": Feature("several micro batches per step", _yes(_MATRIX)),
    "no_sync": Feature("`no_sync(model)` around all backwards but the last", _yes(_TOGETHER)),
    "tied": Feature("a parameter that several modules share", _yes(_MATRIX)),
    "frozen": Feature("parameters without a gradient, in whole blocks and in part", _yes(_MATRIX)),
    "reentrant": Feature("re-entrant activation checkpointing", _yes(_MATRIX)),
    "non-reentrant": Feature("activation checkpointing that is not re-entrant", _yes(_MATRIX)),
    "whole cut": Feature("an optimizer that needs whole parameters", _yes(_TOGETHER)),
    "several optimizers": Feature("`JointOptimizer([...])`, one for each part of the model", _yes(_TOGETHER)),
    "persist": Feature(
        "`Zero(persist_numel=...)`",
        (
            Cell(why="nothing is ever let go, so nothing can stay: leave persist_numel out"),
            Cell(why=_WHOLE),
            Cell(why=_WHOLE),
            Cell(_TOGETHER),
        ),
    ),
    "meta": Feature(
        "a model built on the meta device",
        _from_one(
            _TOGETHER, "it shards nothing and so builds nothing: build the model for real, or use stage 1"
        ),
    ),
    "reduce codec": Feature("a lossy wire for gradients", _yes(_TOGETHER)),
    "gather codec": Feature(
        "a lossy wire for parameters",
        _from_one(_TOGETHER, "it gathers no parameters: leave `gather` out, or use stage 1"),
    ),
    "replicas": Feature(
        "copies across nodes, shards inside: `Topology(dp_replicate=..., dp_shard=...)`", _yes(_REPLICAS)
    ),
    "second shard": Feature(
        "`Zero(secondary_shard=True)`, on a mesh with replicas",
        (_NO_SECOND, _NO_SECOND, _NO_SECOND, Cell(_REPLICAS)),
    ),
    "keep_fp32": Feature("`Zero(keep_fp32=...)`: parameters that stay in fp32", _yes(_TOGETHER)),
    "leaves": Feature("`Zero(leaves=...)`: modules that are never split into units", _yes(_TOGETHER)),
    "recompute": Feature(
        "`checkpoint_blocks(model)`, whichever blocks, with or without `keep`", _yes(_TOGETHER)
    ),
    "activations away": Feature("ds-offload's `offload_blocks(model, ...)`", _yes(_TOGETHER)),
    "compile": Feature("`compile_blocks(model)`", _yes(_TOGETHER)),
    "other world": Feature(
        "going on from a checkpoint at another world size and stage, and back", _yes(_TOGETHER)
    ),
    "offload": Feature("`store=TieredStore(...)`: training state on the host or on disk", _yes(_TOGETHER)),
    "EMA": Feature("an exponential moving average of the masters", _yes(_TOGETHER)),
}

_ONE_DTYPE = "parameters are cast to one dtype: give one"
_FP16_ONLY = "a loss scale is for fp16 only: leave it out"

# Pairs that do not go together; every other pair does, and two tests train each of them at each stage.
APART: Mapping[frozenset[str], str] = {
    frozenset({"fp32", "bf16"}): _ONE_DTYPE,
    frozenset({"fp32", "fp16"}): _ONE_DTYPE,
    frozenset({"bf16", "fp16"}): _ONE_DTYPE,
    frozenset({"loss scale", "fp32"}): _FP16_ONLY,
    frozenset({"loss scale", "bf16"}): _FP16_ONLY,
}


def at_stage(feature: str, stage: int) -> Cell:
    """The cell of one feature at one stage. Raises KeyError for a feature that the table does not have."""
    return FEATURES[feature].stages[stage]


def together(one: str, other: str) -> Cell:
    """The cell of two different features."""
    pair = frozenset({one, other})
    if not pair <= FEATURES.keys() or len(pair) != 2:
        raise KeyError(f"{sorted(pair)}: two different features of {', '.join(FEATURES)}")
    if pair in APART:
        return Cell(why=APART[pair])
    return Cell(_REPLICAS if pair & ACROSS_NODES else _TOGETHER)


def refuse(stage: int, features: Iterable[str]) -> None:
    """Raises ValueError when one of these features does not go with the stage or with another, saying why."""
    found = sorted(set(features))
    for feature in found:
        if not (cell := at_stage(feature, stage)).works:
            raise ValueError(f"{feature} does not go with stage {stage}: {cell.why}")
    for one, other in combinations(found, 2):
        if not (cell := together(one, other)).works:
            raise ValueError(f"{one} does not go with {other}: {cell.why}")


def combos(stage: int) -> Iterator[frozenset[str]]:
    """Everything that is said to work at a stage: each feature alone, and each pair."""
    here = [name for name in FEATURES if at_stage(name, stage).works]
    yield from (frozenset({name}) for name in here)
    yield from (frozenset(pair) for pair in combinations(here, 2) if together(*pair).works)


def tests() -> set[str]:
    """Every test that a cell names."""
    named = {cell.test for feature in FEATURES.values() for cell in feature.stages if cell.works}
    return named | {_TOGETHER, _REPLICAS}


def page() -> str:
    """The table as a page of the documentation."""
    lines = [
        "# What goes with what",
        "",
        'Made from `ds_core/limits.py`. Every "yes" has a test that trains it against',
    ]
    lines += [
        "the unsharded model; everything else is refused when the objects are joined, with the reason.",
        "",
    ]
    lines += ["| feature | what it is | " + " | ".join(f"stage {stage}" for stage in STAGES) + " |"]
    lines += ["|---|---|" + "---|" * len(STAGES)]
    reasons: list[str] = []

    def mark(cell: Cell) -> str:
        if cell.works:
            return "yes"
        if cell.why not in reasons:
            reasons.append(cell.why)
        return f"no ({reasons.index(cell.why) + 1})"

    for name, feature in FEATURES.items():
        lines.append(f"| {name} | {feature.what} | " + " | ".join(map(mark, feature.stages)) + " |")
    lines += ["", *(f"{number}. {why}" for number, why in enumerate(reasons, 1))]
    lines += ["", "Any two of them go together at every stage that has both, except:", ""]
    lines += ["| these two | why not |", "|---|---|"]
    lines += [f"| {' and '.join(sorted(pair))} | {why} |" for pair, why in APART.items()]
    lines += ["", "The tests:", "", *(f"- `{test}`" for test in sorted(tests())), ""]
    return "\n".join(lines)
