"""Any codec as a communication hook of torch's DistributedDataParallel, with error feedback if wanted."""

# No `from __future__ import annotations`: DDP compares a hook's annotations with the types themselves.
import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket  # dist.GradBucket, which has no types
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ds_comm.agreement import refuse_disagreement, settings_of
from ds_comm.bridges.bucket_memory import BucketErrors, BucketMemory, Piece
from ds_comm.wire_rows import NotFiniteError, RowCodec, sum_rows
from ds_core.ground.codec import all_reduce_coded
from ds_core.ground.collectives import TorchCommunicator
from ds_core.ground.listener import Coding
from ds_core.ground.mesh import Mesh, Topology
from ds_core.ground.wire import Codec, Communicator

_FORMAT = 1


class CodedHook:
    """The state of `coded_hook`: `ddp.register_comm_hook(CodedHook(ddp, codec), coded_hook)`.

    Each bucket's mean is reduced in two hops, both encoded: every rank sums one chunk in fp32 and sends the
    sum on, so all ranks end with the same values. Without a codec this is DDP's own all-reduce. With
    `error_feedback` each rank adds what rounding took from its gradients, and from the chunk it sums, to
    those of the next iteration (Seide et al. 2014, "1-Bit Stochastic Gradient Descent"; both sides as in Tang
    et al. 2021, "1-bit Adam"): 4 bytes a parameter and 4 / world more.

    Buckets are worked off in a thread (on an accelerator, in a stream of its own), in DDP's order, while the
    backward goes on. They travel in a process group of their own along `axis` of `mesh`, so they never meet
    what DDP itself sends. Collective: construction makes that group, so every rank constructs.
    Raises ValueError when DDP's group is not that axis, or ranks disagree on the codec. In backward, on every
    rank: RuntimeError naming the parameter when a gradient of any rank is not finite; nothing of that bucket
    is encoded then.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        codec: Codec | None,
        *,
        error_feedback: bool = False,
        mesh: Mesh | None = None,
        axis: str = "data",
    ) -> None:
        self.mesh = mesh or Topology().build()
        self._comm = self.mesh.communicator(axis, "ddp")
        self.codec = codec.at_rank(self._comm.rank) if isinstance(codec, RowCodec) else codec
        device = self.mesh.accelerator.device
        if any(param.device.type != device.type for param in model.module.parameters()):
            raise ValueError(
                f"the model is not on {device.type}, as this mesh is: move it, or set DS_ACCELERATOR=cpu"
            )
        theirs = tuple(dist.get_process_group_ranks(model.process_group))
        ours = self._comm.lane.ranks if isinstance(self._comm, TorchCommunicator) else (dist.get_rank(),)
        if theirs != ours:
            raise ValueError(
                f"DDP reduces over ranks {list(theirs)}, axis {axis!r} of the mesh has {list(ours)}: give the"
                " mesh and axis of DDP's process group"
            )
        settings = {**settings_of(codec), "error_feedback": error_feedback}
        control = self.mesh.communicator(axis, "control")
        refuse_disagreement(control, settings, what="the communication hook")
        self._names = {id(param): name for name, param in model.module.named_parameters()}
        self._shapes = {name: param.shape for name, param in model.module.named_parameters()}
        self._memory = BucketMemory(self._comm.rank, self._comm.world) if error_feedback else None
        self._line = _Line(device)
        weakref.finalize(self, self._line.end)

    def submit(self, bucket: GradBucket) -> Future[Tensor]:
        """The bucket's mean, in its own buffer, once it is there. Collective, in DDP's order of buckets."""
        buffer = bucket.buffer()
        pieces = self._pieces(bucket, buffer)
        return self._line.run(buffer, lambda: self._reduce(buffer, pieces))

    def _pieces(self, bucket: GradBucket, buffer: Tensor) -> list[Piece]:
        found = []
        for param, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
            name = self._names.get(id(param), "a parameter that the model has no more")
            found.append(Piece(name, int(grad.storage_offset() - buffer.storage_offset()), param.shape))
        return found

    def _reduce(self, buffer: Tensor, pieces: list[Piece]) -> None:
        """[n] <- the mean of every rank's [n], in place."""
        comm, codec = self._comm, self.codec
        self._refuse_nonfinite(buffer, pieces)
        about = f"the gradients from {pieces[0].name} to {pieces[-1].name}"
        if codec is None or comm.world == 1:
            comm.all_reduce(buffer.mul_(1 / comm.world), about=about).wait()
        elif self._memory is None:
            mean = torch.empty_like(buffer, dtype=torch.float32)
            all_reduce_coded(comm, codec, mean, buffer, scale=1 / comm.world, about=about).wait()
            buffer.copy_(mean)
        else:
            errors = self._memory.of(pieces, buffer.numel(), buffer.device)
            buffer.copy_(reduce_remembering(comm, codec, buffer, errors, about=about))

    def _refuse_nonfinite(self, buffer: Tensor, pieces: list[Piece]) -> None:
        """Ranks agree before anything is encoded: one number, the largest of (parameter, rank)."""
        comm, found = self._comm, 0
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(buffer)):
            bad = [not torch.isfinite(buffer[piece.start : piece.end]).all() for piece in pieces]
            found = (bad.index(True) if True in bad else 0) * comm.world + comm.rank + 1
        worst = torch.tensor([found], device=buffer.device)
        comm.all_reduce(worst, op="max", about="are gradients finite").wait()
        said = int(worst)
        if said:
            index, rank = divmod(said - 1, comm.world)
            raise NotFiniteError(
                f"the gradient of {pieces[index].name} is not finite on rank {rank} of the group: nothing was"
                " sent; lower the learning rate, look at that rank's batch, or scale the loss"
            )

    # -- checkpoints ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's own: what its gradients and sums still owe, by parameter, and the codec's state.

        fp32 in each parameter's shape. Save one per rank; it goes on where it stopped with the same world.
        """
        errors = self._memory.by_name() if self._memory is not None else {}
        return {
            "format": _FORMAT,
            "world": self._comm.world,
            "worker": {name: worker for name, (worker, _) in errors.items()},
            "server": {name: server for name, (_, server) in errors.items()},
            "codec": self.codec.state_dict() if self.codec is not None else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for another format, world size, model, or a state with errors and no memory."""
        if state.get("format") != _FORMAT:
            raise ValueError(
                f"given format {state.get('format')!r}; allowed: {_FORMAT}, of CodedHook.state_dict"
            )
        if state["world"] != self._comm.world:
            raise ValueError(
                f"the state is of {state['world']} ranks, there are {self._comm.world}: errors belong to a"
                " rank's own gradients, start without them"
            )
        worker, server = state["worker"], state["server"]
        if worker and self._memory is None:
            raise ValueError("the state has errors of rounding; build CodedHook(..., error_feedback=True)")
        for name, tensor in worker.items():
            if self._shapes.get(name) != tensor.shape or server[name].shape != tensor.shape:
                there = self._shapes.get(name)
                raise ValueError(
                    f"the state has {name!r} of shape {list(tensor.shape)}, the model "
                    + ("has no such parameter" if there is None else f"has shape {list(there)}")
                )
        if self._memory is not None:
            device = self.mesh.accelerator.device
            self._memory.replace({n: (worker[n].to(device), server[n].to(device)) for n in worker})
        if self.codec is not None:
            self.codec.load_state_dict(state["codec"])


