"""Any optimizer, chunk by chunk, over state in memory and on disk: bit for bit what plain torch does."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_core import JointOptimizer, ReplicatedOwner, ShardedOptimizer
from ds_core.train.clip import clip_grad_norm_
from ds_kernels.muon import Muon
from ds_kernels.optim import FusedAdagrad, FusedAdamW, FusedLamb, FusedLion, FusedSGD
from ds_offload import TieredStore

CHUNK = 4096  # the smallest
TIERS = {
    "nvme": dict.fromkeys(("grads", "masters", "moments"), "nvme"),
    "host": dict.fromkeys(("grads", "masters", "moments"), "host"),
    "both": dict.fromkeys(("grads", "masters", "moments"), "0.5 host / 0.5 nvme"),
}


class Model(nn.Module):
    """11 864 elements in one unit: three chunks, cut inside of matrices; `idle` takes part only if asked."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 160)
        self.down = nn.Linear(160, 40)
        self.idle = nn.Linear(40, 3)
        self.scalar = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, *, all_of_it: bool = True) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x))) * self.scalar
        return self.idle(y) if all_of_it else y


def build() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model()


def batch(step: int) -> Tensor:
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(step))


@dataclass
class Both:
    """A plain model and one whose state is elsewhere, trained alike."""

    model: Model
    optimizer: Optimizer
    twin: Model
    plain: Optimizer
    store: TieredStore

    @property
    def sharded(self) -> ShardedOptimizer:
        return self._sharded

    def __post_init__(self) -> None:
        owner = ReplicatedOwner(self.model, store=self.store)
        self._sharded = ShardedOptimizer(self.optimizer, owner)

    def backward(self, step: int, *, all_of_it: bool = True) -> None:
        for model in (self.model, self.twin):
            model(batch(step), all_of_it=all_of_it).square().mean().backward()

    def step(self, step: int, *, all_of_it: bool = True) -> None:
        self.backward(step, all_of_it=all_of_it)
        for optimizer in (self.optimizer, self.plain):
            optimizer.step()
            optimizer.zero_grad()

    def train(self, steps: int) -> None:
        for step in range(steps):
            self.step(step)
        self.hold_equal()

    def hold_equal(self) -> None:
        """Weights, masters, states and options."""
        names = [name for name, _ in self.twin.named_parameters()]
        pieces = {piece.fqn: piece for piece in self.sharded.pieces}
        assert set(pieces) == set(names)
        for name in names:
            theirs, piece = self.twin.get_parameter(name), pieces[name]
            assert torch.equal(self.model.get_parameter(name), theirs), name
            values = piece.unit.values()[slice(*piece.overlap.local)]
            assert torch.equal(values.view(theirs.shape), theirs), name
            mine, expected = self.optimizer.state.get(piece.param, {}), self.plain.state.get(theirs, {})
            assert set(mine) == set(expected), name
            for state, value in expected.items():
                same = torch.equal(mine[state], value) if isinstance(value, Tensor) else mine[state] == value
                assert same, f"{name}/{state}"
        assert len(self.optimizer.state) == len(self.plain.state)
        for mine, expected in zip(self.optimizer.param_groups, self.plain.param_groups, strict=True):
            assert {**mine, "params": 0} == {**expected, "params": 0}


Make = Callable[[Model], Optimizer]


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Callable[..., Both]]:
    """Makes a pair: both(make_optimizer, tier)."""
    made: list[Both] = []

    def make(optimizer: Make, tier: str = "nvme", **settings: Any) -> Both:
        store = TieredStore(nvme=str(tmp_path), chunk_numel=CHUNK, **TIERS[tier], **settings)
        model, twin = build(), build()
        made.append(Both(model, optimizer(model), twin, optimizer(twin), store))
        return made[-1]

    yield make
    for pair in made:
        pair.store.close()


ELEMENTWISE: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "Adam of a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2)),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD with dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2, t0=1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "FusedAdamW": lambda p: FusedAdamW(p, lr=1e-2),
    "FusedAdagrad": lambda p: FusedAdagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "FusedSGD": lambda p: FusedSGD(p, lr=1e-2, momentum=0.9),
    "FusedLion": lambda p: FusedLion(p, lr=1e-3),
}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_every_elementwise_optimizer(both: Callable[..., Both], name: str, tier: str) -> None:
    pair = both(lambda model: ELEMENTWISE[name](model.parameters()), tier)
    pair.train(4)
    away = pair.store.bytes_by_tier()
    assert (away["nvme"] > 0) == (tier != "host")
    assert (away["host"] > 0) == (tier != "nvme")
    assert pair.sharded.elsewhere is not None
    assert len(pair.sharded.elsewhere.plan.chunks) == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 16])
def test_any_number_of_turns(both: Callable[..., Both], depth: int) -> None:
    both(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2), depth=depth).train(3)


