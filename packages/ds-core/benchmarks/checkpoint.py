"""Checkpoint speed beside torch DCP and DeepSpeed: pause, whole save and load of a 125M-parameter state.

    python packages/ds-core/benchmarks/checkpoint.py [--rounds 3] [--params 125] [--out results.json]

Two gloo ranks on this host hold fp32 masters and two moments (12 bytes per parameter), cut evenly.
Every round has all contenders in a random order, each in a directory of its own; loads read what the same
contender just saved, from the page cache. `write_fsync` is the bound: the same bytes, written and fsynced,
nothing else. What each makes durable stands in `SYNCS` and in the result.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SYNCS = {
    "write_fsync": "the data files",
    "ds_core": "data files (hashed with sha256), index, directories, before the commit by rename",
    "ds_core_async": "as ds_core; the part announces its changes",
    "ds_core_async_eager": "as ds_core; the part does not announce its changes, so it is copied at once",
    "dcp": "data files and metadata, not directories; no hash",
    "dcp_async": "as dcp; default staging",
    "dcp_async_cached": "as dcp; staging memory kept between saves",
    "deepspeed_z3": "nothing; no hash",
    "deepspeed_z3_fsync": "as deepspeed_z3, then every file fsynced by the rank that wrote it",
}
WORLD, STEP_S = 2, 1.0


def shapes(millions: int) -> dict[str, tuple[int, ...]]:
    """A decoder-only transformer with about `millions` of parameters."""
    width = 768 if millions >= 100 else 256
    found: dict[str, tuple[int, ...]] = {"embed.weight": (32000, width)}
    layers = max(1, round((millions * 1e6 - 32000 * width) / (12 * width * width)))
    for i in range(layers):
        found |= {f"blocks.{i}.qkv": (3 * width, width), f"blocks.{i}.out": (width, width)}
        found |= {f"blocks.{i}.up": (4 * width, width), f"blocks.{i}.down": (width, 4 * width)}
        found |= {f"blocks.{i}.norm1": (width,), f"blocks.{i}.norm2": (width,)}
    return found


# == contenders: each has save(path) -> seconds of pause, finish(), load(path) ==


class State:
    """This rank's half of every tensor: rows of dim 0, which is the flat cut too. All contenders share it."""

    def __init__(self, rank: int, sizes: dict[str, tuple[int, ...]]) -> None:
        import torch

        self.rank, self.sizes = rank, sizes
        self.kept: dict[str, Any] = {}  # what contenders share: staging memory, an engine
        self.halves = {
            kind: {
                name: torch.full((shape[0] // WORLD, *shape[1:]), 1.5 + rank) for name, shape in sizes.items()
            }
            for kind in ("model", "m", "v")
        }


class Plain:
    """The bound: one file per rank, written and fsynced."""

    def __init__(self, state: State) -> None:
        self._rank = state.rank
        self._views = [
            memoryview(half.numpy()).cast("B") for halves in state.halves.values() for half in halves.values()
        ]

    def save(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        with open(path / str(self._rank), "wb", buffering=0) as file:
            for view in self._views:
                for at in range(0, len(view), 256 << 10):
                    file.write(view[at : at + (256 << 10)])
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Nothing runs on."""

    def load(self, path: Path) -> None:
        with open(path / str(self._rank), "rb", buffering=0) as file:
            for view in self._views:
                file.readinto(view)


class Ours:
    """ds-core's CheckpointStore over flat shards."""

    def __init__(self, state: State, *, block: bool, steady: bool) -> None:
        from ds_core.state.checkpoint import CheckpointStore
        from ds_core.state.shard import FlatShard
        from ds_core.testing.parts import CutPart, SteadyPart

        kind = SteadyPart if steady else CutPart
        self._parts = {"model": kind({}), "optimizer": kind({})}
        for name, shape in state.sizes.items():
            for moment, part in (("model", "model"), ("m", "optimizer"), ("v", "optimizer")):
                key = name if part == "model" else f"{name}/{moment}"
                half = state.halves[moment][name].view(-1)
                self._parts[part].shapes[key] = torch_size(shape)
                self._parts[part].held[key] = FlatShard(half, torch_size(shape), state.rank * half.numel())
        self._make, self._block, self._store, self._kept = CheckpointStore, block, None, state.kept

    def save(self, path: Path) -> None:
        self._store.save(1, self._parts, block=self._block)

    def ready(self, path: Path) -> None:
        """A run has one store; here every save has its own directory, so staging moves along."""
        self._store = self._make(path)
        if not self._block:
            self._store._staging = self._kept.setdefault("staging", self._store._staging)
            self._store.reserve(self._parts)

    def step(self) -> None:
        """Where the optimizer would write: what it waits for the snapshot."""
        for part in self._parts.values():
            if hasattr(part, "_gate"):
                part._gate.open()

    def finish(self) -> None:
        self._store.wait()

    def load(self, path: Path) -> None:
        self._make(path).load(self._parts)


def torch_size(shape: tuple[int, ...]) -> Any:
    import torch

    return torch.Size(shape)


class Dcp:
    """torch.distributed.checkpoint over DTensors sharded on dim 0, as FSDP2 holds them."""

    def __init__(self, state: State, *, stager: str | None) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.tensor import DeviceMesh, DTensor, Shard

        mesh = DeviceMesh("cpu", list(range(WORLD)))
        self._state = {
            f"{kind}.{name}": DTensor.from_local(half, mesh, [Shard(0)], run_check=False)
            for kind, halves in state.halves.items()
            for name, half in halves.items()
        }
        self._async, self._future, self._more = stager is not None, None, {}
        if stager == "cached":
            self._more = {"async_stager": DefaultStager(StagingOptions(False, False, False, False))}

    def save(self, path: Path) -> None:
        import torch.distributed.checkpoint as dcp

        if self._async:
            found = dcp.async_save(self._state, checkpoint_id=path, **self._more)
            self._future = getattr(found, "upload_completion", found)
        else:
            dcp.save(self._state, checkpoint_id=path)

    def finish(self) -> None:
        if self._future is not None:
            self._future.result()

    def load(self, path: Path) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(self._state, checkpoint_id=path)


class DeepSpeed:
    """deepspeed's engine.save_checkpoint at stage 3 in fp32 (12 bytes per parameter)."""

    def __init__(self, state: State, *, sync: bool = False) -> None:
        state.kept.setdefault("deepspeed", None)
        if state.kept["deepspeed"] is None:
            state.kept["deepspeed"] = deepspeed_engine(state)
        self._engine, self._sync, self._rank = state.kept["deepspeed"], sync, state.rank

    def save(self, path: Path) -> None:
        self._engine.save_checkpoint(str(path), tag="1")
        if self._sync:
            for file in sorted(path.rglob("*.pt")):
                if f"rank_{self._rank}_" in file.name:
                    descriptor = os.open(file, os.O_RDONLY)
                    os.fsync(descriptor)
                    os.close(descriptor)

    def finish(self) -> None:
        """Nothing runs on."""

    def load(self, path: Path) -> None:
        self._engine.load_checkpoint(str(path), tag="1")


def deepspeed_engine(state: State) -> Any:
    """An engine that has made one step, so that its optimizer has state."""
    import deepspeed
    import torch

    class Sum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weights = {name: torch.full(shape, 1.5) for name, shape in state.sizes.items()}
            self.weights = torch.nn.ParameterList(map(torch.nn.Parameter, weights.values()))

        def forward(self) -> Any:
            return sum(weight.sum() for weight in self.weights) * 1e-6

    model = Sum()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    config = {"train_batch_size": WORLD, "zero_optimization": {"stage": 3}}
    config["zero_allow_untested_optimizer"] = True
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.backward(engine())
    engine.step()
    return engine


CONTENDERS: dict[str, Callable[..., Any]] = {
    "write_fsync": Plain,
    "ds_core": lambda state: Ours(state, block=True, steady=True),
    "dcp": lambda state: Dcp(state, stager=None),
    "deepspeed_z3": lambda state: DeepSpeed(state),
    "deepspeed_z3_fsync": lambda state: DeepSpeed(state, sync=True),
    "ds_core_async": lambda state: Ours(state, block=False, steady=True),
    "dcp_async": lambda state: Dcp(state, stager="default"),
    "dcp_async_cached": lambda state: Dcp(state, stager="cached"),
    "ds_core_async_eager": lambda state: Ours(state, block=False, steady=False),
}


# == one rank ==


def measure(contender: Any, folder: Path) -> dict[str, float]:
    """One save and one load; the slowest rank's seconds, and this rank's CPU seconds."""
    import torch.distributed as dist

    if hasattr(contender, "ready"):
        contender.ready(folder)
    dist.barrier()
    cpu, start = time.process_time(), time.perf_counter()
    contender.save(folder)
    pause = time.perf_counter() - start
    step = getattr(contender, "step", None)
    if step is not None and "async" in folder.name:
        time.sleep(max(0.0, STEP_S - pause))  # the optimizer's step comes after a forward and a backward
        waited = time.perf_counter()
        step()
        pause += time.perf_counter() - waited
    contender.finish()
    dist.barrier()
    whole = time.perf_counter() - start
    save_cpu = time.process_time() - cpu
    dist.barrier()
    cpu, start = time.process_time(), time.perf_counter()
    contender.load(folder)
    dist.barrier()
    load = time.perf_counter() - start
    load_cpu = time.process_time() - cpu
    return {
        "pause_s": pause,
        "whole_s": whole,
        "load_s": load,
        "save_cpu_s": save_cpu,
        "load_cpu_s": load_cpu,
    }


def run_rank(arguments: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    store = dist.FileStore(arguments.store, WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    state, folder = State(rank, shapes(arguments.params)), Path(arguments.folder)
    kept: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for turn in range(-1, arguments.rounds):  # round -1 warms up: memory, caches, plans
        # Each inherits the page-cache memory that the one before let go, warm or cold: chance decides who.
        order = random.Random(turn).sample(arguments.contenders, len(arguments.contenders))
        for name in order:
            contender = kept.get(name) or CONTENDERS[name](state)
            kept[name] = contender
            target = folder / f"{name}-{turn}"
            load = os.getloadavg()[0]
            found = measure(contender, target)
            gathered: list[Any] = [torch.zeros(len(found), dtype=torch.float64) for _ in range(WORLD)]
            dist.all_gather(gathered, torch.tensor(list(found.values()), dtype=torch.float64))
            worst = torch.stack(gathered).max(dim=0).values.tolist()
            if turn >= 0 and rank == 0:
                rows.append(
                    {"contender": name, "round": turn, "load": load, **dict(zip(found, worst, strict=True))}
                )
            if rank == 0:
                size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
                if turn >= 0:
                    rows[-1]["bytes"] = size
                shutil.rmtree(target)
            gc.collect()
            dist.barrier()
    if rank == 0:
        Path(arguments.rows).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


# == the parent ==


def summarise(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Per contender and figure: minimum, median, maximum."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in dict.fromkeys(row["contender"] for row in rows):
        mine = [row for row in rows if row["contender"] == name]
        found[name] = {
            key: [round(f([row[key] for row in mine]), 4) for f in (min, statistics.median, max)]
            for key in ("pause_s", "whole_s", "load_s", "save_cpu_s", "load_cpu_s", "bytes")
        }
    return found


def verdicts(summary: dict[str, dict[str, list[float]]]) -> dict[str, bool]:
    """The targets, on medians."""

    def median(name: str, key: str) -> float:
        return summary[name][key][1] if name in summary else float("inf")

    peers = [name for name in ("dcp", "deepspeed_z3", "deepspeed_z3_fsync") if name in summary]
    found = {}
    if "ds_core_async" in summary:
        limit = max(0.1, 0.5 * min(median("dcp_async", "pause_s"), median("dcp_async_cached", "pause_s")))
        found["async pause <= 0.1 s or half of DCP's"] = median("ds_core_async", "pause_s") <= limit
    for peer in peers:
        found[f"whole save <= {peer}"] = median("ds_core", "whole_s") <= median(peer, "whole_s")
        found[f"load <= {peer}"] = median("ds_core", "load_s") <= median(peer, "load_s")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--params", type=int, default=125, help="millions")
    parser.add_argument("--contenders", nargs="*", choices=list(CONTENDERS))
    parser.add_argument("--folder", help="where to write (default: a temporary directory)")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(arguments)
        return 0
    chosen = arguments.contenders or list(CONTENDERS)
    if importlib.util.find_spec("deepspeed") is None and any("deepspeed" in name for name in chosen):
        print("deepspeed is not importable by this Python: its contenders are skipped")
        chosen = [name for name in chosen if "deepspeed" not in name]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = spawn(arguments, chosen, Path(folder))
    summary = summarise(rows)
    print(f"{'contender':22}{'pause s':>18}{'whole save s':>22}{'load s':>22}{'save CPU s':>12}")
    for name, figures in summary.items():
        cells = [
            "  ".join(f"{value:.2f}" for value in figures[key]) for key in ("pause_s", "whole_s", "load_s")
        ]
        print(f"{name:20}{cells[0]:>20}{cells[1]:>22}{cells[2]:>22}{figures['save_cpu_s'][1]:>12.2f}")
    print("(minimum, median, maximum of the slower rank)")
    for target, held in verdicts(summary).items():
        print(f"{'met   ' if held else 'MISSED'} {target}")
    if arguments.out:
        about = {"params_millions": arguments.params, "world": WORLD, "rounds": arguments.rounds}
        about |= {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
        result = {**about, "targets": verdicts(summary), "summary": summary}
        result["durable"] = {name: SYNCS[name] for name in summary}
        arguments.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    return 0


def spawn(arguments: argparse.Namespace, chosen: list[str], folder: Path) -> list[dict[str, Any]]:
    """Run the ranks and give back rank 0's rows."""
    rows = folder / "rows.json"
    command = [sys.executable, __file__, "--rounds", str(arguments.rounds), "--params", str(arguments.params)]
    command += ["--folder", str(folder), "--store", str(folder / "store"), "--rows", str(rows)]
    command += ["--contenders", *chosen]
    base = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    ranks = [
        subprocess.Popen(command, env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(WORLD)
    ]
    codes = [process.wait() for process in ranks]
    if any(codes):
        raise SystemExit(f"ranks ended with exit codes {codes}")
    found: list[dict[str, Any]] = json.loads(rows.read_text())
    return found


if __name__ == "__main__":
    sys.exit(main())
