"""`shard` on real ranks: wire volume, memory from live storages, looking, changing, failing."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_core.ground.accelerator import Accelerator
from ds_core.ground.codec import CastCodec
from ds_core.ground.mesh import Topology
from ds_core.state.owner import FlatOwner
from ds_core.state.unit import Whole
from ds_core.testing.distributed import distributed
from ds_core.testing.faults import DroppingCommunicator, SlowCommunicator
from ds_core.testing.models import CASES
from ds_core.testing.parity import Twin, assert_close_norm
from ds_core.train.optim import ShardedOptimizer
from ds_zero import Zero, clip_grad_norm_, full_tensor, shard


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def build(case: str, stage: int, **settings: object) -> tuple[nn.Module, ShardedOptimizer, FlatOwner]:
    """A case's model in small units, so that there are several; one of them stays for the backward."""
    model = CASES[case].build()
    optimizer = sgd(model)
    owner = Zero.model_validate({"stage": stage, "bucket_numel": 1, "keep_numel": 1, **settings}).shard(model)
    return model, ShardedOptimizer(optimizer, owner), owner


def train(case: str, model: nn.Module, seed: int, micro: int = 1) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for number in range(micro):
        batch = CASES[case].rank_batch(seed + number, rank, ranks)
        (torch.stack(CASES[case].losses(model, batch)).sum() / micro).backward()


def run_steps(case: str, model: nn.Module, optimizer: ShardedOptimizer, steps: int, micro: int = 1) -> None:
    for step in range(steps):
        train(case, model, 10 * step, micro)
        optimizer.step()
        optimizer.zero_grad()


def expected_after(case: str, steps: int, micro: int = 1, max_norm: float | None = None) -> dict[str, Tensor]:
    twin = Twin(CASES[case], sgd, ranks=dist.get_world_size(), zero_unused=False, max_norm=max_norm)
    for step in range(steps):
        twin.step([CASES[case].make_batch(10 * step + m, twin.ranks) for m in range(micro)])
    return twin.parameters()


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=2)
def test_training_equals_the_twin(stage: int) -> None:
    model, optimizer, _ = build("tied", stage)
    run_steps("tied", model, optimizer, 4, micro=2)
    assert_close_norm(whole_parameters(model), expected_after("tied", 4, micro=2), 1e-5)