def lamb(model: Model) -> Optimizer:
    return FusedLamb(model.parameters(), lr=1e-2)


def muon(model: Model) -> Optimizer:
    """Matrices to Muon, the rest to AdamW."""
    matrices = [param for param in model.parameters() if param.dim() == 2]
    rest = [param for param in model.parameters() if param.dim() != 2]
    return JointOptimizer([Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-2)])


@pytest.mark.parametrize("update", ["step", "speculative"])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("make", [lamb, muon])
def test_optimizers_that_see_whole_parameters(
    both: Callable[..., Both], make: Make, tier: str, update: str
) -> None:
    """Chunks end where parameters do, also where the owner may cut anywhere because it cuts nothing."""
    pair = both(make, tier, update=update)
    pair.train(3)
    if update != "step":
        return  # the plan is of what was not updated ahead
    ends = {0} | {piece.overlap.local[1] for piece in pair.sharded.pieces}
    assert pair.sharded.elsewhere is not None
    plan = pair.sharded.elsewhere.plan  # type: ignore[attr-defined]
    assert len(plan.chunks) > 1
    assert {chunk.begin for chunk in plan.chunks} <= ends


def test_several_groups_with_options_of_their_own(both: Callable[..., Both]) -> None:
    def grouped(model: Model) -> Optimizer:
        return torch.optim.AdamW(
            [
                {"params": [model.up.weight, model.idle.bias], "lr": 0.05, "weight_decay": 0.0},
                {"params": [model.down.weight, model.scalar], "betas": (0.5, 0.9)},
                {"params": [model.up.bias, model.down.bias, model.idle.weight], "weight_decay": 0.5},
            ],
            lr=1e-2,
        )

    pair = both(grouped)
    for step in range(4):
        for optimizer in (pair.optimizer, pair.plain):
            optimizer.param_groups[step % 3]["lr"] *= 0.5
        pair.step(step)
        pair.hold_equal()


def test_parameters_without_a_gradient_stay_and_get_their_states_later(both: Callable[..., Both]) -> None:
    """Their `step` counts from then on, beside older ones in the same unit."""
    pair = both(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2))
    for step, all_of_it in enumerate([False, False, True, False, True]):
        pair.step(step, all_of_it=all_of_it)
        pair.hold_equal()
    counts = {piece.fqn: int(pair.optimizer.state[piece.param]["step"]) for piece in pair.sharded.pieces}
    assert counts["idle.weight"] == 2
    assert counts["up.weight"] == 5


def test_a_step_without_any_gradient_changes_nothing(both: Callable[..., Both]) -> None:
    pair = both(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2))
    pair.train(1)
    for optimizer in (pair.optimizer, pair.plain):
        optimizer.step()
    pair.hold_equal()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ["AdamW", "FusedAdamW"])
def test_clipping(both: Callable[..., Both], name: str, tier: str) -> None:
    """torch's own clipping rounds the same way when it is given the same norm."""
    pair = both(lambda model: ELEMENTWISE[name](model.parameters()), tier)
    for step in range(3):
        pair.backward(step)
        norm = clip_grad_norm_(pair.optimizer, 0.01)
        theirs = [p.grad for p in pair.twin.parameters() if p.grad is not None]
        expected = torch.nn.utils.get_total_norm(theirs)
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
        coefficient = (0.01 / (norm + 1e-6)).clamp(max=1.0)
        if name == "FusedAdamW":  # multiplies as it reads
            pair.plain.clip_coef = coefficient  # type: ignore[attr-defined]
        else:
            torch._foreach_mul_(theirs, coefficient)
        for optimizer in (pair.optimizer, pair.plain):
            optimizer.step()
            optimizer.zero_grad()
        pair.hold_equal()


def test_what_scaled_one_step_does_not_scale_the_next(both: Callable[..., Both]) -> None:
    pair = both(lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    pair.backward(0)
    clip_grad_norm_(pair.optimizer, 1e-9)
    for optimizer in (pair.optimizer, pair.plain):
        optimizer.zero_grad()  # this batch is given up
    pair.train(2)


def test_gradients_of_several_backwards_add_up(both: Callable[..., Both]) -> None:
    pair = both(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2))
    for step in range(3):
        for micro in range(3):
            pair.backward(10 * step + micro, all_of_it=micro != 1)
        for optimizer in (pair.optimizer, pair.plain):
            optimizer.step()
            optimizer.zero_grad()
        pair.hold_equal()


