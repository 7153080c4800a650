"""Where a rank's memory goes, part by part, and the cheapest changes when there is too little of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ds_core.state.owner import FlatOwner
from ds_core.train.optim import ShardedOptimizer

_RECOMPUTED = 0.9  # of a transformer's activations: it keeps 1 stream of some 16 hidden, and one block whole
_HEADLINE = "memory of rank"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one rank. The first six are there together at the worst moment of a step.

    `buckets`: gradients on their way, with what arrives from other ranks. `gathered`: whole units of stage 3
    beside the shards. `loading` and `host` are peaks of other moments: while the model is sharded, and on the
    host (the model as built, or a checkpoint's staging). What allocators lose between blocks is in none.
    """

    params: int
    grads: int
    optimizer: int
    buckets: int
    gathered: int
    activations: int
    loading: int = 0
    host: int = 0

    def parts(self) -> dict[str, int]:
        """The six parts of a step by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)[:6]}

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    @property
    def peak(self) -> int:
        """The larger of a step and of loading."""
        return max(self.total, self.loading)

    def __str__(self) -> str:
        return ", ".join(f"{name} {gigabytes(size)}" for name, size in self.parts().items() if size)


@dataclass(frozen=True, slots=True)
class Change:
    """One thing to change: about how many bytes it saves, and what it costs as factors of now."""

    what: str
    saves: int
    wire: float = 1.0
    compute: float = 1.0
    effort: int = 0  # 0: a setting; 1: the arithmetic changes; 2: more devices

    def __str__(self) -> str:
        costs = [f"{self.wire:.2g} x the bytes on the wire"] if self.wire > 1 else []
        costs += [f"{self.compute:.2g} x the arithmetic"] if self.compute > 1 else []
        costs += ["", "results change within the precision of bf16", "more devices"][
            self.effort : self.effort + 1
        ]
        said = "; ".join(cost for cost in costs if cost)
        return f"{self.what}: saves about {gigabytes(self.saves)}" + (f" ({said})" if said else "")


def advice(
    memory: Memory,
    *,
    ranks: int,
    stage: int,
    accumulate: int = 1,
    low: bool = True,
    recompute: bool = False,
    single: bool = False,
    missing: int = 0,
) -> list[Change]:
    """The three cheapest single changes, those that free `missing` bytes first (pure).

    Cheap is what costs nothing on the wire, then no arithmetic, then no devices; then what saves most. `low`:
    parameters are below 32 bits already; `single`: the micro batch is one sample already.
    """
    found = [
        *_stages(memory, ranks, stage, accumulate),
        *(
            []
            if recompute
            else [Change("recompute activations", int(memory.activations * _RECOMPUTED), 1, 4 / 3)]
        ),
        Change("halve prefetch_numel and keep_numel", memory.gathered // 2),
    ]
    if not single:
        more = _wire(stage, 2 * accumulate) / _wire(stage, accumulate)
        what = f"half the micro batch, accumulate={2 * accumulate}"
        found.append(Change(what, memory.activations // 2, more))
    if not low:
        masters = memory.params // (1 if stage == 3 else ranks if stage else 1)
        half = (memory.params + memory.activations + memory.gathered) // 2
        found.append(Change('dtype="bfloat16"', half - masters, 0.5, effort=1))
    if stage > 0:
        cut = memory.optimizer + (memory.grads if stage > 1 else 0) + (memory.params if stage > 2 else 0)
        found.append(Change(f"{2 * ranks} ranks", cut // 2, effort=2))
    useful = [change for change in found if change.saves > max(0, memory.total // 50)]
    useful.sort(key=lambda c: (c.saves < missing, c.effort, c.wire, c.compute, -c.saves))
    return useful[:3]


def _stages(memory: Memory, ranks: int, stage: int, accumulate: int) -> Iterator[Change]:
    saved, rest = 0.0, 1 - 1 / ranks
    for higher in range(stage + 1, 4):
        saved += memory.optimizer * rest if higher == 1 else 0
        whole_grads = stage == 0 or accumulate > 1
        saved += memory.grads * rest if higher == 2 and whole_grads else 0
        saved += memory.params * rest if higher == 3 else 0
        more = _wire(higher, accumulate) / _wire(stage, accumulate)
        if higher == 3 or _wire(higher + 1, accumulate) > _wire(
            higher, accumulate
        ):  # else the next is as cheap
            yield Change(f"stage {higher}", int(saved), more)


def _wire(stage: int, accumulate: int) -> int:
    """Passes of the whole model over the wire in a step: reduces, and gathers."""
    return {0: 2, 1: 2, 2: accumulate + 1, 3: 3 * accumulate}[stage]


def gigabytes(size: float) -> str:
    """Decimal units, as in the ZeRO paper: "31.4 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"


# -- when memory has run out ---------------------------------------------------------------------------------


@contextlib.contextmanager
def explaining_oom(owner: FlatOwner, optimizer: ShardedOptimizer, accumulate: int) -> Iterator[None]:
    """An out-of-memory error that passes gets a note: the breakdown of what is held, and what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_oom(error) and not any(_HEADLINE in note for note in getattr(error, "__notes__", ())):
            error.add_note(oom_note(owner, optimizer, accumulate, asked=_asked(error)))
        raise


def is_oom(error: BaseException) -> bool:
    """A device's, Python's, or the CPU allocator's way of saying that there is no memory left."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "can't allocate memory" in str(error)


def oom_note(owner: FlatOwner, optimizer: ShardedOptimizer, accumulate: int, *, asked: int = 0) -> str:
    """Bytes of the live storages by part, and the three cheapest changes."""
    memory = live_memory(owner, optimizer)
    stage = owner.stage
    low = owner.precision.param is not None and owner.precision.param.itemsize < 4
    changes = advice(
        memory, ranks=owner.comm.world, stage=stage, accumulate=accumulate, low=low, missing=asked
    )
    lines = [f"{_HEADLINE} {owner.comm.rank} at stage {stage}: {memory} (activations: all that is not ours)"]
    lines += [f"  {number}. {change}" for number, change in enumerate(changes, 1)]
    return "\n".join(lines)


def live_memory(owner: FlatOwner, optimizer: ShardedOptimizer) -> Memory:
    """What a rank holds now, from storages. `activations` is whatever else this process holds."""
    seen: set[int] = set()
    states = [
        t for state in optimizer.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)
    ]
    kept = [t for unit in owner.units for t in ((unit.whole,) if unit.keep_whole else ()) + (unit.local,)]
    params = _storage_bytes(kept, seen)
    gathered = _storage_bytes((unit.whole for unit in owner.units), seen)
    masters = [unit.master().tensor for unit in owner.trainable]
    optimizer_bytes = _storage_bytes([*masters, *states], seen)
    grads = _storage_bytes((unit.gradient for unit in owner.trainable if unit.gradient is not None), seen)
    buckets = _storage_bytes(owner.reducer.live(), seen)
    known = params + gathered + optimizer_bytes + grads + buckets
    rest = max(0, _held(owner.device) - known)
    return Memory(params, grads, optimizer_bytes, buckets, gathered, rest)


def _storage_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total


def _held(device: torch.device) -> int:
    """What this process holds on the device; on a CPU, its resident memory where the kernel tells."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def _asked(error: BaseException) -> int:
    """How many bytes the failed allocation wanted, if the message says so."""
    match = re.search(r"allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)", str(error))
    if match is None:
        return 0
    return int(float(match[1]) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[match[2]])
