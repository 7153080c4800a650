"""Which stage, micro batch and recompute is the cheapest that fits, and why the others lose (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ds_core.setup.estimate import STAGES, DoesNotFit
from ds_core.setup.predict import Settings, predict
from ds_core.setup.shape import Dims, Shape, within
from ds_core.train.memory import Memory, advice, gigabytes


@dataclass(frozen=True, slots=True)
class Speed:
    """The cost model's constants, per rank: arithmetic, the wire, and what a block costs to start at all."""

    flops_per_s: float = 3e14
    wire_bytes_per_s: float = 5e10
    block_start_s: float = 1e-4


@dataclass(frozen=True, slots=True)
class Candidate:
    """One configuration: its bytes, its wire traffic in a step, its seconds, and why it was not chosen."""

    settings: Settings
    memory: Memory
    wire_bytes: int
    seconds: float
    verdict: str = ""

    @property
    def name(self) -> str:
        s = self.settings
        recompute = ", recompute" if s.recompute else ""
        return f"stage {s.stage}, micro batch {s.micro_batch}, accumulate {s.accumulate}{recompute}"


def search(
    shape: Shape, settings: Settings, *, global_batch: int, available: float, speed: Speed | None = None
) -> list[Candidate]:
    """Every stage x micro batch x recompute for `global_batch` sequences per step, best first, each with why.

    What fits comes first; among that fewest bytes on the wire, then fewest seconds (`step_seconds`), then
    least memory. Raises ValueError when the batch does not divide, DoesNotFit with the breakdown of the
    smallest candidate and its three cheapest changes when none fits.
    """
    speed = speed or Speed()
    if global_batch < 1 or global_batch % settings.ranks:
        raise ValueError(
            f"a global batch of {global_batch} does not divide over {settings.ranks} ranks; give a multiple"
        )
    found = [
        Candidate(s, predict(shape, s), wire_bytes(shape, s), step_seconds(shape, s, speed))
        for s in _choices(settings, global_batch // settings.ranks)
    ]
    found.sort(key=lambda c: (c.memory.peak > available, *_cost(c)))
    best = found[0]
    if best.memory.peak > available:
        raise DoesNotFit(_refusal(min(found, key=lambda c: c.memory.peak), available))
    return [replace(best, verdict="chosen")] + [
        replace(one, verdict=_why(one, best, available)) for one in found[1:]
    ]


def wire_bytes(shape: Shape, s: Settings) -> int:
    """What one rank sends in a step, in the parameters' dtype.

    A reduce-scatter or an all-gather of N bytes sends N (W - 1) / W. Stage 0 reduces and gathers gradients
    (an all-reduce) once; stage 1 reduces gradients and gathers parameters once; stage 2 reduces in every
    micro batch; stage 3 gathers twice in every micro batch too, less the units that stay for the backward and
    embeddings, which only the forward needs.
    """
    if s.ranks == 1:
        return 0
    padded = [unit.padded(s.ranks, s.cut) for unit in shape.units]
    trained = sum(n for n, unit in zip(padded, shape.units, strict=True) if unit.trainable)
    elements = trained * (s.accumulate if s.stage > 1 else 1)
    if s.stage < 3:
        elements += trained
    else:
        kept = [unit.numel < s.persist_numel for unit in shape.units]
        refreshed = [keep and unit.trainable for keep, unit in zip(kept, shape.units, strict=True)]
        elements += sum(n for n, stays in zip(padded, refreshed, strict=True) if stays)
        gathers = _gathers(shape, padded, s.keep_numel)
        elements += s.accumulate * sum(padded[index] for index in gathers if not kept[index])
    return elements * s.param_bytes * (s.ranks - 1) // s.ranks


def _gathers(shape: Shape, padded: Sequence[int], keep_numel: int) -> Iterator[int]:
    """The units that one forward and one backward gather at stage 3, each as often as it is."""
    tail = set(within(shape.order[::-1], padded, keep_numel))
    here: set[int] = set()
    for at, use in enumerate(shape.uses):
        if use.unit not in here:
            yield use.unit
        following = shape.uses[at + 1].unit if at + 1 < len(shape.uses) else None
        stays = use.unit == following or (use.unit in tail and not use.lookup)
        here = here | {use.unit} if stays else here - {use.unit}
    yield from {use.unit for use in shape.uses if not use.lookup} - here


def step_seconds(shape: Shape, s: Settings, speed: Speed) -> float:
    """The cost model: arithmetic + bytes on the wire / bandwidth + starting every block of every micro batch.

    6 operations for each parameter and token (2 forward, 4 backward; 8 with recompute) and
    12 x layers x heads x head_dim x seq for each token's attention, causal ones counted whole. Nothing is
    assumed to overlap, so times are for comparing, not for promising.
    """
    tokens = s.micro_batch * s.accumulate * max(1, s.seq)
    passes = 4 if s.recompute else 3
    dims, active, attention, blocks = shape.dims, shape.numel, 0, len(shape.units)
    if dims is not None:
        active, blocks = _active(shape, dims), dims.layers
        attention = 4 * dims.layers * dims.heads * dims.head_dim * s.seq
    flops = tokens * passes * (2 * active + attention)
    starts = s.accumulate * passes * blocks
    return (
        flops / speed.flops_per_s
        + wire_bytes(shape, s) / speed.wire_bytes_per_s
        + starts * speed.block_start_s
    )


def _active(shape: Shape, dims: Dims) -> int:
    """Parameters that a token is multiplied with: no looked-up embeddings, and its own experts only."""
    looked_up = sum(shape.units[index].numel for index in shape.looked_up)
    idle = 0
    if dims.experts:
        each = dims.mlp_matrices * dims.hidden * dims.intermediate
        idle = dims.layers * (dims.experts - dims.experts_per_token) * each
    return max(1, shape.numel - looked_up - idle)


def _choices(settings: Settings, per_rank: int) -> Iterator[Settings]:
    for micro in (n for n in range(1, per_rank + 1) if per_rank % n == 0):
        batch = replace(settings, micro_batch=micro, accumulate=per_rank // micro)
        for stage in STAGES:
            for recompute in (False, True):
                yield replace(batch, stage=stage, recompute=recompute)


def _cost(candidate: Candidate) -> tuple[float, ...]:
    # The wire to 1 %: padding must not decide between stages that send the same.
    return (float(f"{candidate.wire_bytes:.2g}"), candidate.seconds, candidate.memory.peak)


def _why(one: Candidate, best: Candidate, available: float) -> str:
    if one.memory.peak > available:
        loads = one.memory.loading > one.memory.total
        parts = {"loading": one.memory.loading} if loads else one.memory.parts()
        largest = max(parts, key=lambda name: parts[name])
        return f"does not fit: {gigabytes(one.memory.peak)}, of which {largest} {gigabytes(parts[largest])}"
    if _cost(one)[0] > _cost(best)[0]:
        return f"sends {gigabytes(one.wire_bytes)}, not {gigabytes(best.wire_bytes)}"
    if one.seconds > best.seconds * 1.001:
        why = "recomputes" if one.settings.recompute and not best.settings.recompute else "starts more blocks"
        return f"sends the same, {one.seconds / best.seconds:.2f} x the time: {why}"
    return f"sends the same in the same time, but needs {gigabytes(one.memory.peak)}"


def _refusal(smallest: Candidate, available: float) -> str:
    s, memory = smallest.settings, smallest.memory
    changes = advice(
        memory,
        ranks=s.ranks,
        stage=s.stage,
        accumulate=s.accumulate,
        low=s.low,
        recompute=s.recompute,
        single=s.micro_batch == 1,
        missing=int(memory.peak - available),
    )
    lines = [
        f"nothing fits {gigabytes(available)} per rank; the smallest is {smallest.name}: "
        f"{gigabytes(memory.peak)} ({memory}; loading {gigabytes(memory.loading)})",
        *(f"  {number}. {change}" for number, change in enumerate(changes, 1)),
    ]
    return "\n".join(lines)
