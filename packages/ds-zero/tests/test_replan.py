"""A model may change between any two steps: training goes on as the unsharded twin's does, bit for bit."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_core import CheckpointStore, JointOptimizer, ShardedOptimizer
from ds_core.ground.mesh import Mesh, Topology
from ds_core.state.owner import FlatOwner, ReplicatedOwner, owner_of
from ds_core.testing.distributed import distributed, run_ranks
from ds_core.testing.parity import assert_close_norm
from ds_core.train.clip import clip_grad_norm_
from ds_zero import Zero, full_grad, full_optimizer_state, full_tensor, gather, materialize, replan

RANKS = 2
SUMS = 1e-6  # two micro batches: four terms are summed in another order, each sum rounds by 6e-8
stages = pytest.mark.parametrize("stage", [0, 1, 3])


class Net(nn.Module):
    """An embedding, blocks of which each has a norm, and a head."""

    extra: nn.Linear
    noted: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)) for _ in range(3))
        self.head = nn.Linear(6, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        if hasattr(self, "extra"):
            x = x + self.extra(x)
        return self.head(x).float().square().mean()


Make = Callable[[Any], torch.optim.Optimizer]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


class Pair:
    """A sharded model and its twin; what is done to one is done to the other.

    The twin adds up each rank's loss / ranks, so its gradients are g0 / 2 + g1 / 2 where the ranks' sum is
    (g0 + g1) / 2: the same bits, as halving is exact. Hence everything below is compared bit for bit, but
    for the low precision model, whose twin would need masters of its own.
    """

    def __init__(
        self,
        rank: int,
        stage: int,
        make: Make,
        *,
        frozen: str | None = None,
        given: Any = None,
        mesh: Mesh | None = None,
        bucket: int = 40,
        **settings: Any,
    ) -> None:
        torch.manual_seed(0)
        self.rank, self.count = rank, 0
        self.ranks = mesh.world if mesh is not None else RANKS
        self.model = Net()
        for name, param in self.model.named_parameters():
            param.requires_grad_(frozen is None or frozen not in name)
        self.twin = copy.deepcopy(self.model)
        given = given or (lambda model: model.parameters())
        self.optimizer, self.reference = make(given(self.model)), make(given(self.twin))
        owner: FlatOwner
        if stage == 0:
            owner = ReplicatedOwner(self.model, bucket_numel=bucket)
        else:
            options = {"stage": stage, "bucket_numel": bucket, "keep_numel": 60, **settings}
            owner = Zero.model_validate(options).shard(self.model, mesh)
        self.owner = owner
        self.sharded = ShardedOptimizer(self.optimizer, owner)

    def both(self, change: Callable[[Any], object]) -> None:
        """`change` must draw no random numbers."""
        for model in (self.model, self.twin):
            change(model)

    def ids(self, rank: int) -> Tensor:
        return torch.randint(0, 11, (2, 4), generator=torch.Generator().manual_seed(10 * self.count + rank))

    def backward(self) -> None:
        self.model(self.ids(self.rank)).backward()
        for rank in range(self.ranks):
            (self.twin(self.ids(rank)) / self.ranks).backward()
        self.count += 1

    def step(self) -> None:
        for optimizer in (self.optimizer, self.reference):
            optimizer.step()
            optimizer.zero_grad()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.backward()
            self.step()
        self.compare()

    def compare(self, rtol: float = 0.0) -> None:
        mine = dict(self.model.named_parameters(remove_duplicate=False))
        found, wanted = {}, {}
        for name, twin in self.twin.named_parameters(remove_duplicate=False):
            assert mine[name].requires_grad == twin.requires_grad
            found[name], wanted[name] = full_tensor(mine[name]), twin.detach()
            for key, state in self.reference.state.get(twin, {}).items():
                if state.dim() > 0 and state.shape != twin.shape:
                    continue  # Adafactor's, which full_optimizer_state does not know
                kept = full_optimizer_state(self.sharded, mine[name], key)
                assert kept is not None, f"{name}/{key} is lost"
                found[f"{name}/{key}"], wanted[f"{name}/{key}"] = kept.view(state.shape), state
        assert mine.keys() <= wanted.keys()
        assert_close_norm(found, wanted, rtol)


def held_bytes(owner: FlatOwner) -> int:
    """Masters, shards, whole copies and gradients, each memory once."""
    found = {}
    for unit in owner.units:
        tensors = [unit.whole, unit.local, *unit.params]
        tensors += [unit.master().tensor] if unit.trainable else []
        tensors += [unit.gradient] if unit.gradient is not None else []
        with torch._C.DisableTorchFunctionSubclass():
            found |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def planned_bytes(owner: FlatOwner, stage: int) -> int:
    """bf16 once, whole or as this rank's shard; for what trains an fp32 master; at stage 3 a NaN to show."""
    total = 0
    for unit in owner.units:
        total += 2 * (unit.layout.numel if stage < 3 else unit.layout.shard_numel + 1)
        total += 4 * unit.layout.shard_numel if unit.trainable else 0
    return total


