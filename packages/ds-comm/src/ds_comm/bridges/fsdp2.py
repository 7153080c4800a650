"""Any codec as the all-gather and the reduce-scatter of torch's FSDP2 (`fully_shard`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from ds_comm.agreement import refuse_disagreement, settings_of
from ds_comm.log import FSDP_AXIS
from ds_comm.wire_rows import NotFiniteError, RowCodec
from ds_core.ground.codec import gather_coded, reduce_coded
from ds_core.ground.collectives import TorchCommunicator, WireLog
from ds_core.ground.mesh import Mesh, Topology, lane_of
from ds_core.ground.wire import Codec


def use_codecs(
    model: nn.Module, *, gather: Codec | None = None, reduce: Codec | None = None, mesh: Mesh | None = None
) -> int:
    """Every unit of a model that `fully_shard` has cut gathers and reduces through these codecs.

    Call it on every rank, before the first forward; gives the number of units. Collective: ranks compare the
    codecs. Without a codec for it, a direction stays FSDP2's own. `mesh`: whose communication log hears of
    what is coded, under axis "fsdp". Reductions take FSDP2's "sum" and "average"; a divide factor needs
    `set_force_sum_reduction_for_comms(True)`.
    Raises ValueError if no module of the model is an FSDPModule, no codec is given, or ranks disagree.
    """
    if gather is None and reduce is None:
        raise ValueError("no codec given; allowed: gather=, reduce=, or both")
    units = _units(model)
    if not units:
        raise ValueError("no module of this model went through fully_shard; cut it first, then choose codecs")
    mesh = mesh or Topology().build()
    settings = {
        f"{way} {name}": value
        for way, codec in (("gather", gather), ("reduce", reduce))
        for name, value in settings_of(codec).items()
    }
    refuse_disagreement(mesh.communicator("world", "control"), settings, what="the codecs of FSDP2")
    wires, rank = Wires(mesh.log), mesh.rank("world")
    gather, reduce = (c.at_rank(rank) if isinstance(c, RowCodec) else c for c in (gather, reduce))
    for name, module in units:
        if gather is not None:
            module.set_custom_all_gather(CodedAllGather(gather, wires, about=name))
        if reduce is not None:
            module.set_custom_reduce_scatter(CodedReduceScatter(reduce, wires, about=name))
    return len(units)


def _units(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, module), one of each group that was cut together; a module without parameters moves none."""
    found: dict[int, tuple[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # older torch keeps one, or none
            if groups if groups is not None else getattr(state, "_fsdp_param_group", None):
                found.setdefault(id(state), (name or "the root", module))
    return list(found.values())


class Wires:
    """The communicators over FSDP2's own groups, one each."""

    def __init__(self, log: WireLog) -> None:
        self._log = log
        self._known: WeakKeyDictionary[ProcessGroup, TorchCommunicator] = WeakKeyDictionary()

    def over(self, group: ProcessGroup, device: torch.device) -> TorchCommunicator:
        if group not in self._known:
            lane = lane_of(FSDP_AXIS, group)
            self._known[group] = TorchCommunicator(group, device, log=self._log, axis=FSDP_AXIS, lane=lane)
        return self._known[group]


class _Allocating:
    """Buffers as FSDP2 makes them by default."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(math.prod(int(dim) for dim in size), dtype=dtype, device=device)


class CodedAllGather(_Allocating, AllGather):
    """[world * n] <- [n], encoded. Every rank decodes its own part too, so all hold the same weights.

    Runs in the stream that FSDP2 calls it in, and is over when that stream goes on: what FSDP2 prefetches
    overlaps there as ever. On CPU it returns when it has arrived.
    """

    def __init__(self, codec: Codec, wires: Wires, *, about: str) -> None:
        self._codec, self._wires, self._about = codec, wires, about

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, async_op: bool = False
    ) -> None:
        if not input_tensor.is_floating_point():
            raise ValueError(
                f"the weights of {self._about} travel as {input_tensor.dtype}, packed by FSDP2 (several"
                " dtypes, or tensors that say themselves how they are gathered): choose no gather codec"
            )
        comm = self._wires.over(group, output_tensor.device)
        about = f"the weights of {self._about}"
        gather_coded(comm, self._codec, output_tensor, input_tensor, about=about).wait()


class CodedReduceScatter(_Allocating, ReduceScatter):
    """[n] <- [world * n]: encoded, decoded and summed in the output's dtype.

    Raises NotFiniteError on every rank when a gradient of any rank is not finite, before anything is encoded;
    that costs a message of 8 bytes a unit, and on an accelerator the host waits for it.
    """

    def __init__(self, codec: Codec, wires: Wires, *, about: str) -> None:
        self._codec, self._wires, self._about = codec, wires, about

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        comm = self._wires.over(group, output_tensor.device)
        scale = _scale(op, comm.world)
        self._refuse_nonfinite(comm, input_tensor)
        about = f"the gradients of {self._about}"
        ticket = reduce_coded(
            comm, self._codec, output_tensor, input_tensor, scale=scale, accumulate=False, about=about
        )
        ticket.wait()

    def _refuse_nonfinite(self, comm: TorchCommunicator, full: Tensor) -> None:
        fine = torch.stack([torch.isfinite(end) for end in torch.aminmax(full)]).all()
        worst = torch.where(fine, 0, comm.rank + 1).view(1)
        comm.all_reduce(worst, op="max", about="are gradients finite").wait()
        said = int(worst)
        if said:
            raise NotFiniteError(
                f"a gradient of {self._about} is not finite on rank {said - 1} of its group: nothing was"
                " sent; lower the learning rate, look at that rank's batch, or scale the loss"
            )


def _scale(op: Any, world: int) -> float:
    """What a sum is multiplied by."""
    if op == dist.ReduceOp.SUM:
        return 1.0
    if op == dist.ReduceOp.AVG:
        return 1.0 / world
    raise ValueError(
        f"FSDP2 reduces with {op}, codecs with a sum or an average: call"
        " set_force_sum_reduction_for_comms(True) on the model beside the divide factor"
    )
