"""One cell of the parity matrix: sharded training against its unsharded twin, gradient by gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ds_core import JointOptimizer
from ds_core.ground.mesh import Mesh
from ds_core.protocols import Store
from ds_core.state.owner import FlatOwner
from ds_core.testing.models import CASES
from ds_core.testing.parity import Twin, TwinStep, assert_close_norm
from ds_core.train.optim import attached
from ds_zero import EMA
from ds_zero.zero import shard

STEPS = 3
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def tolerance(dtype: torch.dtype | None) -> float:
    """Relative bound per tensor.

    fp32: sums in another order, 1e-5 by the project's own rule. Low precision, unit roundoff u = 2**-9 (bf16)
    or 2**-12 (fp16): both sides take the same rounded gradients from autograd; ours are rounded once more on
    the wire and, at stage 0, once in each of the wire's additions (at most 3 of them in a world of 4), each
    time by at most u of what is rounded, which is at most the parts' own size: 4u of the parts.
    """
    if dtype is None:
        return 1e-5
    unit = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-12
    return 4 * unit


def full_grads(owner: FlatOwner) -> dict[str, Tensor]:
    """Every gradient whole, after a drain. Collective."""
    found = {}
    for unit in owner.trainable:
        assert unit.gradient is not None
        whole = unit.gradient
        if owner.sharded and owner.comm.world > 1:
            whole = torch.empty(unit.layout.numel, dtype=unit.gradient.dtype)
            owner.gather_comm.all_gather(whole, unit.gradient).wait()
        for slot, has_grad in zip(unit.layout.slots, unit.has_grad, strict=True):
            if has_grad:
                found[slot.fqn] = whole[slot.start : slot.end].view(slot.shape).clone()
    return found


def full_masters(owner: FlatOwner) -> dict[str, Tensor]:
    """Every parameter whole, in its master's dtype. Collective."""
    found = {}
    for unit in owner.units:
        whole = mine = unit.values()
        if owner.sharded and owner.comm.world > 1:
            whole = torch.empty(unit.layout.numel, dtype=mine.dtype)
            owner.gather_comm.all_gather(whole, mine.clone()).wait()
        for slot in unit.layout.slots:
            found[slot.fqn] = whole[slot.start : slot.end].view(slot.shape).clone()
    return found


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    """Muon for the blocks' matrices, AdamW for the rest."""
    blocks = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2]
    chosen = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    return JointOptimizer([torch.optim.Muon(blocks, lr=0.02), torch.optim.AdamW(rest, lr=1e-3)])


@dataclass(frozen=True)
class Variant:
    """What a row adds to the plain one.

    `same_weights`: the twin starts every step from the weights of the run. Newton-Schulz in bf16 amplifies a
    last bit of one step's gradient into the next step's, which then differ by more than a rounding.
    `average`: an EMA is followed and compared too, inside `applied()`.
    """

    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw
    same_weights: bool = False
    average: bool = False


VARIANTS = {"plain": Variant(), "muon": Variant(muon, same_weights=True), "ema": Variant(average=True)}


def run_cell(
    mesh: Mesh,
    case_name: str,
    stage: int,
    accumulate: int,
    dtype_name: str,
    variant: str = "plain",
    *,
    store: Store | None = None,
) -> None:
    """Train `STEPS` steps both ways; compare every gradient and every weight after each step."""
    case, dtype, row = CASES[case_name], DTYPES[dtype_name], VARIANTS[variant]
    make = row.make_optimizer
    rank, ranks = dist.get_rank(), dist.get_world_size()
    scale = 2.0**6 if dtype == torch.float16 else 1.0
    twin = Twin(case, make, ranks=ranks, dtype=dtype, loss_scale=scale, zero_unused=False)
    model = case.build()
    model, optimizer = shard(model, make(model), stage=stage, mesh=mesh, dtype=dtype, store=store)
    owner = attached(optimizer).owner
    rtol = tolerance(dtype)
    shadow = case.build()
    shadow_optimizer = make(shadow)
    average = EMA(model, 0.5) if row.average else None
    followed = AveragedModel(shadow, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    followed.update_parameters(shadow)  # torch's first update is the copy
    for step in range(STEPS):
        batches = [case.make_batch(100 * step + micro, ranks) for micro in range(accumulate)]
        for micro in range(accumulate):
            mine = case.rank_batch(100 * step + micro, rank, ranks)
            losses = case.losses(model, mine)
            for number, loss in enumerate(losses):  # two losses: two backwards over one graph
                (loss * scale / accumulate).backward(retain_graph=number + 1 < len(losses))
        expected = twin.step(batches)
        attached(optimizer).show_grads()
        grads = {name: grad / scale for name, grad in full_grads(owner).items()}
        if dtype is None:
            assert_close_norm(grads, expected.grads, rtol)
        else:
            assert_within(grads, expected, rtol)
        for gradient in attached(optimizer).gradients():
            gradient.div_(scale)
        optimizer.step()
        optimizer.zero_grad()
        if dtype is None and not row.same_weights:
            assert_close_norm(full_masters(owner), twin.parameters(), rtol)
        if dtype is not None or row.same_weights or average:
            # Adam turns a rounding error in a gradient near zero into a step of the other sign, so weights
            # are held to plain AdamW in fp32 on the very gradients that were checked above.
            step_on(shadow, shadow_optimizer, grads)
            assert_close_norm(full_masters(owner), as_kept(shadow, dtype), 1e-6)
        if average is not None:
            followed.update_parameters(shadow)
            with average.applied():
                assert_close_norm(full_masters(owner), as_kept(followed.module, dtype), 1e-6)
            assert_close_norm(full_masters(owner), as_kept(shadow, dtype), 1e-6)
        if row.same_weights:
            twin.model.load_state_dict(shadow.state_dict())


def as_kept(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Weights as an owner keeps them: frozen ones in the dtype of the run, without a master."""
    return {
        name: (p if p.requires_grad or dtype is None else p.to(dtype)).detach()
        for name, p in model.named_parameters()
    }


def step_on(model: nn.Module, optimizer: torch.optim.Optimizer, grads: dict[str, Tensor]) -> None:
    """One plain optimizer step with given gradients; a parameter without one is skipped."""
    for name, param in model.named_parameters():
        param.grad = grads[name].to(param.dtype) if name in grads else None
    optimizer.step()


def assert_within(grads: dict[str, Tensor], expected: TwinStep, rtol: float) -> None:
    """||d|| <= rtol * the mean norm of the parts that each gradient is the sum of."""
    assert grads.keys() == expected.grads.keys()
    for name, grad in grads.items():
        gap = float((grad.double() - expected.grads[name].double()).norm())
        bound = rtol * expected.sizes[name]
        if not gap <= bound:
            raise AssertionError(f"{name}: ||d|| = {gap:.3e} > {bound:.3e}")