@pytest.mark.parametrize("stage", [1, 3])
@distributed(world_size=2)
def test_clipping_equals_the_twin(stage: int) -> None:
    model, optimizer, _ = build("mlp", stage)
    for step in range(3):
        train("mlp", model, 10 * step)
        clip_grad_norm_(optimizer.optimizer, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert_close_norm(whole_parameters(model), expected_after("mlp", 3, max_norm=0.1), 1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=2)
def test_a_step_moves_what_the_paper_says(stage: int) -> None:
    """2 x Psi elements at stages 1 and 2. Stage 3: 3 x Psi less the last unit, which backward finds whole."""
    model, optimizer, owner = build("mlp", stage)
    for step in range(3):
        owner.mesh.log.clear()
        train("mlp", model, step)
        optimizer.step()
        optimizer.zero_grad()
    log = owner.mesh.log
    psi = sum(unit.layout.numel for unit in owner.units)
    reduced = log.elements["dp_shard", "reduce_scatter"]
    gathered = log.elements["dp_shard", "all_gather"]
    assert reduced == psi
    assert log.calls["dp_shard", "reduce_scatter"] == len(owner.units)
    if stage < 3:
        assert gathered == psi
        assert log.calls["dp_shard", "all_gather"] == len(owner.units)
    else:
        assert gathered == 2 * psi - owner.units[-1].layout.numel
        assert log.calls["dp_shard", "all_gather"] == 2 * len(owner.units) - 1


@distributed(world_size=2)
def test_a_unit_of_several_blocks_is_gathered_once_each_way(rank: int) -> None:
    model, optimizer, owner = build("mlp", 3, bucket_numel=300)
    assert [len(unit.plan.users) for unit in owner.units] == [3, 2]
    for step in range(2):
        owner.mesh.log.clear()
        train("mlp", model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert owner.mesh.log.calls["dp_shard", "all_gather"] == 3  # the last one stays for the backward


@pytest.mark.parametrize(("stage", "reduces"), [(1, 1), (2, 4)])
@distributed(world_size=2)
def test_stage_one_reduces_once_in_four_micro_batches(stage: int, reduces: int) -> None:
    model, optimizer, owner = build("mlp", stage)
    for step in range(3):
        owner.mesh.log.clear()
        train("mlp", model, 10 * step, micro=4)
        optimizer.step()
        optimizer.zero_grad()
    assert owner.mesh.log.calls["dp_shard", "reduce_scatter"] == reduces * len(owner.units)
    assert_close_norm(whole_parameters(model), expected_after("mlp", 3, micro=4), 1e-5)


@distributed(world_size=2)
def test_a_changing_number_of_micro_batches_is_followed(rank: int) -> None:
    """Stage 1 guesses the last micro batch from the step before; wrong guesses must cost bytes only."""
    model, optimizer, _ = build("mlp", 1)
    twin = Twin(CASES["mlp"], sgd, ranks=2, zero_unused=False)
    for step, micro in enumerate((1, 3, 2, 5, 1)):
        train("mlp", model, 10 * step, micro)
        optimizer.step()
        optimizer.zero_grad()
        twin.step([CASES["mlp"].make_batch(10 * step + m, 2) for m in range(micro)])
    assert_close_norm(whole_parameters(model), twin.parameters(), 1e-5)


def live_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the storages behind the tensors, each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def model_state_bytes(optimizer: ShardedOptimizer, owner: FlatOwner) -> dict[str, int]:
    """What a rank holds now, from storages, not from plans. Shared memory counts as parameters."""
    masters = [unit.master().tensor for unit in owner.trainable]
    params = [t for unit in owner.units for t in (unit.whole, unit.local)]
    moments = [t for state in optimizer.optimizer.state.values() for t in state.values() if t.dim()]
    return {
        "params": live_bytes(*params),
        "masters": live_bytes(*params, *masters) - live_bytes(*params),
        "grads": live_bytes(*[unit.gradient for unit in owner.trainable]),
        "moments": live_bytes(*moments),
    }


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=2)
def test_live_bytes_equal_the_formula(world: int, stage: int, dtype: str | None) -> None:
    model = CASES["mlp"].build()
    adam = torch.optim.AdamW(model.parameters())
    owner = Zero.model_validate({"stage": stage, "dtype": dtype, "bucket_numel": 1}).shard(model)
    optimizer = ShardedOptimizer(adam, owner)
    train("mlp", model, 0)
    owner.drain()
    numel = sum(unit.layout.numel for unit in owner.units)
    padding = numel - sum(p.numel() for p in model.parameters())
    assert padding < len(owner.units) * world * 8
    shard_bytes = 4 * numel // world
    assert model_state_bytes(optimizer, owner)["grads"] == shard_bytes
    optimizer.step()
    optimizer.zero_grad()
    size = 2 if dtype else 4
    found = model_state_bytes(optimizer, owner)
    assert found["params"] == size * numel // (world if stage == 3 else 1)
    assert found["masters"] == (shard_bytes if dtype else 0)
    used = sum(o.local[1] - o.local[0] for unit in owner.units for o in unit.layout.overlaps(unit.rank))
    assert found["moments"] == 2 * 4 * used
    assert found["grads"] == 0


@distributed(world_size=2)
def test_only_units_in_use_are_whole_at_stage_three(rank: int) -> None:
    model, _, owner = build("mlp", 3, prefetch_numel=0)
    most = []

    def count(*_: object) -> None:
        most.append(sum(unit.state is Whole.READY for unit in owner.units))

    for module in model.modules():
        module.register_forward_hook(count)
    train("mlp", model, 0)
    assert max(most) == 1
    assert all(unit.whole.untyped_storage().nbytes() == 0 for unit in owner.units)


@distributed(world_size=2)
def test_released_parameters_keep_their_shape_and_show_nan(rank: int) -> None:
    model, _, _ = build("mlp", 3)
    weight = model.get_parameter("head.weight")
    assert weight.shape == (4, 8)
    assert weight.numel() == 32
    with torch._C.DisableTorchFunctionSubclass():  # for code that goes around torch functions
        assert bool(torch.isnan(weight).all())
    assert torch.equal(full_tensor(weight), CASES["mlp"].build().get_parameter("head.weight"))


@pytest.mark.parametrize("stage", [1, 3])
@distributed(world_size=2)
def test_state_dict_is_whole_and_loads_back(stage: int) -> None:
    model, optimizer, owner = build("tied", stage, dtype="bfloat16")
    reference = CASES["tied"].build().state_dict()
    found = model.state_dict()
    assert found.keys() == reference.keys()
    for name, value in found.items():
        kept = reference[name] if name == "scale" else reference[name].bfloat16()
        assert torch.equal(value, kept), name
    model.load_state_dict({name: value * 2 for name, value in reference.items()})
    norm = model.get_parameter("norm.weight")
    assert torch.equal(full_tensor(norm).float(), reference["norm.weight"] * 2)
    train("tied", model, 0)
    optimizer.step()
    moved = full_tensor(norm).float() - reference["norm.weight"] * 2
    assert 0 < float(moved.abs().max()) < 0.5
    assert all(unit.state is not Whole.READY for unit in owner.units) == (stage == 3)


@distributed(world_size=2)
def test_the_model_stays_the_users_own(rank: int) -> None:
    model = CASES["mlp"].build()
    optimizer = sgd(model)
    weight = model.get_parameter("head.weight")
    same, still = shard(model, optimizer, stage=3)
    assert same is model
    assert still is optimizer
    assert model.get_parameter("head.weight") is weight
    assert type(model).__name__ == "Stack"
    with pytest.raises(ValueError, match="is sharded already"):
        shard(model, sgd(model), stage=2)


@pytest.mark.parametrize("how", ["optimizer", "model"])
@distributed(world_size=2)
def test_zero_grad_on_either_object_drops_everything(how: str) -> None:
    model, optimizer, _ = build("mlp", 2)
    train("mlp", model, 777)
    (optimizer if how == "optimizer" else model).zero_grad()
    run_steps("mlp", model, optimizer, 2)
    assert_close_norm(whole_parameters(model), expected_after("mlp", 2), 1e-5)


@distributed(world_size=2)
def test_gradients_add_up_when_nobody_zeroes_them(rank: int) -> None:
    """Plain torch keeps adding until zero_grad; so do shards."""
    model, optimizer, _ = build("mlp", 2)
    reference = CASES["mlp"].build()
    plain = sgd(reference)
    for step in range(2):
        train("mlp", model, step)
        optimizer.step()
        for part in range(2):
            batch = CASES["mlp"].rank_batch(step, part, 2)
            (CASES["mlp"].losses(reference, batch)[0] / 2).backward()
        plain.step()
    assert_close_norm(whole_parameters(model), {n: p.detach() for n, p in reference.named_parameters()}, 1e-5)


def _raise(*_: object) -> None:
    raise ArithmeticError("planted")


@pytest.mark.parametrize("stage", [1, 3])
@distributed(world_size=2)
def test_an_exception_in_forward_leaves_a_usable_owner(stage: int) -> None:
    model, optimizer, _ = build("mlp", stage)
    fail = model.get_submodule("blocks.1.up").register_forward_pre_hook(_raise)
    with pytest.raises(ArithmeticError):
        train("mlp", model, 0)
    fail.remove()
    run_steps("mlp", model, optimizer, 2)
    assert_close_norm(whole_parameters(model), expected_after("mlp", 2), 1e-5)


@distributed(world_size=2)
def test_an_exception_in_backward_is_said_at_the_step(rank: int) -> None:
    model, optimizer, _ = build("mlp", 3)
    batch = CASES["mlp"].rank_batch(0, rank, 2)
    (loss,) = CASES["mlp"].losses(model, batch)
    out = model.get_submodule("blocks.0")
    hook = out.register_full_backward_hook(_raise)
    (loss,) = CASES["mlp"].losses(model, batch)
    with pytest.raises(ArithmeticError):
        loss.backward()
    hook.remove()
    with pytest.raises(RuntimeError, match="a backward did not finish"):
        optimizer.step()
    optimizer.zero_grad()
    run_steps("mlp", model, optimizer, 2)
    assert_close_norm(whole_parameters(model), expected_after("mlp", 2), 1e-5)


@pytest.mark.parametrize("stage", [2, 3])
@distributed(world_size=2)
def test_evaluation_between_steps_changes_nothing(rank: int, stage: int) -> None:
    model, optimizer, owner = build("mlp", stage)
    for step in range(2):
        with torch.no_grad():
            model.eval()
            CASES["mlp"].losses(model, CASES["mlp"].rank_batch(5, rank, 2))
            model.train()
        train("mlp", model, 10 * step)
        optimizer.step()
        optimizer.zero_grad()
    assert_close_norm(whole_parameters(model), expected_after("mlp", 2), 1e-5)
    if stage == 3:
        assert all(unit.state is Whole.ABSENT for unit in owner.units)


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=2)
def test_slow_collectives_change_nothing(stage: int) -> None:
    """A missing wait would use bytes that are not there yet."""
    model, optimizer, owner = build("mlp", stage)
    owner.reducer._wire._comm = SlowCommunicator(owner.reducer._wire._comm, ms=3.0)
    owner.gatherer._comm = SlowCommunicator(owner.gatherer._comm, ms=3.0)  # type: ignore[attr-defined]
    run_steps("mlp", model, optimizer, 2)
    assert_close_norm(whole_parameters(model), expected_after("mlp", 2), 1e-5)