def coded_hook(state: CodedHook, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What `register_comm_hook` takes beside its state."""
    return state.submit(bucket)


def reduce_remembering(
    comm: Communicator, codec: Codec, full: Tensor, errors: BucketErrors, *, about: str = ""
) -> Tensor:
    """The mean [n] of every rank's `full` [n] in fp32, both hops encoded; `errors` keep what rounding took.

    Collective. Every rank gets the same values.
    """
    n, world = full.numel(), comm.world
    owed = errors.worker
    owed[:n].add_(full)
    coding = Coding(comm, codec, 4 * owed.numel())
    width = codec.wire_bytes(errors.server.numel())
    sent, received = (comm.allocate(width * world, torch.uint8) for _ in range(2))
    with coding.encoding():
        codec.encode(owed.view(world, -1), sent.view(world, -1))
    with coding.sending():
        ticket = comm.all_to_all(received, sent, about=about)
    rounded = torch.empty_like(owed)
    with coding.decoding():
        codec.decode(sent.view(world, -1), rounded.view(world, -1))
    owed.sub_(rounded)
    ticket.wait()
    with coding.decoding():
        sum_rows(codec, received.view(world, -1), errors.server, scale=1 / world, accumulate=True)
    mine, wire = sent[:width], received
    with coding.encoding():
        codec.encode(errors.server.view(1, -1), mine.view(1, -1))
    with coding.sending():
        ticket = comm.all_gather(wire, mine, about=about)
    ticket.wait()
    with coding.decoding():
        codec.decode(wire.view(world, -1), rounded.view(world, -1))
    errors.server.sub_(rounded.view(world, -1)[comm.rank])
    return rounded[:n]


@dataclass(frozen=True, slots=True)
class _Job:
    work: Callable[[], None]
    result: Tensor
    ready: Any  # an event in the stream that made the gradients; None on CPU
    future: Future[Tensor]
    failed: list[BaseException]


class _Line:
    """Work off the caller's thread, one job after the other, in the order given.

    On an accelerator in a stream of its own, which waits for the caller's; the futures then hold events, so
    nobody but this thread waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, result: Tensor, work: Callable[[], None]) -> Future[Tensor]:
        """`result` once `work` is done; its error, if it raises."""
        on_device = self._device.type != "cpu"
        if self._thread is None:
            target = _work_off_in_a_stream if on_device else _work_off
            arguments = (self._jobs, self._device)
            self._thread = threading.Thread(target=target, args=arguments, name="ds-ddp-hook", daemon=True)
            self._thread.start()
        ready = torch.Event(device=self._device) if on_device else None
        if ready is not None:
            ready.record()
        future = Future[Tensor](devices=[self._device] if on_device else None)
        failed: list[BaseException] = []
        self._jobs.put(_Job(work, result, ready, future, failed))

        def unwrap(done: Future[Tensor]) -> Tensor:
            for error in failed:
                raise error
            return done.value()

        return future.then(unwrap)

    def end(self) -> None:
        self._jobs.put(None)


def _work_off(jobs: "queue.SimpleQueue[_Job | None]", device: torch.device) -> None:
    with torch.no_grad():
        while (job := jobs.get()) is not None:
            _do(job)


def _work_off_in_a_stream(jobs: "queue.SimpleQueue[_Job | None]", device: torch.device) -> None:
    module = torch.get_device_module(device)
    module.set_device(device)
    stream = module.Stream(device)
    with torch.no_grad(), module.stream(stream):
        while (job := jobs.get()) is not None:
            job.ready.wait(stream)
            _do(job)


def _do(job: _Job) -> None:
    """Every job ends its future: a rank whose thread died silently would wait in backward for ever."""
    try:
        job.work()
    except BaseException as error:
        job.failed.append(error)
    with contextlib.suppress(RuntimeError):  # what the future's callback raises, backward raises too
        job.future.set_result(job.result)
