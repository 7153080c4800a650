"""ZenFlow on one rank: against a plain twin of the algorithm bit by bit; its limits, looks and faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_core.state.owner import ReplicatedOwner
from ds_core.train.clip import clip_grad_norm_
from ds_core.train.optim import ShardedOptimizer
from ds_kernels.optim import FusedAdamW
from ds_offload import TieredStore, ZenFlow
from ds_offload.zen_select import choose
from ds_offload.zen_update import ZenFlowUpdate

LR = 1e-2
Make = Callable[[Any], torch.optim.Optimizer]


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=0.1)


def fused(params: Any) -> torch.optim.Optimizer:
    return FusedAdamW(params, lr=LR, weight_decay=0.1)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3, momentum=0.9)


RULES: dict[str, Make] = {"adamw": adamw, "fused": fused, "sgd": sgd}


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(24, 33), nn.GELU(), nn.LayerNorm(33), nn.Linear(33, 16))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Some inputs matter more than others, so columns do."""
    source = torch.Generator().manual_seed(100 + step)
    x = torch.randn(12, 24, generator=source) * torch.linspace(0.1, 3, 24)
    return x, torch.stack([x[:, k : k + 8].sum(1) for k in range(16)], 1)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x, y = batch(step)
    return ((model(x.to(dtype)).float() - y) ** 2).mean()