@pytest.mark.parametrize("stage", [1, 3])
@distributed(world_size=2)
def test_a_lossy_gather_rounds_what_is_computed_with_but_never_the_masters(stage: int) -> None:
    """Parameters are what bf16 carries, masters keep fp32: small steps must add up, not round away."""
    model = CASES["mlp"].build()
    owner = Zero(stage=stage, bucket_numel=1).shard(model, gather=CastCodec(torch.bfloat16))
    optimizer = ShardedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-7), owner)
    start = [unit.values().clone() for unit in owner.units]
    for step in range(3):
        train("mlp", model, step)
        optimizer.step()
        optimizer.zero_grad()
    moved = [float((unit.values() - before).norm()) for unit, before in zip(owner.units, start, strict=True)]
    assert all(0 < distance < 1e-4 for distance in moved)
    weight = full_tensor(model.get_parameter("head.weight"))
    assert torch.equal(weight, weight.bfloat16().float())


@distributed(world_size=2)
def test_a_dropped_bucket_is_noticed(rank: int) -> None:
    """The planted bug that the comparison with the twin must turn red."""
    model, optimizer, owner = build("mlp", 2)
    owner.reducer._wire._comm = DroppingCommunicator(owner.reducer._wire._comm, 1)
    run_steps("mlp", model, optimizer, 1)
    with pytest.raises(AssertionError, match=r"\|\|d\|\|"):
        assert_close_norm(whole_parameters(model), expected_after("mlp", 1), 1e-5)


