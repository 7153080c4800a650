"""Times collectives, plain and coded, over a list of sizes: what `ds comm bench` shows."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ds_comm.bandwidth import OPS, algorithm_bandwidth, bus_bandwidth
from ds_core.ground.codec import CastCodec, all_reduce_coded, gather_coded, reduce_coded
from ds_core.ground.mesh import Mesh
from ds_core.ground.wire import Codec, Communicator
from ds_core.setup import plugins

NONE = "none"
CODED_OPS = ("all_gather", "reduce_scatter", "all_reduce")  # what a codec has a meaning for
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FEWEST, _MOST = 3, 200  # runs of a case


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table. `num_bytes`: the collective's size in `dtype`, before coding."""

    op: str
    dtype: str
    codec: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class CaseTimes:
    """What a case took on the slowest rank: the median of `runs`. Bandwidths count bytes before coding."""

    case: Case
    world: int
    runs: int
    sent_bytes: int
    median_ms: float
    best_ms: float
    algbw: float = field(init=False)
    busbw: float = field(init=False)

    def __post_init__(self) -> None:
        seconds, size = self.median_ms / 1e3, self.case.num_bytes
        object.__setattr__(self, "algbw", algorithm_bandwidth(size, seconds))
        object.__setattr__(self, "busbw", bus_bandwidth(self.case.op, self.world, size, seconds))


def plan_cases(
    ops: Sequence[str], sizes: Sequence[int], dtypes: Sequence[str], codecs: Sequence[str]
) -> list[Case]:
    """Every combination that there is. Raises ValueError for a name or number that is not allowed."""
    known = {"op": OPS, "dtype": tuple(DTYPES), "codec": known_codecs()}
    for what, given in (("op", ops), ("dtype", dtypes), ("codec", codecs)):
        for name in given:
            if name not in known[what]:
                raise ValueError(f"there is no {what} {name!r}; allowed: {', '.join(known[what])}")
    for size in sizes:
        if size < 1:
            raise ValueError(f"a size of {size} bytes; allowed: 1 or more, such as 64K or 1M")
    grid = itertools.product(ops, dtypes, codecs, sizes)
    cases = [
        Case(op, dtype, codec, size)
        for op, dtype, codec, size in grid
        if codec == NONE or (op in CODED_OPS and codec != dtype)
    ]
    if not cases:
        raise ValueError(
            f"nothing to measure: codecs are for {', '.join(CODED_OPS)}, and not for a dtype that is the same"
        )
    return cases


def known_codecs() -> tuple[str, ...]:
    """ "none", the casts by dtype, and the codecs of installed packages."""
    return (NONE, "bf16", "fp16", *(name for name in plugins.known("codec") if name != "cast"))


def make_codec(name: str) -> Codec | None:
    """The codec of a case."""
    if name == NONE:
        return None
    made: Codec = CastCodec(DTYPES[name]) if name in DTYPES else plugins.resolve("codec", name)
    return made


def run_cases(mesh: Mesh, cases: Sequence[Case], *, seconds: float = 10.0) -> list[CaseTimes]:
    """Time every case over all ranks for `seconds` in all, about. Collective."""
    comm = mesh.communicator("world", "bench")
    return [_run_case(mesh, comm, case, seconds / len(cases)) for case in cases]


def time_plain(mesh: Mesh, axis: str, num_bytes: int, times: int) -> float:
    """Seconds of a plain all-gather of so many bytes along an axis: the median of `times`, on the slowest
    rank. Collective."""
    comm = mesh.communicator(axis, "bench")
    call = _call(comm, Case("all_gather", "fp32", NONE, num_bytes))
    call()
    return statistics.median(_times(mesh, comm, call, times))


def _run_case(mesh: Mesh, comm: Communicator, case: Case, seconds: float) -> CaseTimes:
    call = _call(comm, case)
    call()  # the first chooses routes and makes connections
    before = _sent(mesh)
    call()
    sent = _sent(mesh) - before
    trial = max(_times(mesh, comm, call, 2))
    runs = max(_FEWEST, min(_MOST, int(seconds / max(trial, 1e-6))))
    spent = _times(mesh, comm, call, runs)
    return CaseTimes(case, comm.world, runs, sent, 1e3 * statistics.median(spent), 1e3 * min(spent))


def _sent(mesh: Mesh) -> int:
    return mesh.log.bytes_by_axis().get("world", 0)


def _times(mesh: Mesh, comm: Communicator, call: Callable[[], None], times: int) -> list[float]:
    """Seconds of each run, as the slowest rank has it; ranks begin together."""
    spent = torch.zeros(times, dtype=torch.float64)
    control = mesh.communicator("world", "control")
    for number in range(times):
        control.all_reduce(torch.zeros(1), about="a run begins").wait()
        begin = time.perf_counter()
        call()
        mesh.accelerator.synchronize()
        spent[number] = time.perf_counter() - begin
    control.all_reduce(spent, op="max", about="times of the runs").wait()
    found: list[float] = spent.tolist()
    return found


def _call(comm: Communicator, case: Case) -> Callable[[], None]:
    """The collective of a case, on tensors of its own."""
    codec, dtype, world = make_codec(case.codec), DTYPES[case.dtype], comm.world
    each = max(1, -(-case.num_bytes // (dtype.itemsize * world)))
    whole, other = (comm.allocate(each * world, dtype).normal_() for _ in range(2))
    shard = comm.allocate(each, dtype).normal_()
    reduce = partial(reduce_coded, comm, codec, scale=1.0, accumulate=False)

    def all_gather() -> None:
        gather_coded(comm, codec, whole, shard).wait()

    def reduce_scatter() -> None:
        reduce(shard, whole).wait()

    def all_reduce() -> None:
        if codec is None:
            whole.zero_()  # sums of sums would leave the dtype's range
            comm.all_reduce(whole).wait()
        else:
            all_reduce_coded(comm, codec, other, whole, scale=1.0).wait()

    def all_to_all() -> None:
        comm.all_to_all(other, whole).wait()

    def broadcast() -> None:
        comm.broadcast(whole).wait()

    calls = (all_gather, reduce_scatter, all_reduce, all_to_all, broadcast)
    return {call.__name__: call for call in calls}[case.op]


def results_as_json(results: Sequence[CaseTimes]) -> list[dict[str, Any]]:
    """What `--json` prints: flat objects."""
    return [
        {
            "op": one.case.op,
            "dtype": one.case.dtype,
            "codec": one.case.codec,
            "bytes": one.case.num_bytes,
            "ranks": one.world,
            "runs": one.runs,
            "sent_bytes": one.sent_bytes,
            "median_ms": one.median_ms,
            "best_ms": one.best_ms,
            "algbw": one.algbw,
            "busbw": one.busbw,
        }
        for one in results
    ]
