"""Parking: parts of the training state leave the device's memory between two phases, and come back."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ds_core.ground.accelerator import return_freed_memory
from ds_core.state.hooks import in_backward
from ds_core.state.owner import FlatOwner, owner_of
from ds_core.state.parked import HiddenView, ParkedStateError, is_parked
from ds_core.state.store import Kind
from ds_core.state.unit import FlatUnit
from ds_core.train.optim import ShardedOptimizer, attached, optimizers_of
from ds_kernels.aio import AsyncIO
from ds_offload.home import Home
from ds_offload.moves import Moves
from ds_offload.volume import Volume

KINDS: dict[str, Kind] = {"params": "param", "grads": "grad", "masters": "master", "moments": "moment"}
_AT_ONCE = 64 << 20  # bytes of one move, which on a GPU pass through pinned memory
_DEPTH = 8  # blocks of a MiB at once: near a disk's bandwidth, and few buffers that stay while parked


@dataclass(slots=True)
class _Parcel:
    """One storage, every tensor over it that training knows, and where its bytes are meanwhile."""

    kind: Kind
    storage: torch.UntypedStorage
    tensors: list[tuple[str, Tensor]]
    nbytes: int
    home: Home | None = None
    hidden: list[HiddenView] = field(default_factory=list)

    def bytes(self) -> Tensor:
        """[nbytes] uint8 over the storage, of no kin to the tensors over it."""
        return torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)


class StateLot:
    """The parking lot of one owner: see `park`.

    [Note: parked by storage] Bytes leave storage by storage, and the storage is resized to nothing, so that
    every tensor over it is the same object afterwards. Memory that serves as parameters and as masters (fp32)
    counts as parameters. What a store keeps elsewhere stays there, and is refused while its kind is parked.
    """

    def __init__(self, owner: FlatOwner) -> None:
        self._owner = owner
        self._moves = Moves()
        self._parcels: list[_Parcel] = []
        self._bring: dict[FlatUnit, Any] = {}  # what units did for a use that nobody announced
        self._volumes: dict[str, Volume] = {}  # made here, by folder
        self._io: AsyncIO | None = None  # of these volumes

    # -- out -----------------------------------------------------------------------------------------------

    def park(self, kinds: Sequence[str] = (), to: Any = "host") -> int:
        """Bytes that left the device's memory. A kind that is there already stays as it is."""
        owner, where = self._owner, str(to.folder) if isinstance(to, Volume) else to
        chosen = _kinds(kinds)
        known = owner.parked.where
        for kind in chosen:
            if known.get(kind, where) != where:
                raise ValueError(
                    f"{_plural(kind)} are parked at {known[kind]!r}, not {where!r}: reload_states() first"
                )
        self._refuse_mid_pass()
        chosen = [kind for kind in chosen if kind not in known]
        volume = self._volume(to)
        owner.settle()
        owner.reducer.settle()
        owner.changes.open()  # a checkpoint that is being copied still reads
        parcels = [parcel for parcel in self._find() if parcel.kind in chosen]
        try:
            for parcel in parcels:
                on_disk = parcel.nbytes if volume is not None else 0
                pinned = owner.device.type == "cuda"
                parcel.home = Home(parcel.nbytes, torch.uint8, on_disk, volume, pinned=pinned)
            for parcel in parcels:
                self._send(parcel)
            self._moves.settle()
            for parcel in parcels:
                _home(parcel).settle()
        except BaseException:
            _abandon(parcels)
            self._close_volumes()
            raise
        for parcel in parcels:
            parcel.hidden = [HiddenView(tensor, name) for name, tensor in parcel.tensors]
            parcel.tensors.clear()
            parcel.storage.resize_(0)
        self._parcels += parcels
        known.update(dict.fromkeys(chosen, where))
        if "param" in chosen:
            self._refuse_bringing()
        _give_back(owner)
        return sum(parcel.nbytes for parcel in parcels)

    def _refuse_mid_pass(self) -> None:
        if in_backward() or self._owner.reducer.in_round or self._owner.depth:
            raise RuntimeError(
                "training state cannot be parked or reloaded in the middle of a forward or backward: do it "
                "between two of them (after one that raised, call optimizer.zero_grad() first)"
            )

    def _volume(self, to: Any) -> Volume | None:
        if isinstance(to, Volume) or to == "host":
            return to if isinstance(to, Volume) else None
        kept = getattr(self._owner.store, "volume", None)
        if to == "nvme" and isinstance(kept, Volume):
            return kept
        folder = to.removeprefix("nvme:") if isinstance(to, str) and to.startswith("nvme:") else ""
        if not folder:
            raise ValueError(
                f'to={to!r}; allowed: "host", "nvme:<folder>", a ds_offload.Volume, or "nvme" where the '
                "model's store has a folder on nvme"
            )
        if folder not in self._volumes:
            self._io = self._io or AsyncIO(queue_depth=_DEPTH, block_size=1 << 20)
            self._volumes[folder] = Volume(folder, self._io)
        return self._volumes[folder]

    def _find(self) -> Iterator[_Parcel]:
        """The storages on the device that can leave, each once."""
        found: dict[int, tuple[torch.UntypedStorage, list[tuple[Kind, str, Tensor]]]] = {}
        seen: set[int] = set()
        for kind, name, tensor in self._tensors():
            if id(tensor) in seen or is_parked(tensor) or tensor.device != self._owner.device:
                continue
            seen.add(id(tensor))
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.resizable() and storage.device.type != "meta":
                found.setdefault(storage.data_ptr(), (storage, []))[1].append((kind, name, tensor))
        for storage, entries in found.values():
            kinds = [kind for kind, _, _ in entries]
            kind = "param" if "param" in kinds else kinds[0]
            yield _Parcel(kind, storage, [(name, tensor) for _, name, tensor in entries], storage.nbytes())

    def _tensors(self) -> Iterator[tuple[Kind, str, Tensor]]:
        """Everything that training knows by a tensor object of its own."""
        owner = self._owner
        for unit in owner.units:
            yield "param", f"the whole copy of {unit.key}", unit.whole
            yield "param", f"the shard of {unit.key}", unit.local
            if not unit.gone:
                for slot, param in zip(unit.layout.slots, unit.params, strict=True):
                    yield "param", f"parameter {slot.fqn}", param
            if unit.trainable:
                yield "master", f"the master of {unit.key}", unit.values()
            if unit.gradient is not None:
                yield "grad", f"the gradient of {unit.key}", unit.gradient
        for tensor in owner.copies():
            yield "param", "a second shard", tensor
        for tensor in owner.reducer.live():
            yield "grad", "a bucket of gradients", tensor
        for sharded in optimizers_of(owner):
            yield from _of_optimizer(sharded)

    def _send(self, parcel: _Parcel) -> None:
        values = parcel.bytes()
        for begin in range(0, parcel.nbytes, _AT_ONCE):
            self._moves.to_home(_home(parcel), begin, values[begin : begin + _AT_ONCE])

    def _refuse_bringing(self) -> None:
        """Units that are cut are not gathered for a stray read either."""

        def refuse(unit: FlatUnit) -> bool:
            raise ParkedStateError(f"parameters of {unit.key}: parked; call reload_states() first")

        for unit in self._owner.units:
            self._bring[unit], unit.bring = unit.bring, refuse

    # -- back ----------------------------------------------------------------------------------------------

    def reload(self, kinds: Sequence[str] = ()) -> int:
        """Bytes that came back. Raises ValueError for a kind that is named and not parked."""
        owner = self._owner
        chosen = _kinds(kinds) if kinds else list(owner.parked.where)
        there = ", ".join(_plural(kind) for kind in owner.parked.where) or "nothing"
        for kind in chosen:
            if kind not in owner.parked.where:
                raise ValueError(f"{_plural(kind)} are not parked; parked: {there}")
        self._refuse_mid_pass()
        parcels = [parcel for parcel in self._parcels if parcel.kind in chosen]
        try:
            for parcel in parcels:
                parcel.storage.resize_(parcel.nbytes)
                self._fetch(parcel)
        except BaseException:
            for parcel in parcels:
                parcel.storage.resize_(0)
            raise
        for parcel in parcels:
            for hidden in parcel.hidden:
                hidden.show()
            parcel.home = None
        self._parcels = [parcel for parcel in self._parcels if parcel.kind not in chosen]
        if "param" in chosen:
            for unit, bring in self._bring.items():
                unit.bring = bring
            self._bring.clear()
        for kind in chosen:
            del owner.parked.where[kind]
        if not self._parcels:
            self._close_volumes()
        return sum(parcel.nbytes for parcel in parcels)

    def _fetch(self, parcel: _Parcel) -> None:
        """Two moves at once: one lands while the next is on its way."""
        values, tickets = parcel.bytes(), []
        try:
            for begin in range(0, parcel.nbytes, _AT_ONCE):
                part = values[begin : begin + _AT_ONCE]
                tickets.append(self._moves.from_home(_home(parcel), begin, part))
                if len(tickets) > 1:
                    tickets.pop(0).wait()
        finally:
            while tickets:  # whatever becomes of one, nothing may still write when the storage shrinks again
                tickets.pop(0).wait()

    def _close_volumes(self) -> None:
        if self._parcels:
            return
        while self._volumes:
            self._volumes.popitem()[1].close()
        if self._io is not None:
            self._io.close()
            self._io = None