class Overriding(torch.optim.AdamW):
    """A user's own optimizer that calls the one it extends, whose hooks torch then runs inside of its own."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["weight_decay"] = 0.3
        return super().step(closure)


def test_an_optimizer_whose_step_calls_another_step_is_stepped_once(both: Callable[..., Both]) -> None:
    both(lambda model: Overriding(model.parameters(), lr=1e-2)).train(3)


def test_states_that_a_checkpoint_of_torch_brought_are_gone_on_with(both: Callable[..., Both]) -> None:
    """The user's own `load_state_dict` puts every state into memory; they move to their homes."""
    pair = both(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2))
    pair.train(2)
    for optimizer in (pair.optimizer, pair.plain):
        state = optimizer.state_dict()
        copied = {
            "state": {
                key: {name: value.clone() for name, value in states.items()}
                for key, states in state["state"].items()
            },
            "param_groups": state["param_groups"],
        }
        for states in copied["state"].values():
            states["exp_avg"].mul_(3.0)
        optimizer.load_state_dict(copied)
    pair.train(3)
    for piece in pair.sharded.pieces:
        home = pair.store.home_of(f"{piece.unit.key}/exp_avg")
        if piece.fqn != "scalar":  # one number for the whole of it
            assert home is not None
            at = home.tensor[slice(*piece.overlap.local)]
            assert pair.optimizer.state[piece.param]["exp_avg"].data_ptr() == at.data_ptr()


@pytest.mark.parametrize("update", ["step", "speculative"])
def test_an_overflow_that_the_optimizer_found_changes_nothing(both: Callable[..., Both], update: str) -> None:
    pair = both(lambda model: FusedAdamW(model.parameters(), lr=1e-2), update=update)
    pair.train(1)
    for optimizer in (pair.optimizer, pair.plain):
        optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    pair.step(1)
    pair.hold_equal()
    for optimizer in (pair.optimizer, pair.plain):
        optimizer.found_inf = None  # type: ignore[attr-defined]
    pair.train(2)


def test_warnings_and_schedules_are_those_of_plain_torch(both: Callable[..., Both]) -> None:
    pair = both(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2))
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
        for optimizer in (pair.optimizer, pair.plain)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5):
            pair.step(step)
            for schedule in schedules:
                schedule.step()
            pair.hold_equal()


def test_a_closure_is_called_once_and_its_loss_comes_back(both: Callable[..., Both]) -> None:
    pair = both(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2))
    for step in range(3):
        found = []
        for model, optimizer in ((pair.model, pair.optimizer), (pair.twin, pair.plain)):
            calls = []

            def closure(
                model: Model = model,
                optimizer: Optimizer = optimizer,
                calls: list[int] = calls,
                at: int = step,
            ) -> Tensor:
                calls.append(1)
                optimizer.zero_grad()
                loss: Tensor = model(batch(at)).square().mean()
                loss.backward()
                return loss

            found.append(float(optimizer.step(closure).detach()))  # type: ignore[arg-type]
            assert calls == [1]
        assert found[0] == found[1]
        pair.hold_equal()


class Failing(torch.optim.SGD):
    """Raises in the middle of one step."""

    left = 10**9

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        type(self).left -= 1
        if type(self).left == 0:
            raise ArithmeticError("planted")
        for group in self.param_groups:
            group["lr"] *= 1.0
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param].setdefault("sum", torch.zeros_like(param)).add_(param.grad)
                    param.sub_(self.state[param]["sum"], alpha=group["lr"])
        return None


@pytest.mark.parametrize("update", ["step", "speculative"])
def test_an_optimizer_that_raises_leaves_its_groups_and_no_strangers(
    both: Callable[..., Both], update: str
) -> None:
    def make(model: Model) -> Optimizer:
        found = Failing(model.parameters(), lr=0.1)
        found.elementwise = True  # type: ignore[attr-defined]
        return found

    pair = both(make, update=update)
    pair.train(2)
    groups = [{**group, "params": list(map(id, group["params"]))} for group in pair.optimizer.param_groups]
    known = set(map(id, pair.optimizer.state))
    Failing.left = 2  # the second chunk
    pair.backward(2)
    with pytest.raises(ArithmeticError, match="planted"):
        pair.optimizer.step()
    Failing.left = 10**9
    assert groups == [
        {**group, "params": list(map(id, group["params"]))} for group in pair.optimizer.param_groups
    ]
    assert set(map(id, pair.optimizer.state)) == known
    assert pair.store.io is not None
    pair.store.settle()
    assert pair.store.io._engine.table.futures() == []


def test_a_model_and_its_store_that_nobody_holds_give_everything_back(tmp_path: Path) -> None:
    store = TieredStore(nvme=str(tmp_path), chunk_numel=CHUNK, **TIERS["nvme"])
    volume = store.volume
    assert volume is not None

    def train() -> None:
        model = build()
        optimizer = torch.optim.AdamW(model.parameters())
        sharded = ShardedOptimizer(optimizer, ReplicatedOwner(model, store=store))
        model(batch(0)).square().mean().backward()
        sharded.step()
        sharded.owner.units[0].dissolve()

    train()
    gc.collect()
    assert store.bytes_by_tier() == {"device": 0, "host": 0, "nvme": 0}
    assert volume.used == 0
    store.close()
