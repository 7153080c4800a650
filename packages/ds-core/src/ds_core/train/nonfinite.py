"""Where did a NaN or an overflow come from? The first module and the first gradient, agreed by all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_core.ground.wire import Communicator
from ds_core.state.owner import FlatOwner

_KINDS = (
    "turns finite inputs into a non-finite output",
    "gets a non-finite input",
    "has a parameter that is not finite:",
)


class NonFiniteError(FloatingPointError):
    """The loss or a gradient is NaN or infinite; no weight was changed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The first module of a forward that gave something non-finite: numbers that ranks can exchange."""

    module: int  # in the order of named_modules()
    kind: int
    param: int = 0  # in the order of the module's own parameters


def explain_nonfinite(
    model: nn.Module, owner: FlatOwner, run: Callable[[], object] | None, losses: Sequence[Tensor]
) -> str:
    """One sentence, the same on every rank: whose loss, whose module, and which gradient went wrong first.

    Call after the gradients are drained and before they are dropped. Runs each rank's last forward again,
    unless a rank has none. Collective.
    """
    control, lost = owner.control, [index for index, loss in enumerate(losses) if not _finite(loss)]
    place = _first_gradient(owner)
    mine = [0 if not lost else lost[0] + 1, 0 if run is None else 1, 0 if place is None else place + 1]
    table = _gather(control, mine)
    bad = [(rank, row[0]) for rank, row in enumerate(table) if row[0]]
    said = [f"rank {rank}'s loss of backward {number} is not finite" for rank, number in bad[:1]]
    if run is not None and all(row[1] for row in table):
        said.append(_forward(model, control, run))
    holders = [(row[2] - 1, rank) for rank, row in enumerate(table) if row[2]]
    if holders:
        place, rank = min(holders)
        name = _places(owner)[place]
        said.append(f"first gradient in the backward's order: {name}, in rank {rank}'s shard")
    return "; ".join(said)


def find_in_forward(model: nn.Module, run: Callable[[], object]) -> Finding | None:
    """Run the model again; the first module whose output is not finite, None when all are.

    Collective where parameters are sharded: every rank runs its own batch. Leaves the random state as it was.
    """
    found: list[Finding] = []
    bad_params: dict[nn.Module, int] = {}
    numbers = {module: number for number, module in enumerate(model.modules())}
    handles = []

    def look_before(module: nn.Module, inputs: Any) -> None:
        # Before, since a sharded parameter is let go with its module's forward.
        for number, param in enumerate(module.parameters(recurse=False)):
            if module not in bad_params and not _finite(param):
                bad_params[module] = number

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if found or all(_finite(tensor) for tensor in _tensors(output)):
            return
        if module in bad_params:
            found.append(Finding(numbers[module], 2, bad_params[module]))
        else:
            clean = all(_finite(tensor) for tensor in _tensors(inputs))
            found.append(Finding(numbers[module], 0 if clean else 1))

    for module in model.modules():
        handles.append(module.register_forward_pre_hook(look_before))
        handles.append(module.register_forward_hook(look))
    try:
        with torch.no_grad(), torch.random.fork_rng():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _forward(model: nn.Module, control: Communicator, run: Callable[[], object]) -> str:
    finding = find_in_forward(model, run)
    mine = [0, 0, 0] if finding is None else [finding.module + 1, finding.kind, finding.param]
    for rank, (module, kind, param) in enumerate(_gather(control, mine)):
        if module:
            name, found = list(model.named_modules())[module - 1]
            which = f" {list(dict(found.named_parameters(recurse=False)))[param]}" if kind == 2 else ""
            shown = f"{name or 'the model'} ({type(found).__name__})"
            return f"first module: {shown} on rank {rank} {_KINDS[kind]}{which}"
    return "the forward is finite on every rank: no module in the forward, so the loss function or a backward"


def _first_gradient(owner: FlatOwner) -> int | None:
    """The place, in the backward's order, of the first parameter whose gradient here is not finite."""
    at = 0
    for index in owner.reducer.order:
        unit = owner.trainable[index]
        mine = {part.index: part.local for part in unit.layout.overlaps(unit.rank)}
        for slot in reversed(range(len(unit.params))):
            if unit.gradient is not None and slot in mine and not _finite(unit.gradient[slice(*mine[slot])]):
                return at
            at += 1
    return None


def _places(owner: FlatOwner) -> list[str]:
    units = [owner.trainable[index] for index in owner.reducer.order]
    return [slot.fqn for unit in units for slot in reversed(unit.layout.slots)]


def _gather(control: Communicator, mine: list[int]) -> list[list[int]]:
    """Each rank's row of numbers from 0 up. Collective."""
    table = torch.zeros(control.world, len(mine), dtype=torch.int64)
    table[control.rank] = torch.tensor(mine)
    control.all_reduce(table, op="max", about="what is not finite").wait()
    rows: list[list[int]] = table.tolist()
    return rows


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