@pytest.mark.parametrize(
    ("make", "stage"), [*(("sgd", stage) for stage in range(4)), ("adamw", 1), ("adamw", 3)]
)
@distributed(RANKS)
def test_frozen_and_thawed_between_any_two_steps(rank: int, stage: int, make: str) -> None:
    pair = Pair(rank, stage, sgd if make == "sgd" else adamw)
    pair.train(2)
    pair.both(lambda model: model.blocks[1].requires_grad_(False))
    pair.train(3)
    assert not pair.owner.place(pair.model.blocks[1][0].weight)[0].trainable
    pair.both(lambda model: model.embed.requires_grad_(False))
    pair.both(lambda model: model.blocks[1][0].requires_grad_(True))  # with the momentum that it had
    pair.train(2)
    pair.both(lambda model: model.requires_grad_(True))
    pair.train(2)
    assert all(unit.trainable for unit in pair.owner.units)


@pytest.mark.parametrize("stage", [0, 3])
@distributed(RANKS)
def test_a_frozen_parameter_remembers_its_group(rank: int, stage: int) -> None:
    def groups(model: Net) -> list[dict[str, Any]]:
        return [
            {"params": model.blocks.parameters(), "lr": 0.3},
            {"params": [*model.head.parameters(), *model.embed.parameters()], "lr": 0.001},
        ]

    pair = Pair(rank, stage, sgd, frozen="blocks.2", given=groups)
    pair.train(1)
    pair.both(lambda model: model.requires_grad_(True))
    pair.train(2)
    assert [group["lr"] for group in pair.optimizer.param_groups] == [0.3, 0.001]


@pytest.mark.parametrize("stage", [2])
@distributed(RANKS)
def test_a_thawed_parameter_that_no_group_holds_is_said(rank: int, stage: int) -> None:
    pair = Pair(
        rank, stage, sgd, frozen="blocks.2", given=lambda m: [p for p in m.parameters() if p.requires_grad]
    )
    pair.train(1)
    pair.both(lambda model: model.blocks[2].requires_grad_(True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pair.train(2)  # in plain torch too it stays as it is
    assert len([w for w in caught if "blocks.2.0.weight" in str(w.message)]) == 1
    pair.optimizer.add_param_group({"params": pair.model.blocks[2].parameters(), "lr": 0.05})
    pair.reference.add_param_group({"params": pair.twin.blocks[2].parameters(), "lr": 0.05})
    pair.both(lambda model: model.zero_grad())
    pair.train(2)


def linear(fill: float) -> nn.Linear:
    layer = nn.Linear(6, 6)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-fill, fill, 36).view(6, 6))
        layer.bias.fill_(fill)
    return layer