@distributed(world_size=2)
def test_a_removed_wait_is_noticed(rank: int) -> None:
    """The other planted bug: a unit that claims to have arrived while its gather is still under way."""
    model, optimizer, owner = build("mlp", 3)
    gatherer = owner.gatherer  # type: ignore[attr-defined]
    gatherer._comm = SlowCommunicator(gatherer._comm, ms=20.0)
    expected = expected_after("mlp", 1)
    kept = []
    for unit in owner.units:
        arrive = unit.arrive

        def careless(ticket: object = None, arrive: object = arrive) -> None:
            kept.append(ticket)
            arrive()  # type: ignore[operator]

        unit.arrive = careless  # type: ignore[method-assign]
    run_steps("mlp", model, optimizer, 1)
    with pytest.raises(AssertionError, match=r"\|\|d\|\|"):
        assert_close_norm(whole_parameters(model), expected, 1e-5)


def test_paper_memory_in_a_world_of_sixty_four() -> None:
    """ZeRO's example: 7.5B parameters, 64 ranks: 31.4, 16.6 and 1.9 GB at stages 1 to 3, from storages."""
    dist.init_process_group("fake", rank=5, world_size=64)
    try:
        measured = {stage: _fake_model_states(stage) / 1e9 for stage in (1, 2, 3)}
    finally:
        dist.destroy_process_group()
        gc.collect()
    assert measured == pytest.approx({1: 31.4, 2: 16.6, 3: 1.9}, abs=0.06)


