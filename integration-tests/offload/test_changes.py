"""Whatever else is done to a model: with its state on disk it is the same to the bit as without."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from ds_core import JointOptimizer, ShardedOptimizer, checkpoint_blocks
from ds_core.ground.mesh import Topology
from ds_core.testing.distributed import distributed
from ds_offload import TieredStore
from ds_zero import (
    EMA,
    Zero,
    compile_blocks,
    full_grad,
    full_optimizer_state,
    full_tensor,
    gather,
    load_pretrained,
    no_sync,
    replan,
    set_full_grad,
    set_full_optimizer_state,
    set_full_tensor,
)

sys.path.insert(0, str(Path(__file__).parent))

stages = pytest.mark.parametrize("stage", [0, 1, 3])


def pair(stage: int, folder: Path, case: str = "wide", policy: str = "nvme", **more: Any) -> list[Any]:
    """The same run twice: without a store, and with."""
    from pair import ALL_CASES, CHUNK, POLICIES, start

    store = TieredStore(nvme=str(folder), chunk_numel=CHUNK, **POLICIES[policy])
    return [start(ALL_CASES[case], stage, store=each, **more) for each in (None, store)]


def same(runs: Sequence[Any], when: str) -> None:
    from pair import hold_equal

    hold_equal(*runs, when)


def train(runs: Sequence[Any], steps: Sequence[int], when: str) -> None:
    for step in steps:
        for run in runs:
            run.step(step)
        same(runs, f"{when}, step {step}")


def change(runs: Sequence[Any], fn: Callable[[Any], object]) -> None:
    for run in runs:
        torch.manual_seed(5)
        fn(run)


@stages
@pytest.mark.parametrize("policy", ["nvme", "mixed"])
@distributed(2)
def test_a_model_that_changes(stage: int, policy: str, tmp_path: Path) -> None:
    """Frozen, thawed, a head that grows inside `gather`, a module that comes and one that goes."""
    runs = pair(stage, tmp_path, policy=policy)
    store = runs[1].store
    train(runs, [0, 1], "before")
    change(runs, lambda run: run.model.blocks[0].requires_grad_(False))
    train(runs, [2, 3], "frozen")
    change(runs, lambda run: run.model.blocks[0].requires_grad_(True))
    train(runs, [4, 5], "thawed, with its states")

    def widen(run: Any) -> None:
        with gather(run.model.head, write=0):
            old, new = run.model.head, nn.Linear(64, 4)
            with torch.no_grad():
                new.weight.copy_(old.weight * 2)
            run.model.head.weight = nn.Parameter(new.weight.detach())
        run.sharded.optimizer.add_param_group({"params": [run.model.head.weight], "lr": 0.05})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # between the two lines the new weight is in no optimizer
        change(runs, widen)
    train(runs, [6, 7], "a new head")

    def add(run: Any) -> None:
        run.model.blocks.append(type(run.model.blocks[0])(64, 128))
        run.sharded.optimizer.add_param_group({"params": list(run.model.blocks[-1].parameters())})
        replan(run.model)

    change(runs, add)
    train(runs, [8, 9], "another block")
    before = sum(store.bytes_by_tier().values())
    change(runs, lambda run: run.model.blocks.__delitem__(0))
    train(runs, [10, 11], "one block less")
    assert sum(store.bytes_by_tier().values()) < before
    assert store.volume.used == sum(-(-h.file_bytes // 4096) * 4096 for h in store._homes.values())
    for run in runs:
        run.close()


@stages
@distributed(2)
def test_looking_and_writing(stage: int, tmp_path: Path) -> None:
    """full_tensor, full_grad, full_optimizer_state, their setters, and gather(write=)."""
    runs = pair(stage, tmp_path, dtype=torch.bfloat16)
    train(runs, [0], "before")
    names = [name for name, _ in runs[0].model.named_parameters()]

    def everything(run: Any) -> dict[str, Tensor | None]:
        found: dict[str, Tensor | None] = {}
        for name in names:
            param = run.model.get_parameter(name)
            found[name] = full_tensor(param)
            found[f"{name} master"] = full_tensor(param, master=True)
            found[f"{name} grad"] = full_grad(param)
            for state in ("exp_avg", "exp_avg_sq", "step"):
                found[f"{name} {state}"] = full_optimizer_state(run.sharded, param, state)
        return found

    def look() -> None:
        one, other = map(everything, runs)
        for name, value in one.items():
            theirs = other[name]
            assert (value is None) == (theirs is None), name
            assert value is None or torch.equal(value, theirs), name  # type: ignore[arg-type]

    look()
    for run in runs:
        run.backward(1)
    look()

    def write(run: Any) -> None:
        param = run.model.blocks[0].up.weight
        set_full_grad(param, full_grad(param) * 3)  # type: ignore[operator]
        set_full_tensor(param, full_tensor(param, master=True) + 0.125)
        state = full_optimizer_state(run.sharded, param, "exp_avg")
        set_full_optimizer_state(run.sharded, param, "exp_avg", state * 0.5)  # type: ignore[operator]
        with gather(run.model.head, write=1), torch.no_grad():
            run.model.head.weight.add_(1.0 + dist.get_rank())

    change(runs, write)
    look()
    norms = [run.finish(max_norm=0.1) for run in runs]  # of the gradient as it was written
    assert norms[0] == norms[1]
    same(runs, "after writing")
    look()
    train(runs, [2, 3], "afterwards")
    for run in runs:
        run.close()


@stages
@distributed(2)
def test_an_average_of_masters_that_are_elsewhere(stage: int, tmp_path: Path) -> None:
    runs = pair(stage, tmp_path, dtype=torch.bfloat16)
    averages = [EMA(run.model, 0.5) for run in runs]
    for step in range(3):
        train(runs, [step], "followed")
        with averages[0].applied(), averages[1].applied():
            same(runs, f"the average after step {step}")
        same(runs, f"masters again after step {step}")
    for run in runs:
        run.close()


def two(params: list[nn.Parameter]) -> JointOptimizer:
    return JointOptimizer(
        [torch.optim.AdamW(params[::2], lr=1e-2), torch.optim.SGD(params[1::2], lr=0.05, momentum=0.9)]
    )


@stages
@distributed(2)
def test_several_optimizers_as_one_and_apart(stage: int, tmp_path: Path) -> None:
    runs = pair(stage, tmp_path, make=two, bucket_numel=10**6)
    train(runs, [0, 1, 2], "joined")
    for run in runs:
        run.close()
    both = pair(
        stage, tmp_path, make=lambda params: torch.optim.AdamW(params[::2], lr=1e-2), bucket_numel=10**6
    )
    others = []
    for run in both:
        stepped = {id(p) for p in run.sharded.held.members[0]}
        rest = [param for param in run.model.parameters() if id(param) not in stepped]
        others.append(ShardedOptimizer(torch.optim.SGD(rest, lr=0.05, momentum=0.9), run.owner))
    for step in range(4):
        for run, other in zip(both, others, strict=True):
            run.backward(step)
            if step == 1:  # one of the two gives its gradients up: they must not arrive afterwards
                other.zero_grad()
            run.backward(step + 50)
            run.sharded.optimizer.step()
            if step != 2:
                other.optimizer.step()
            run.sharded.zero_grad()
            other.zero_grad()
        same(both, f"apart, step {step}")
        for piece, twin in zip(others[0].pieces, others[1].pieces, strict=True):
            mine, theirs = others[0].optimizer.state[piece.param], others[1].optimizer.state[twin.param]
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for run in both:
        run.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("policy", ["nvme", "mixed", "grads"])
@distributed(3)
def test_micro_batches_with_and_without_no_sync(stage: int, policy: str, tmp_path: Path) -> None:
    """Three ranks: a mean over them is no exact scaling, so sums must be made in the same way."""
    for held in (False, True):
        runs = pair(stage, tmp_path, policy=policy)
        for step in range(2):
            for run in runs:
                for micro in range(3):
                    with no_sync(run.model) if held and micro < 2 else nullcontext():
                        run.backward(10 * step + micro)
                run.sharded.show_grads()
            same(runs, f"gradients, held {held}, step {step}")
            for run in runs:
                run.finish(0.1)
            same(runs, f"held {held}, step {step}")
        for run in runs:
            run.close()


@pytest.mark.parametrize(("stage", "second"), [(1, False), (2, False), (3, False), (3, True)])
@pytest.mark.parametrize("policy", ["nvme", "mixed"])
@distributed(4)
def test_two_nodes_of_two_ranks(stage: int, second: bool, policy: str, tmp_path: Path) -> None:
    """HSDP, and hpZ with a second shard inside each node; the norm counts what other nodes added."""
    mesh = Topology(dp_replicate=2, dp_shard=2).build()
    for dtype in (None, torch.bfloat16):
        runs = pair(stage, tmp_path, policy=policy, mesh=mesh, dtype=dtype, secondary_shard=second)
        for step in range(3):
            norms = [run.step(step, accumulate=1 + step % 2, max_norm=0.1) for run in runs]
            assert norms[0] == norms[1]
            same(runs, f"{dtype}, step {step}")
        for run in runs:
            run.close()


@pytest.mark.parametrize("stage", [1, 3])
@distributed(2)
def test_parameters_that_stay_in_fp32_and_units_that_stay_whole(stage: int, tmp_path: Path) -> None:
    more = {"keep_fp32": ("*norm*",), "bucket_numel": 500}
    if stage == 3:
        more["persist_numel"] = 400
    runs = pair(stage, tmp_path, dtype=torch.bfloat16, **more)
    train(runs, [0, 1, 2], "mixed precision")
    assert len({unit.dtype for unit in runs[1].owner.units}) == 2
    for run in runs:
        run.close()


def fill(module: nn.Module) -> None:
    for number, param in enumerate(module._parameters.values()):
        if param is not None:
            with torch.no_grad():
                param.copy_(torch.linspace(-0.3 - number, 0.3, param.numel()).view(param.shape) / 4)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("policy", ["nvme", "mixed"])
@distributed(2)
def test_models_that_were_never_whole(stage: int, policy: str, tmp_path: Path) -> None:
    """Built on meta and filled as units are cut; then the weights of a directory are read into the shards."""
    from pair import ALL_CASES

    stored = {
        name: torch.randn(param.shape, generator=torch.Generator().manual_seed(number))
        for number, (name, param) in enumerate(ALL_CASES["wide"].build().named_parameters())
    }
    folder = tmp_path / f"weights-{dist.get_rank()}"
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    runs = []
    for _ in range(2):
        with torch.device("meta"):
            model = ALL_CASES["wide"].build()
        runs.append(model)
    with_store = []
    for model, run in zip(runs, (False, True), strict=True):
        from pair import CHUNK, POLICIES, start

        store = TieredStore(nvme=str(tmp_path), chunk_numel=CHUNK, **POLICIES[policy]) if run else None
        with_store.append(
            start(ALL_CASES["wide"], stage, store=store, model=model, initializer=fill, dtype=torch.bfloat16)
        )
    same(with_store, "filled")
    train(with_store, [0, 1], "from meta")
    for each in with_store:
        load_pretrained(each.model, folder)
    same(with_store, "loaded")
    train(with_store, [2, 3], "loaded")
    for each in with_store:
        each.close()


@pytest.mark.parametrize("stage", [1, 3])
@distributed(2, timeout=120.0)
def test_compiled_and_recomputed_blocks(stage: int, tmp_path: Path) -> None:
    runs = pair(stage, tmp_path, case="tied")
    for run in runs:
        compile_blocks(run.model, backend="aot_eager", fullgraph=True)
        checkpoint_blocks(run.model)
    train(runs, [0, 1, 2], "compiled and recomputed")
    for run in runs:
        run.close()


def one_store(stage: int, folder: Path) -> Iterator[str]:
    """What is wrong with a second model on a store."""
    from pair import ALL_CASES, POLICIES

    store = TieredStore(nvme=str(folder), **POLICIES["nvme"])
    Zero(stage=stage).shard(ALL_CASES["mlp"].build(), store=store)  # type: ignore[arg-type]
    try:
        Zero(stage=stage).shard(ALL_CASES["mlp"].build(), store=store)  # type: ignore[arg-type]
    except ValueError as error:
        yield str(error)


@distributed(1)
def test_one_store_serves_one_model(tmp_path: Path) -> None:
    assert list(one_store(1, tmp_path)) == [
        "the store already holds 'inp.weight/master'; one store serves one model"
    ]