@stages
@distributed(RANKS)
def test_modules_come_and_go(rank: int, stage: int) -> None:
    pair = Pair(rank, stage, adamw)
    pair.train(1)
    pair.both(lambda model: setattr(model, "extra", linear(0.1)))
    with torch.no_grad():
        pair.model.extra.bias.add_(rank)  # rank 0's values win
    pair.optimizer.add_param_group({"params": pair.model.extra.parameters(), "lr": 0.05})
    pair.reference.add_param_group({"params": pair.twin.extra.parameters(), "lr": 0.05})
    pair.train(2)
    weight = pair.model.blocks[0][0].weight
    wanted = full_tensor(weight)
    pair.both(lambda model: model.blocks.__delitem__(0))  # the others get new names
    pair.train(2)
    assert torch.equal(weight, wanted)  # an ordinary parameter again
    with pytest.raises(LookupError):
        owner_of(weight)
    pair.both(lambda model: delattr(model, "extra"))
    pair.train(1)


@stages
@distributed(RANKS)
def test_parameters_are_replaced_tied_and_resized(rank: int, stage: int) -> None:
    pair = Pair(rank, stage, sgd)
    pair.train(1)
    pair.both(lambda model: setattr(model.blocks[0][0], "weight", nn.Parameter(torch.eye(6) * 0.5)))
    for model, optimizer in ((pair.model, pair.optimizer), (pair.twin, pair.reference)):
        optimizer.add_param_group({"params": [model.blocks[0][0].weight]})
    pair.train(2)
    pair.both(lambda model: setattr(model.head, "weight", model.embed.weight))
    pair.train(2)
    assert len(pair.owner.place(pair.model.head.weight)[0].plan.users) >= 2

    def shrink(model: Net) -> None:
        model.blocks[1][0].weight.data = model.blocks[1][0].weight.data * 2  # other memory, the same shape
        model.blocks[2][0].bias = None

    if stage < 3:
        pair.both(shrink)
    else:
        with gather(pair.model):
            shrink(pair.model)
        shrink(pair.twin)
    pair.train(2)


@stages
@distributed(RANKS)
def test_gradients_that_wait_for_a_step_stay(rank: int, stage: int) -> None:
    pair = Pair(rank, stage, sgd, frozen="blocks.2", bucket=10**6)  # one unit: all of them move
    pair.backward()
    pair.both(lambda model: model.blocks[2].requires_grad_(True))
    pair.both(lambda model: model.blocks[0].requires_grad_(False))  # what it got so far is still applied
    pair.backward()
    found, wanted = full_grad(pair.model.blocks[0][0].weight), pair.twin.blocks[0][0].weight.grad
    assert found is not None
    assert wanted is not None
    assert_close_norm(found, wanted, SUMS)
    pair.step()
    pair.compare(SUMS)
    pair.backward()
    pair.both(lambda model: model.blocks[1].requires_grad_(False))  # between backward and step
    pair.step()
    pair.compare(SUMS)
    for _ in range(3):
        pair.backward()
        pair.step()
    pair.compare(SUMS)
    assert not pair.owner.place(pair.model.blocks[1][0].weight)[0].trainable


@stages
@distributed(RANKS)
def test_a_gradient_that_no_hook_saw_is_averaged_like_the_others(rank: int, stage: int) -> None:
    """The root's forward, where changes are noticed, is never called."""
    pair = Pair(rank, stage, sgd, frozen="blocks.2")
    pair.both(lambda model: model.blocks[2].requires_grad_(True))
    data = torch.randn(RANKS, 3, 6, generator=torch.Generator().manual_seed(1))
    pair.model.blocks[2](data[rank]).square().sum().backward()
    for share in data:
        (pair.twin.blocks[2](share).square().sum() / RANKS).backward()
    grad, expected = full_grad(pair.model.blocks[2][0].weight), pair.twin.blocks[2][0].weight.grad
    assert grad is not None
    assert expected is not None
    assert torch.equal(grad, expected)
    norm = clip_grad_norm_(pair.optimizer, 0.5)
    wanted = torch.nn.utils.clip_grad_norm_(pair.twin.parameters(), 0.5)
    torch.testing.assert_close(norm, wanted)
    pair.optimizer.step()
    pair.reference.step()
    found, twins = full_tensor(pair.model.blocks[2][0].weight), pair.twin.blocks[2][0].weight
    torch.testing.assert_close(found, twins.detach(), rtol=1e-6, atol=1e-7)  # the norm sums in another order