def park(target: Any, *kinds: str, to: Any = "host") -> int:
    """Take parts of the training state out of device memory until `unpark`; the bytes that left.

    `target`: an engine, an optimizer or a model that went through `shard`. `kinds` of "params", "grads",
    "masters", "moments"; none named: all. `to`: "host", "nvme:<folder>", a Volume, or "nvme" where the store
    of the model has a folder. All tensors stay the same objects; until they are back, using them raises
    ParkedStateError, and so does a forward, backward, step or checkpoint that needs them. Parking what is
    parked there already does nothing. Memory that serves as parameters and as masters (fp32) goes with
    params. Views of them that nobody but you knows must not be read meanwhile.
    Collective: every rank makes the same calls. Raises ValueError for unknown kinds and for kinds parked
    elsewhere, RuntimeError in the middle of a forward or backward, OSError when a disk is full; then nothing
    has moved.
    """
    return _lot_of(target).park(kinds, to)


def unpark(target: Any, *kinds: str) -> int:
    """Bring back what `park` took (none named: all of it), bit for bit; the bytes that came. Collective.

    Raises ValueError for a named kind that is not parked, AioError for a file that cannot be read and the
    device's out of memory error; then what was to come is still parked.
    """
    return _lot_of(target).reload(kinds)


def _lot_of(target: Any) -> StateLot:
    owner = getattr(target, "owner", None)
    if isinstance(target, FlatOwner):
        owner = target
    elif isinstance(target, nn.Module):
        owner = owner_of(next(target.parameters()))
    elif not isinstance(owner, FlatOwner):
        owner = attached(target).owner
    lot = owner.parked.lot(owner) if owner.parked.has_lot else StateLot(owner)
    assert isinstance(lot, StateLot)
    owner.parked.keep(lot)
    return lot