def branching(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Two of four steps leave the last layer out."""
    if step % 4 < 2:
        return loss_of(model, step, dtype)
    assert isinstance(model, nn.Sequential)
    x, y = batch(step)
    return ((model[:3](x.to(dtype)).float()[:, :16] - y) ** 2).mean()


def store_settings(tier: str, folder: Path) -> dict[str, Any]:
    if tier == "host":
        return {"chunk_numel": 4096}
    return {"nvme": str(folder), "masters": tier, "moments": tier, "grads": tier, "chunk_numel": 4096}


@dataclass
class Run:
    """A model in training through a store."""

    flow: ZenFlow | None
    settings: dict[str, Any]
    make: Make = adamw
    dtype: torch.dtype | None = None
    clip: float | None = 0.5
    loss: Callable[..., Tensor] = loss_of
    model: nn.Sequential = field(default_factory=network)
    losses: list[float] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = self.make(self.model.parameters())
        self.store = TieredStore(zenflow=self.flow, **self.settings)
        self.owner = ReplicatedOwner(self.model, dtype=self.dtype, store=self.store, bucket_numel=500)
        self.sharded = ShardedOptimizer(self.optimizer, self.owner)

    def step(self, number: int) -> None:
        loss = self.loss(self.model, number, self.dtype or torch.float32)
        loss.backward()
        if self.clip is not None:
            self.norms.append(clip_grad_norm_(self.optimizer, self.clip))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def steps(self, begin: int, end: int) -> Run:
        for number in range(begin, end):
            self.step(number)
        return self

    @property
    def update(self) -> ZenFlowUpdate:
        found = self.sharded.elsewhere
        assert isinstance(found, ZenFlowUpdate)
        return found

    def masters(self) -> dict[str, Tensor]:
        found = {}
        for unit in self.owner.units:
            values = unit.values().detach()
            for slot in unit.layout.slots:
                found[slot.fqn] = values[slot.start : slot.end].view(slot.shape).clone()
        return found

    def states(self) -> dict[str, Tensor]:
        self.masters()
        return {
            f"{piece.fqn}/{name}": value.clone()
            for piece in self.sharded.pieces
            for name, value in self.optimizer.state[piece.param].items()
            if not name.startswith("zenflow")
        }


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    differ = [name for name in got if not torch.equal(got[name], wanted[name])]
    assert not differ


# -- the algorithm, written down plainly -------------------------------------------------------------------


@dataclass
class PlainParameter:
    master: Tensor
    states: dict[str, Tensor] = field(default_factory=dict)
    now: dict[str, Tensor] = field(default_factory=dict)  # numbers, such as the step
    later: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None  # of selected elements
    total: Tensor | None = None
    count: int = 0
    landing: tuple[Tensor, dict[str, Tensor], dict[str, Tensor]] | None = None


class PlainZenFlow:
    """Whole tensors, both updates computed everywhere, one chosen by a mask; no threads, no homes."""

    def __init__(
        self,
        flow: ZenFlow,
        make: Make,
        dtype: torch.dtype = torch.float32,
        loss: Callable[..., Tensor] = loss_of,
    ) -> None:
        self.flow, self.make, self.dtype, self.loss = flow, make, dtype, loss
        self.model = network()
        self.kept = {name: PlainParameter(p.detach().clone()) for name, p in self.model.named_parameters()}
        if self.dtype != torch.float32:
            self.model = self.model.to(self.dtype)
        self.number = self.filled = self.since = 0

    def rule(
        self, master: Tensor, states: dict[str, Tensor], numbers: dict[str, Tensor], grad: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        param = nn.Parameter(master.clone())
        optimizer = self.make([param])
        if states or numbers:
            known = {name: value.clone() for name, value in (states | numbers).items()}
            optimizer.state[param] = known
        param.grad = grad.clone()
        optimizer.step()
        state = optimizer.state[param]
        new = {name: value for name, value in state.items() if value.shape == master.shape}
        return param.detach(), new, {name: value for name, value in state.items() if name not in new}

    def step(self, number: int, norm: Tensor | None = None) -> float:
        loss = self.loss(self.model, number, self.dtype)
        loss.backward()
        grads = {name: p.grad.float() for name, p in self.model.named_parameters() if p.grad is not None}
        factor = torch.tensor(1.0)
        if norm is not None:  # as the other side summed it, in its own order
            mine = torch.stack([g.norm() for g in grads.values()]).norm()
            torch.testing.assert_close(norm, mine, rtol=1e-5, atol=0)
            factor = (0.5 / (norm + 1e-6)).clamp(max=1.0)
        self.number += 1
        warm = self.number <= self.flow.warmup
        self.filled += not warm
        closing = not warm and self.filled == self.flow.update_interval
        late = [
            k for name, k in self.kept.items() if name in grads and k.master.dim() >= 2 and k.mask is None
        ]
        again = closing and (bool(late) or self.since + self.filled >= self.flow.select_interval)
        for name, kept in self.kept.items():
            new = None
            if name in grads:
                new = self.rule(kept.master, kept.states, kept.now, grads[name] * factor)
            if new is not None and (warm or kept.mask is None):
                kept.master, kept.states, kept.now = new
            elif kept.mask is not None:
                self.split(kept, None if new is None else (*new, grads[name] * factor), closing, again)
            if name in grads and kept.master.dim() >= 2 and (again or self.number == self.flow.warmup):
                self.select(kept, grads[name])
        if closing:
            self.since = 0 if again else self.since + self.filled
            self.filled = 0
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                param.copy_(self.kept[name].master)
                param.grad = None
        return loss.item()

    def split(self, kept: PlainParameter, new: Any, closing: bool, again: bool) -> None:
        assert kept.mask is not None
        if new is not None:
            self.mix(kept, new, kept.mask)
            kept.now, grad = new[2], new[3]
            kept.total = grad.clone() if kept.total is None else kept.total + grad
            kept.count += 1
        if not closing:
            return
        if kept.landing is not None:
            self.mix(kept, kept.landing, ~kept.mask)
            kept.later, kept.landing = kept.landing[2], None
        if kept.total is None:
            return
        found = self.rule(kept.master, kept.states, kept.later, kept.total / kept.count)
        kept.total, kept.count = None, 0
        if self.flow.overlap and not again:
            kept.landing = found
        else:
            self.mix(kept, found, ~kept.mask)
            kept.later = found[2]

    def mix(self, kept: PlainParameter, new: Any, where: Tensor) -> None:
        kept.master = torch.where(where, new[0], kept.master)
        kept.states = {name: torch.where(where, value, kept.states[name]) for name, value in new[1].items()}

    def select(self, kept: PlainParameter, grad: Tensor) -> None:
        chosen = choose(grad.flatten(1).double().square().sum(0), self.flow.topk_ratio)
        assert chosen is not None
        kept.mask = torch.zeros_like(grad, dtype=torch.bool)
        kept.mask.flatten(1)[:, chosen] = True
        kept.later = kept.later or {name: value.clone() for name, value in kept.now.items()}


FLOWS = {
    "beside": ZenFlow(topk_ratio=0.2, update_interval=2, select_interval=6),
    "in place": ZenFlow(topk_ratio=0.2, update_interval=3, select_interval=3, overlap=False),
    "delayed by one": ZenFlow(topk_ratio=0.1, update_interval=1, select_interval=100, warmup=2),
}


@pytest.mark.parametrize(
    ("tier", "rule"),
    [
        ("host", "adamw"),
        ("host", "fused"),
        ("host", "sgd"),
        ("nvme", "adamw"),
        ("0.5 host / 0.5 nvme", "fused"),
    ],
)
@pytest.mark.parametrize("flow", FLOWS)
def test_it_computes_what_the_algorithm_says(tmp_path: Path, tier: str, rule: str, flow: str) -> None:
    run = Run(FLOWS[flow], store_settings(tier, tmp_path), RULES[rule]).steps(0, 11)
    twin = PlainZenFlow(FLOWS[flow], RULES[rule])
    wanted = [twin.step(number, run.norms[number]) for number in range(11)]
    assert run.losses == wanted
    assert_same(run.masters(), {name: kept.master for name, kept in twin.kept.items()})
    states = {f"{name}/{key}": v for name, kept in twin.kept.items() for key, v in kept.states.items()}
    assert_same({key: v for key, v in run.states().items() if v.dim()}, states)


def test_low_precision_parameters_have_the_same_masters(tmp_path: Path) -> None:
    twin = PlainZenFlow(FLOWS["beside"], adamw, torch.bfloat16)
    wanted = [twin.step(number) for number in range(11)]
    run = Run(FLOWS["beside"], store_settings("host", tmp_path), dtype=torch.bfloat16, clip=None)
    assert run.steps(0, 11).losses == wanted
    assert_same(run.masters(), {name: kept.master for name, kept in twin.kept.items()})


@pytest.mark.parametrize("looked_at", [False, True])
@pytest.mark.parametrize("flow", FLOWS)
def test_parameters_without_a_gradient_wait(flow: str, looked_at: bool) -> None:
    """The mean is over the gradients there were; what a look put away is whole again when it lands."""
    run = Run(FLOWS[flow], {}, loss=branching)
    for number in range(13):
        run.step(number)
        if looked_at:
            run.masters()
    twin = PlainZenFlow(FLOWS[flow], adamw, loss=branching)
    assert run.losses == [twin.step(number, run.norms[number]) for number in range(13)]
    assert_same(run.masters(), {name: kept.master for name, kept in twin.kept.items()})


# -- limits -------------------------------------------------------------------------------------------------

EXACT = {
    "everything selected": ZenFlow(topk_ratio=1.0, update_interval=3),
    "every step, in place": ZenFlow(update_interval=1, select_interval=2, overlap=False),
    "warming up": ZenFlow(warmup=99),
}


@pytest.mark.parametrize(
    ("tier", "dtype", "rule"),
    [
        ("host", None, "adamw"),
        ("nvme", None, "sgd"),
        ("host", torch.bfloat16, "adamw"),
        ("nvme", torch.bfloat16, "fused"),
    ],
)
@pytest.mark.parametrize("flow", EXACT)
def test_limits_are_plain_training(
    tmp_path: Path, tier: str, dtype: torch.dtype | None, rule: str, flow: str
) -> None:
    plain = Run(None, store_settings(tier, tmp_path), RULES[rule], dtype).steps(0, 7)
    run = Run(EXACT[flow], store_settings(tier, tmp_path), RULES[rule], dtype).steps(0, 7)
    assert run.losses == plain.losses
    assert_same(run.masters(), plain.masters())
    assert_same(run.states(), plain.states())


@pytest.mark.parametrize("flow", FLOWS)
def test_between_the_limits_it_is_another_training(tmp_path: Path, flow: str) -> None:
    plain = Run(None, store_settings("host", tmp_path)).steps(0, 7)
    run = Run(FLOWS[flow], store_settings("host", tmp_path)).steps(0, 7)
    assert run.losses[:2] == plain.losses[:2]  # the first step is whole
    assert run.losses[-1] != plain.losses[-1]


def test_the_rest_waits_as_long_as_stated() -> None:
    flow = FLOWS["beside"]
    assert (flow.staleness, ZenFlow(update_interval=4, overlap=False).staleness) == (3, 3)
    run = Run(flow, {})
    run.step(0)
    changes = []
    for number in range(1, 6):
        held = run.masters()["0.weight"]
        run.step(number)
        mask = torch.zeros(24, dtype=torch.bool)
        mask[run.update.progress.selection["0.weight"]] = True
        now = run.masters()["0.weight"]
        assert not torch.equal(now[:, mask], held[:, mask])
        changes.append(not torch.equal(now[:, ~mask], held[:, ~mask]))
    # steps 1 and 2 are added up, and in the weights at the end of step 4: 3 steps after the first of them
    assert changes == [False, False, False, True, False]


# -- looking, skipping, failing ------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["host", "nvme"])
@pytest.mark.parametrize("flow", FLOWS)
def test_looking_changes_nothing(tmp_path: Path, tier: str, flow: str) -> None:
    quiet = Run(FLOWS[flow], store_settings(tier, tmp_path)).steps(0, 9)
    run = Run(FLOWS[flow], store_settings(tier, tmp_path))
    for number in range(9):
        run.step(number)
        seen = run.masters()
        for name, param in run.model.named_parameters():
            assert torch.equal(seen[name], param)  # no half update, ever
        if number % 2:
            run.sharded.state_dict()
    assert run.losses == quiet.losses
    assert_same(run.masters(), quiet.masters())


def test_masters_written_between_steps_count(tmp_path: Path) -> None:
    """An update under way that started from the old ones is made again."""
    run = Run(ZenFlow(update_interval=2), store_settings("host", tmp_path)).steps(0, 3)
    assert run.update.progress.flying
    for unit in run.owner.units:
        unit.values().detach().fill_(0.5)
        unit.refresh_local()
    run.steps(3, 5)
    for name, value in run.masters().items():
        assert (value - 0.5).abs().max() < 10 * LR, name


def test_a_skipped_step_is_none() -> None:
    quiet = Run(FLOWS["beside"], {}).steps(0, 8)
    run = Run(FLOWS["beside"], {}).steps(0, 3)
    loss_of(run.model, 77).backward()
    run.sharded.skip_step()
    run.steps(3, 8)
    assert_same(run.masters(), quiet.masters())


class Moody(torch.optim.AdamW):
    """Raises while `angry`, in whichever thread."""

    elementwise = True
    angry = False

    def _init_group(self, *args: Any) -> Any:
        if Moody.angry:
            raise ArithmeticError("not now")
        return super()._init_group(*args)  # type: ignore[no-untyped-call]


def test_an_error_beside_the_training_is_raised_before_anything_changes_and_made_good() -> None:
    make: Make = lambda params: Moody(params, lr=LR, weight_decay=0.1)  # noqa: E731
    quiet = Run(FLOWS["beside"], {}, make).steps(0, 9)
    run = Run(FLOWS["beside"], {}, make).steps(0, 2)
    launch = run.update._rest.launch

    def angrily() -> None:
        Moody.angry = True
        launch()
        flight = run.update._rest._flight
        assert flight is not None
        flight.future.exception()
        Moody.angry = False

    run.update._rest.launch = angrily  # type: ignore[method-assign]
    run.step(2)  # the update of steps 1 and 2 fails, in its thread
    run.update._rest.launch = launch  # type: ignore[method-assign]
    run.step(3)
    before, states = run.masters(), run.states()
    loss_of(run.model, 4).backward()
    clip_grad_norm_(run.optimizer, 0.5)
    with pytest.raises(ArithmeticError, match="not now"):
        run.optimizer.step()
    assert_same(run.masters(), before)
    assert_same(run.states(), states)
    run.optimizer.zero_grad()
    run.steps(4, 9)
    assert_same(run.masters(), quiet.masters())


def test_a_store_that_is_closed_ends_the_thread() -> None:
    run = Run(FLOWS["beside"], {}).steps(0, 4)
    assert run.update.progress.flying
    (worker,) = run.update._rest._pool._threads  # type: ignore[union-attr]
    assert worker.is_alive()
    run.store.close()
    assert not worker.is_alive()


# -- settings and bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk_ratio": 0.0}, "topk_ratio"),
        ({"update_interval": 0}, 'allowed are whole numbers from 1 on, and "auto"'),
        ({"select_interval": 4, "update_interval": 4}, "allowed are 8 and above"),
        ({"select_interval": 8, "update_interval": "auto", "overlap": False}, "allowed are 16 and above"),
        ({"select_interva": 4}, "select_interval"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZenFlow(**settings)


def test_an_optimizer_that_looks_at_whole_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match="Muon with zenflow"):
        Run(ZenFlow(), {}, make=lambda params: torch.optim.Muon([p for p in params if p.dim() == 2]))


def test_bytes_are_counted_exactly(tmp_path: Path) -> None:
    """2-byte parameters, 4-byte gradients: the same leave; selected gradients and 1/4 of the rest come."""
    run = Run(ZenFlow(topk_ratio=0.25, update_interval=4), {}, dtype=torch.bfloat16, clip=None).steps(0, 2)
    matrices, vectors = 24 * 33 + 33 * 16, 33 + 33 + 33 + 16
    selected = 6 * 33 + 8 * 16  # of 24 and 33 columns
    found = run.update.traffic()
    assert found.to_host == found.plain_to_host == 4 * (matrices + vectors)
    assert found.plain_to_device == 2 * (matrices + vectors)
    assert found.to_device == 4 * (selected + vectors) + 2 * matrices / 4
    assert found.selecting == 2 * 12 * (selected + vectors)
    assert run.update.nbytes_selected == 12 * (selected + vectors)
    assert run.update.nbytes_beside == 0  # nothing was launched yet
    run.steps(2, 6)
    assert run.update.nbytes_beside > 0


@pytest.mark.parametrize("overlap", [True, False])
def test_automatic_intervals_follow_the_energies(overlap: bool) -> None:
    """The rest waits until it has added up to what the selection weighs in one step."""
    run = Run(ZenFlow(update_interval="auto", topk_ratio=0.05, overlap=overlap), {}, clip=None).steps(0, 2)
    assert run.update.progress.filled in (0, 1)
    judge = run.update.progress.judge
    judge.energies.clear()
    for _ in range(3):
        judge.of("heavy").add(inside=100.0, outside=9.0, chosen=1, rest=9)  # rms 10 and 1
    assert not judge.ends()
    for _ in range(7):
        judge.of("heavy").add(inside=100.0, outside=9.0, chosen=1, rest=9)
    assert judge.ends()
    judge.of("another").add(inside=100.0, outside=0.0, chosen=1, rest=9)
    assert not judge.ends()  # 0.99 of two parameters are both