@pytest.mark.parametrize("stage", [2, 3])
@distributed(RANKS)
def test_masters_in_fp32_survive_and_frozen_ones_are_given_back(rank: int, stage: int) -> None:
    pair = Pair(rank, stage, adamw, dtype="bfloat16")
    for _ in range(2):
        pair.model(pair.ids(rank)).backward()
        pair.optimizer.step()
        pair.optimizer.zero_grad()
    masters = {name: full_tensor(p, master=True) for name, p in pair.model.named_parameters()}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in masters.values())
    assert held_bytes(pair.owner) == planned_bytes(pair.owner, stage)
    chosen = [name for name, _ in pair.model.named_parameters() if ".0." in name]
    for name in chosen:
        pair.model.get_parameter(name).requires_grad_(False)
    replan(pair.model)
    for name, param in pair.model.named_parameters():
        master = full_tensor(param, master=True)
        if name in chosen:
            assert master.dtype == torch.bfloat16
            assert torch.equal(master, masters[name].bfloat16())
        else:
            assert torch.equal(master, masters[name])
    assert {name for u in pair.owner.units if not u.trainable for name, _ in u.plan.params} == set(chosen)
    assert held_bytes(pair.owner) == planned_bytes(pair.owner, stage)


@pytest.mark.parametrize("stage", [1, 3])
@distributed(RANKS)
def test_states_of_other_shapes_move_with_their_parameter(rank: int, stage: int) -> None:
    """Adafactor's row and column sums are on the one rank that updates the whole matrix."""
    pair = Pair(rank, stage, lambda params: torch.optim.Adafactor(params, lr=0.01), cut="whole")
    pair.train(2)
    pair.both(lambda model: model.blocks[1].requires_grad_(False))
    pair.train(3)
    pair.both(lambda model: model.blocks[1].requires_grad_(True))
    pair.train(2)


@pytest.mark.parametrize("secondary", [False, True])
@distributed(4)
def test_with_replicas_of_the_shards(rank: int, secondary: bool) -> None:
    """HSDP, and hpZ: sums run in another order than the twin's."""
    mesh = Topology(dp_replicate=2, dp_shard=2).build()
    pair = Pair(rank, 3, sgd, mesh=mesh, bucket=10**6, secondary_shard=secondary)
    pair.backward()
    pair.both(lambda model: setattr(model, "extra", linear(0.1)))
    pair.both(lambda model: model.blocks[1].requires_grad_(False))
    for model, optimizer in ((pair.model, pair.optimizer), (pair.twin, pair.reference)):
        optimizer.add_param_group({"params": model.extra.parameters()})
    for _ in range(3):
        pair.backward()
        pair.step()
    pair.both(lambda model: model.blocks[1].requires_grad_(True))
    pair.backward()
    pair.step()
    pair.compare(SUMS)


@pytest.mark.parametrize("stage", [1, 3])
@distributed(RANKS)
def test_joined_optimizers_stay_joined(rank: int, stage: int) -> None:
    def joint(groups: Any) -> torch.optim.Optimizer:
        matrices, rest = groups
        return JointOptimizer([torch.optim.Adafactor(matrices, lr=0.01), adamw(rest)])

    def split(model: Net) -> list[list[nn.Parameter]]:
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
        return [matrices, [p for p in model.parameters() if all(p is not m for m in matrices)]]

    names = frozenset(f"blocks.{number}.0.weight" for number in range(3))
    pair = Pair(rank, stage, joint, given=split, cut=names)
    pair.train(2)
    pair.both(lambda model: model.blocks[1].requires_grad_(False))
    pair.both(lambda model: model.blocks.__delitem__(0))  # names in `cut` are old ones
    pair.train(3)
    pair.both(lambda model: model.blocks.requires_grad_(True))
    pair.train(2)
    assert pair.owner.place(pair.model.blocks[0][0].weight)[0].cut == "whole"