def _kinds(names: Sequence[str]) -> list[Kind]:
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise ValueError(f"no state {unknown[0]!r}; allowed: {', '.join(KINDS)}, or none named for all")
    return [kind for name, kind in KINDS.items() if name in names or not names]


def _plural(kind: Kind) -> str:
    return f"{kind}s"


def _of_optimizer(sharded: ShardedOptimizer) -> Iterator[tuple[Kind, str, Tensor]]:
    optimizer: Any = sharded.optimizer
    for piece in sharded.pieces:
        yield "master", f"the master of {piece.fqn}", piece.param
        if piece.param.grad is not None:
            yield "grad", f"the gradient of {piece.fqn}", piece.param.grad
        if (view := getattr(optimizer, "copy_out", {}).get(piece.param)) is not None:
            yield "param", f"the shard of {piece.fqn}", view
        if (view := getattr(optimizer, "low_precision_grads", {}).get(piece.param)) is not None:
            yield "grad", f"the gradient of {piece.fqn}", view
        for name, value in optimizer.state.get(piece.param, {}).items():
            if isinstance(value, Tensor) and value.dim() > 0:
                yield "moment", f"{name} of {piece.fqn}", value


def _home(parcel: _Parcel) -> Home:
    assert parcel.home is not None
    return parcel.home


def _abandon(parcels: Sequence[_Parcel]) -> None:
    """Nothing may still read from memory that goes on being used; what was written is forgotten."""
    for parcel in parcels:
        for future in parcel.home.pending if parcel.home is not None else ():
            future.exception()
        parcel.home = None


def _give_back(owner: FlatOwner) -> None:
    """What was freed goes to the system, where other processes and models find it."""
    gc.collect(0)
    return_freed_memory(owner.mesh.accelerator)
    if owner.device.type == "cuda":
        torch.cuda.empty_cache()
