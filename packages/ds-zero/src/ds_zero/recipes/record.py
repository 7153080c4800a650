"""What a run remembers of itself: plain data that goes into checkpoints and into the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Measured:
    """A number taken from the running job, and what the ZeRO paper says it should be."""

    measured: float
    formula: float
    how: str  # the formula with its numbers


@dataclass(slots=True)
class Phase:
    """One stretch of training at one world size and stage."""

    ranks: int
    stage: int
    dtype: str
    batch: int
    accumulate: int
    first_step: int
    last_step: int = 0
    seconds: float = 0.0  # of training steps alone
    tokens: int = 0
    bytes_per_rank: dict[str, Measured] = field(default_factory=dict)
    sent_per_step: dict[str, Measured] = field(default_factory=dict)
    heldout_at_load: float | None = None  # nats per byte right after loading a checkpoint
    heldout_at_save: float | None = None  # nats per byte right before the last save
    heldout_in_checkpoint: float | None = None  # what the loaded checkpoint says of itself

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class Record:
    """The whole run so far; every rank keeps one, rank 0 writes it."""

    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, nats per token)
    phases: list[Phase] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """The inverse of `as_json`."""
        phases = []
        for saved in values["phases"]:
            tables = {
                name: {key: Measured(**cell) for key, cell in saved[name].items()}
                for name in ("bytes_per_rank", "sent_per_step")
            }
            phases.append(Phase(**{**saved, **tables}))
        return cls([(int(step), float(loss)) for step, loss in values["losses"]], phases)