@pytest.mark.parametrize("stage", [1, 3])
@distributed(RANKS)
def test_a_module_without_bytes_is_filled_when_it_is_taken_in(rank: int, stage: int) -> None:
    pair = Pair(rank, stage, sgd)
    pair.train(1)
    torch.manual_seed(rank)
    for name in ("extra", "noted"):
        with torch.device("meta") if name == "extra" else materialize():
            setattr(pair.model, name, nn.Linear(6, 6))
            nn.init.constant_(getattr(pair.model, name).weight, 0.5)
        params = list(getattr(pair.model, name).parameters())
        assert all(param.is_meta for param in params)
        pair.optimizer.add_param_group({"params": params})
        pair.model(pair.ids(rank))
        setattr(pair.twin, name, nn.Linear(6, 6))
        pairs = zip(
            getattr(pair.model, name).parameters(), getattr(pair.twin, name).parameters(), strict=True
        )
        for mine, twin in pairs:
            assert not mine.is_meta
            twin.data = full_tensor(mine)
        pair.reference.add_param_group({"params": getattr(pair.twin, name).parameters()})
    assert float(pair.twin.extra.weight.detach().std()) > 0.1  # what a plain meta module was filled with
    assert bool((pair.twin.noted.weight == 0.5).all())
    pair.train(2)


@pytest.mark.parametrize("stage", [1, 3])
@distributed(RANKS)
def test_ranks_that_change_differently_are_told_where(rank: int, stage: int) -> None:
    pair = Pair(rank, stage, sgd)
    pair.train(1)
    pair.model.blocks[rank].requires_grad_(False)
    pair.model.extra = linear(0.1)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.0\.weight is .*requires_grad=True.* on rank 1"):
        pair.model(pair.ids(rank))
    pair.model.blocks.requires_grad_(True)
    del pair.model.extra
    pair.train(1)


@distributed(RANKS)
def test_a_rank_that_alone_changed_is_named_where_the_others_wait(rank: int) -> None:
    pair = Pair(rank, 1, sgd)
    pair.train(1)
    pair.backward()
    if rank == 1:
        pair.model.extra = linear(0.1)
    with pytest.raises(RuntimeError, match=r"extra\.weight is not there on rank 0 and .* on rank 1"):
        pair.optimizer.step()


@distributed(RANKS)
def test_changes_in_the_middle_are_refused(rank: int) -> None:
    pair = Pair(rank, 3, sgd)

    class Careless(nn.Module):
        def __init__(self, net: Net) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            replan(pair.model)
            return x

    pair.model.extra = Careless(Net())
    with pytest.raises(RuntimeError, match="while it was running"):
        pair.model(pair.ids(rank))
    with pytest.raises(LookupError, match="shard the model first"):
        replan(Net())
    fresh = Pair(rank, 1, sgd)
    fresh.optimizer.add_param_group({"params": [fresh.model.head.weight]})
    with pytest.raises(ValueError, match=r"head\.weight is in the optimizer's groups twice"):
        fresh.model(fresh.ids(rank))
    fresh.optimizer.param_groups.clear()
    with pytest.raises(ValueError, match="groups of a sharded optimizer are added, not removed"):
        fresh.model(fresh.ids(rank))


@distributed(RANKS)
def test_changes_inside_gather_are_taken_in_when_the_outermost_block_ends(rank: int) -> None:
    pair = Pair(rank, 3, sgd)
    pair.train(1)
    model = pair.model
    with gather(model, write=0):
        with torch.no_grad():
            model.head.weight.mul_(2)
        with gather(model.blocks[0]):
            model.blocks[0][0].weight.data = torch.full((6, 6), 0.25)
        with pytest.raises(RuntimeError, match="leave the block"):
            model(pair.ids(rank))
        assert bool((model.blocks[0][0].weight == 0.25).all())
    with torch.no_grad():
        pair.twin.head.weight.mul_(2)
        pair.twin.blocks[0][0].weight.fill_(0.25)
    pair.train(2)