def _fake_model_states(stage: int) -> float:
    """Bytes of this rank's model states, scaled to 7.5e9 parameters, of a model on the meta device.

    Stage 1 is looked at before its gradients are reduced, the others after: that is what their rows count.
    """
    width, depth = 2048, 37
    with torch.device("meta"):
        layers = [nn.Linear(width, 48 * width, bias=False) for _ in range(depth)]
    model = nn.ModuleList(layers)
    adam = torch.optim.AdamW(model.parameters(), foreach=False)
    config = Zero(stage=stage, dtype="bfloat16", grad_dtype="bfloat16")
    owner = config.shard(model, Topology().build(Accelerator(torch.device("meta"))))
    ShardedOptimizer(adam, owner)
    x = torch.empty(1, width, device="meta", dtype=torch.bfloat16)
    torch.stack([layer(x).mean() for layer in model]).sum().backward()
    whole = [pending.bucket for pending in owner.reducer._pending]
    if stage > 1:
        owner.drain()
    masters = [unit.master().tensor for unit in owner.units]
    params = [t for unit in owner.units for t in (unit.whole, unit.local)]
    grads = [*whole, *[unit.gradient for unit in owner.units]]
    moments = 2 * live_bytes(*masters)  # AdamW's two states are allocated like the masters
    counted = live_bytes(*params) + live_bytes(*masters) + live_bytes(*grads) + moments
    return counted / sum(p.numel() for p in model.parameters()) * 7.5e9


@pytest.mark.parametrize(("keep", "gathers"), [(0, 2.0), (10**9, 1.0)])
@distributed(world_size=2)
def test_what_is_kept_for_the_backward_is_not_gathered_again(keep: int, gathers: float) -> None:
    model, optimizer, owner = build("mlp", 3, keep_numel=keep, prefetch_numel=0)
    run_steps("mlp", model, optimizer, 2)
    owner.mesh.log.clear()
    train("mlp", model, 20)
    psi = sum(unit.layout.numel for unit in owner.units)
    assert owner.mesh.log.elements["dp_shard", "all_gather"] == gathers * psi
    assert all(unit.state is Whole.ABSENT for unit in owner.units)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        CASES["mlp"].losses(model, CASES["mlp"].rank_batch(0, dist.get_rank(), 2))
    assert all(unit.state is Whole.ABSENT for unit in owner.units)
    assert_close_norm(whole_parameters(model), expected_after("mlp", 3), 1e-5)


def test_what_does_not_go_with_a_stage_is_refused_when_joined() -> None:
    for stage in (1, 2):
        with pytest.raises(
            ValueError, match=f"persist does not go with stage {stage}: its parameters are whole"
        ):
            Zero(stage=stage, persist_numel=100).shard(nn.Linear(3, 3))
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="gather codec does not go with stage 0"):
        shard(model, sgd(model), stage=0, gather=CastCodec(torch.bfloat16))
