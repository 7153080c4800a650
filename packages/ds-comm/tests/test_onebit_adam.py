"""1-bit Adam at stage 0: its phases, its bytes, what it refuses, and gradients that are no numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_comm import MomentumWire, OnebitAdam, VarianceTest
from ds_core import NonFiniteError, ReplicatedOwner, ShardedOptimizer, clip_grad_norm_
from ds_core.testing.distributed import distributed, run_ranks
from ds_core.testing.models import CASES


def adam(model: nn.Module, **settings: Any) -> OnebitAdam:
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "freeze_step": 2, **settings}
    return OnebitAdam(settings.pop("params", model.parameters()), **settings)


def join(model: nn.Module, optimizer: Any, **options: Any) -> ReplicatedOwner:
    owner = ReplicatedOwner(model, reduce=optimizer.route, **options)
    ShardedOptimizer(optimizer, owner)
    return owner


def train(case: str, model: nn.Module, optimizer: Any, seed: int, *, step: bool = True) -> None:
    batch = CASES[case].rank_batch(seed, dist.get_rank(), dist.get_world_size())
    torch.stack(CASES[case].losses(model, batch)).sum().backward()
    if step:
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("decoupled", [True, False])
@distributed(world_size=2)
def test_the_warm_up_is_torchs_adam_to_the_bit(decoupled: bool) -> None:
    found = []
    for onebit in (True, False):
        model = CASES["unused"].build()
        if onebit:
            optimizer: Any = adam(model, weight_decay=0.1, decoupled_weight_decay=decoupled, freeze_step=9)
            join(model, optimizer)
        else:
            kind = torch.optim.AdamW if decoupled else torch.optim.Adam
            optimizer = kind(model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
            ShardedOptimizer(optimizer, ReplicatedOwner(model))
        for step in range(4):
            train("unused", model, optimizer, step)
        found.append(values(model))
    assert same(*found)


@distributed(world_size=2)
def test_all_ranks_hold_the_same_bits_and_they_are_not_adams(rank: int) -> None:
    model = CASES["mlp"].build()
    optimizer = adam(model)
    join(model, optimizer)
    other = CASES["mlp"].build()
    plain = torch.optim.AdamW(other.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0)
    ShardedOptimizer(plain, ReplicatedOwner(other))
    for step in range(5):
        train("mlp", model, optimizer, step)
        train("mlp", other, plain, step)
        assert same(values(model), values(other)) == (step < 2)
    for value in values(model).values():
        theirs = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(theirs, value)
        assert torch.equal(*theirs)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 1 << 16))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).square().mean()


@pytest.mark.parametrize("world", [2, 4])
def test_the_bytes_are_those_of_the_formula(world: int) -> None:
    """2 (world - 1) (n / 8 + 4 n / 2048) / world, against 8 n (world - 1) / world: 31.5 times less."""
    for warm, signs in run_ranks(count_bytes, world):
        n = 1 << 16
        assert warm == 8 * n * (world - 1) // world
        assert signs == 2 * (world - 1) * (n // 8 + 4 * n // 2048) // world
        assert warm / signs > 26


def count_bytes(rank: int) -> tuple[int, int]:
    torch.manual_seed(0)
    model = Wide()
    optimizer = adam(model, freeze_step=1)
    owner = join(model, optimizer)
    reduced, hops = [], []
    for step in range(2):
        owner.mesh.log.clear()
        model(torch.full((1 << 16,), 1.0 + rank + step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        sent = owner.mesh.log.sent_bytes
        reduced.append(sum(bytes_ for (_, op), bytes_ in sent.items() if op == "all_reduce"))
        hops.append(sum(bytes_ for (_, op), bytes_ in sent.items() if op in ("all_to_all", "all_gather")))
    assert hops[0] == 0
    return reduced[0] - reduced[1], hops[1]  # what is reduced in both is what ranks agree on


@distributed(world_size=2)
def test_groups_inside_one_unit_keep_their_own_settings() -> None:
    """Two groups in one unit equal two units of one group each."""
    found = []
    for apart in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
        groups = [
            {"params": model[0].parameters(), "lr": 1e-2, "betas": (0.5, 0.99)},
            {"params": model[1].parameters(), "lr": 3e-2, "weight_decay": 0.1},
        ]
        optimizer = adam(model, params=groups, wire=MomentumWire(block=128), decoupled_weight_decay=False)
        owner = join(model, optimizer, bucket_numel=1 if apart else 10_000)
        assert len(owner.trainable) == (2 if apart else 1)
        for step in range(5):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(values(model))
    assert same(*found)


@pytest.mark.parametrize("preconditioned", [True, False])
@distributed(world_size=2)
def test_masked_momentum_stays_zero_and_what_never_had_a_gradient_stays(preconditioned: bool) -> None:
    """Rows of an embedding that no token asks for do not move, masked or not."""
    torch.manual_seed(0)
    model = nn.Embedding(6, 16)
    mask = torch.ones(6, 1)
    mask[2] = 0
    optimizer = adam(model, wire=MomentumWire(None, preconditioned=preconditioned, masks={"weight": mask}))
    join(model, optimizer)
    before = model.weight.detach().clone()
    for step in range(6):
        tokens = torch.tensor([0, 1, 2, 3])
        (model(tokens).square().sum() * (1 + step + dist.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            at_freeze = model.weight.detach().clone()
    (state,) = optimizer.state.values()
    moved = (model.weight.detach() != at_freeze).all(dim=1)
    assert moved.tolist() == [True, True, False, True, False, False]
    assert not state["exp_avg"][2].any()
    assert state["exp_avg"][4].any() != preconditioned  # one bit says + or -, never 0
    assert torch.equal(model.weight[4:], before[4:])
    saved = optimizer.route.state_dict()
    error: Any = saved["error/weight"]
    assert not error.local.view(6, 16)[2].any()


@distributed(world_size=2)
def test_masks_by_parameter_and_bad_ones() -> None:
    model = nn.Embedding(6, 16)
    adam(model)
    for masks, wanted in (
        ({"wight": torch.ones(6, 1)}, "wight.*did you mean.*weight"),
        ({"weight": torch.ones(5, 1)}, r"\(5, 1\).*\(6, 16\)"),
    ):
        with pytest.raises((LookupError, ValueError), match=wanted):
            join(model, adam(model, wire=MomentumWire(masks=masks)))
        model = nn.Embedding(6, 16)
    optimizer = adam(model, wire=MomentumWire(masks={model.weight: torch.zeros(6, 1)}), freeze_step=1)
    join(model, optimizer)
    before = None
    for _ in range(3):
        model(torch.arange(6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert before is None or torch.equal(before, model.weight)
        before = model.weight.detach().clone()


@distributed(world_size=2)
def test_clipping_bounds_the_step_and_leaves_the_momentum() -> None:
    found = []
    for clip in (False, True):
        model = CASES["mlp"].build()
        optimizer = adam(model)
        owner = join(model, optimizer)
        for step in range(2):
            train("mlp", model, optimizer, step)
        before = values(model)
        train("mlp", model, optimizer, 2, step=False)
        owner.drain()
        momenta = {p: s["exp_avg"].clone() for p, s in optimizer.state.items()}
        if clip:
            norm = float(clip_grad_norm_(optimizer, 1e-3))
            together = torch.cat([m.view(-1) for m in momenta.values()]).double().norm()
            assert norm == pytest.approx(float(together), rel=1e-6)
        optimizer.step()
        assert all(torch.equal(optimizer.state[p]["exp_avg"], m) for p, m in momenta.items())
        found.append(torch.cat([(values(model)[n] - before[n]).view(-1) for n in before]))
    assert torch.allclose(found[1], found[0] * (1e-3 / norm), rtol=1e-3, atol=1e-7)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("bad_rank", [0, 1])
@distributed(world_size=2)
def test_what_is_not_finite_is_never_sent(bad_rank: int, rank: int) -> None:
    model = CASES["mlp"].build()
    optimizer = adam(model)
    owner = join(model, optimizer)
    for step in range(3):
        train("mlp", model, optimizer, step)
    before, momenta = values(model), [s["exp_avg"].clone() for s in optimizer.state.values()]
    handle = model.head.weight.register_hook(lambda g: g * float("nan") if rank == bad_rank else g)
    wanted = "this rank's gradient of head.weight" if rank == bad_rank else "another rank's gradient"
    with pytest.raises(NonFiniteError, match=f"rank {rank}: {wanted}"):
        train("mlp", model, optimizer, 3)
    handle.remove()
    optimizer.zero_grad()
    assert same(before, values(model))
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(optimizer.state.values(), momenta, strict=True))
    train("mlp", model, optimizer, 4)
    assert all(bool(torch.isfinite(value).all()) for value in values(model).values())
    assert not same(before, values(model))
    assert owner.trainable


@distributed(world_size=2)
def test_late_gradients_join_the_same_momentum() -> None:
    """A step of one micro batch more than the one before: what came late is added, not mixed in twice."""
    model = CASES["mlp"].build()
    optimizer = adam(model, freeze_step=1)
    owner = join(model, optimizer)
    train("mlp", model, optimizer, 0)
    train("mlp", model, optimizer, 1)
    before = [s["exp_avg"].clone() for s in optimizer.state.values()]
    train("mlp", model, optimizer, 2, step=False)  # guessed to be the last, and reduced
    train("mlp", model, optimizer, 3, step=False)
    owner.drain()
    for unit in owner.trainable:
        assert unit.gradient is not None
    seen = torch.cat([unit.gradient[: unit.layout.used_numel] for unit in owner.trainable])
    kept = torch.cat([s["exp_avg"].view(-1) for s in optimizer.state.values()])
    assert torch.equal(seen, kept)
    assert not torch.equal(kept, torch.cat([m.view(-1) for m in before]))


@pytest.mark.parametrize("spoilt", [False, True])
@distributed(world_size=2)
def test_the_variance_test_ends_the_warm_up_everywhere_at_once(spoilt: bool, rank: int) -> None:
    """Gradients of one size: bias-corrected |v| is at rest at once. Growing ones: never."""
    model = Wide()
    rule = VarianceTest(window=3, at_least=5)
    optimizer = adam(model, freeze_step=rule, lr=0.0)
    join(model, optimizer)
    frozen = []
    for step in range(8):
        (model(torch.full((1 << 16,), 1.0 + rank)) * (2.0**step if spoilt else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        frozen.append(optimizer.frozen)
    assert frozen == ([False] * 8 if spoilt else [False] * 4 + [True] * 4)


def test_the_window_is_what_the_variance_remembers() -> None:
    assert VarianceTest().steps(0.999) == 1000
    assert VarianceTest(window=7).steps(0.999) == 7
    assert VarianceTest(window=2).has_come_to_rest([1.0, 5.0, 0.97], 0.9)
    assert VarianceTest(window=2).has_come_to_rest([0.97, 5.0, 1.0], 0.9)
    assert not VarianceTest(window=2).has_come_to_rest([0.9, 1.0, 1.0], 0.9)
    assert not VarianceTest(window=2).has_come_to_rest([1.0, 1.0], 0.9)


@pytest.mark.parametrize("freeze_step", [0, -3, 1.5, True, "soon"])
def test_a_warm_up_of_nothing_is_refused(freeze_step: Any) -> None:
    with pytest.raises(ValueError, match="freeze_step must be at least 1 step"):
        OnebitAdam([nn.Parameter(torch.zeros(2))], freeze_step=freeze_step)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: VarianceTest(threshold=1.0), "threshold"),
        (lambda: VarianceTest(window=0), "window"),
        (lambda: VarianceTest(at_least=-1), "at_least"),
        (lambda: MomentumWire(block=24), "multiple of 16"),
        (lambda: MomentumWire(norm="max"), '"l1" or "l2"'),  # type: ignore[arg-type]
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        make()


@distributed(world_size=2)
def test_a_route_that_was_not_joined_is_missed_at_the_first_step() -> None:
    model = CASES["mlp"].build()
    optimizer = adam(model)
    ShardedOptimizer(optimizer, ReplicatedOwner(model))
    with pytest.raises(RuntimeError, match=r"reduce=optimizer\.route"):
        train("mlp", model, optimizer, 0)


@distributed(world_size=2)
def test_another_optimizer_beside_it_is_refused() -> None:
    model = CASES["mlp"].build()
    first, *rest = model.parameters()
    optimizer, other = adam(model, params=rest), torch.optim.SGD([first], lr=0.1)
    owner = join(model, optimizer)
    ShardedOptimizer(other, owner)
    with pytest.raises(RuntimeError, match="SGD steps on the same model as OnebitAdam"):
        train("mlp", model, optimizer, 0)


@distributed(world_size=2)
def test_ranks_that_disagree_are_named(rank: int) -> None:
    for settings, wanted in (
        ({"freeze_step": 2 + rank}, "freeze_step is.*2.*on rank 0.*3.*on rank 1"),
        ({"wire": MomentumWire(block=16 << rank)}, "block is 16 on rank 0; 32 on rank 1"),
        ({"betas": (0.9, 0.99 - 0.1 * rank)}, "groups is"),
    ):
        model = CASES["mlp"].build()
        with pytest.raises(ValueError, match=wanted):
            join(model, adam(model, **settings))


@distributed(world_size=2)
def test_fp16_is_refused() -> None:
    model = CASES["mlp"].build()
    with pytest.raises(ValueError, match="is fp16, whose loss scale"):
        join(model, adam(model), dtype=torch.float16)
    model = CASES["mlp"].build().to(torch.bfloat16)
    with pytest.raises(ValueError, match="masters, and momenta need fp32 ones"):
        join(model, adam(model))


@distributed(world_size=2)
def test_no_element_moves_farther_than_adam_could_move_it() -> None:
    """A row that had one tiny gradient shares a scale with large ones: unbounded, it would be thrown away."""
    torch.manual_seed(0)
    model = nn.Embedding(4, 16)
    optimizer = adam(model, wire=MomentumWire(None, preconditioned=False), lr=1e-3)
    join(model, optimizer)
    for step in range(6):
        if step == 2:
            before = model.weight.detach().clone()
        rare = 1e-12 if step == 0 else 0.0
        out = model(torch.arange(4))
        (out[:3].square().sum() + (out[3] * rare).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = (model.weight.detach() - before).abs()
    (state,) = optimizer.state.values()
    free = state["exp_avg"][3] / (state["exp_avg_sq"][3].sqrt() + 1e-8)
    assert float(free.abs().min()) > 100.0  # what it would have been, in learning rates
    assert float(moved.max()) <= 4 * 1e-3 / (1 - 0.9**3) * (1 + 1e-6)