@distributed(RANKS)
def test_a_graph_from_before_the_change_is_refused_where_its_weights_are_gone(rank: int) -> None:
    """At stages 1 and 2 its weights are still there, and so is its gradient."""
    for stage in (1, 3):
        pair = Pair(rank, stage, sgd, bucket=10**6, keep_numel=10**6)
        pair.train(1)
        old = pair.model(pair.ids(rank))
        pair.both(lambda model: setattr(model, "extra", linear(0.1)))
        pair.model(pair.ids(rank))
        if stage == 3:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                old.backward()
            pair.model.zero_grad()
        else:
            old.backward()
            pair.sharded.zero_grad()
        pair.train(1)


def saved_after_a_change(rank: int, stage: int, folder: str) -> None:
    pair = Pair(rank, stage, adamw)
    pair.train(1)
    pair.both(lambda model: setattr(model, "extra", linear(0.1)))
    pair.both(lambda model: model.blocks.__delitem__(0))
    pair.both(lambda model: model.embed.requires_grad_(False))
    for model, optimizer in ((pair.model, pair.optimizer), (pair.twin, pair.reference)):
        optimizer.add_param_group({"params": model.extra.parameters()})
    pair.train(2)
    store = CheckpointStore(folder)
    store.save(1, {"model": pair.owner, "optimizer": pair.sharded})
    fresh = Net()
    fresh.extra = nn.Linear(6, 6)
    del fresh.blocks[0]
    fresh.embed.requires_grad_(False)
    extra = {id(p) for p in fresh.extra.parameters()}
    trained = [p for p in fresh.parameters() if p.requires_grad and id(p) not in extra]
    optimizer = adamw([{"params": trained}, {"params": fresh.extra.parameters()}])
    owner = Zero(stage=3, bucket_numel=25).shard(fresh)
    sharded = ShardedOptimizer(optimizer, owner)
    store.load({"model": owner, "optimizer": sharded}, verify=True)
    pair.model, pair.optimizer, pair.owner, pair.sharded = fresh, optimizer, owner, sharded
    pair.twin.embed.weight.grad, pair.reference.state[pair.twin.embed.weight] = None, {}  # frozen: not saved
    pair.compare()
    pair.train(2)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_after_a_change_is_one_of_the_changed_model(stage: int, tmp_path: Path) -> None:
    run_ranks(saved_after_a_change, RANKS, stage=stage, folder=str(tmp_path))


@pytest.mark.parametrize("stage", [0, 3])
@distributed(RANKS)
def test_what_is_replaced_is_freed_and_so_is_the_model(rank: int, stage: int) -> None:
    pair = Pair(rank, stage, adamw, frozen="blocks.2")
    pair.train(1)
    old = [
        weakref.ref(pair.owner.hooks),
        weakref.ref(pair.owner.reducer),
        *map(weakref.ref, pair.owner.units),
    ]
    count = len(pair.model._forward_pre_hooks) + len(pair.model.blocks[0]._forward_pre_hooks)
    pair.both(lambda model: model.requires_grad_(True))
    pair.both(lambda model: setattr(model, "extra", linear(0.1)))
    pair.train(1)
    assert len(pair.model._forward_pre_hooks) + len(pair.model.blocks[0]._forward_pre_hooks) == count
    gc.collect()
    kept = {id(unit) for unit in pair.owner.units}
    assert [ref() for ref in old if ref() is not None and id(ref()) not in kept] == []
    dead = [weakref.ref(pair.model), weakref.ref(pair.optimizer), *map(weakref.ref, pair.model.parameters())]
    del pair
    gc.collect()
    assert [ref() for ref in dead] == [None] * len(dead)
