"""TieredStore: training state on device, host and disk by a `Tiered` policy, and the ways between them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor

from ds_core.ground.ticket import Ticket
from ds_core.state.store import HeldLease, Kind, Shares
from ds_kernels.aio import AsyncIO
from ds_offload.gradients import KeptGradients
from ds_offload.home import Home
from ds_offload.lease import MovedLease
from ds_offload.moves import Moves
from ds_offload.packing import PackingStore
from ds_offload.policy import Rounding, Split, Tiered, file_numel
from ds_offload.updates import UpdatingStore
from ds_offload.volume import Volume

_KINDS: dict[str, Kind] = {
    "param": "param", "next param": "param", "master": "master", "next master": "master", "grad": "grad",
}  # fmt: skip
_log = logging.getLogger("ds_offload")


class TieredStore(UpdatingStore, KeptGradients, PackingStore):
    """A `ds_core` Store whose tensors live where a `Tiered` says. Built from one, or from its settings.

    `TieredStore(nvme="/fast/disk", masters="nvme", moments="nvme")` and pass it as `shard(..., store=...)`.
    One store serves one model. Bytes are counted: `bytes_by_tier()`. The file on disk has no name and goes
    with the process. Raises ValueError for settings that contradict each other, OSError when a disk is full.
    """

    def __init__(self, policy: Tiered | None = None, **settings: Any) -> None:
        if policy is not None and settings:
            raise ValueError(f"give a Tiered or settings, not both; got a Tiered and {sorted(settings)}")
        UpdatingStore.__init__(self)
        KeptGradients.__init__(self)
        self.policy = policy or Tiered(**settings)
        self.splits: dict[Kind, Split] = {
            kind: self.policy.splits()[f"{kind}s"] for kind in ("param", "master", "grad", "moment")
        }
        on_disk = any(split.nvme for split in self.splits.values())
        self.features = frozenset({"offload"} if any(s.away for s in self.splits.values()) else ())
        self.io: AsyncIO | None = None
        self.volume: Volume | None = None
        if on_disk:
            assert self.policy.nvme is not None
            self.io = AsyncIO(
                queue_depth=self.policy.queue_depth,
                block_size=self.policy.block_bytes,
                max_pending_bytes=self.policy.pending_bytes,
            )
            self.volume = Volume(self.policy.nvme, self.io)
        self.moves = Moves()
        self._here: dict[str, Tensor] = {}
        self._homes: dict[str, Home] = {}
        self._packed, self._packings = {}, {}
        # Masters and moments share one choice: a unit is updated where both are.
        self._rounding = {kind: Rounding(self.splits[kind].device) for kind in ("param", "grad", "master")}
        self._choices: dict[tuple[str, str], bool] = {}
        self.lookers: list[WeakMethod[Any]] = []  # see _looked

    @property
    def away(self) -> TieredStore:
        """The fast ways to what lives elsewhere."""
        return self

    # -- named tensors -------------------------------------------------------------------------------------

    def create(self, key: str, init: Tensor) -> Tensor:
        """Take over `init`; returns its home.

        Raises ValueError when the key is taken, OSError when the disk is full.
        """
        if key in self._here or key in self._homes or key in self._packed:
            raise ValueError(f"the store already holds {key!r}; one store serves one model")
        if self.stays(key, init.numel()):
            self._packings.pop(key, None)
            self._here[key] = init
            return init
        if key in self._packings:
            return self.pack(key, init)
        home = self.make_home(key, init.numel(), init.dtype, init.device)
        self.moves.to_home(home, 0, init.detach())
        self.moves.settle()
        home.settle()  # a write under way would arrive after what the caller writes
        return home.tensor

    def make_home(self, key: str, numel: int, dtype: torch.dtype, device: torch.device) -> Home:
        """Room for a tensor off the device; what it holds is arbitrary."""
        split = self.splits[_kind(key)]
        on_disk = file_numel(numel, split)
        home = Home(numel, dtype, on_disk, self.volume, pinned=device.type == "cuda")
        self._homes[key] = home
        return home

    def stays(self, key: str, numel: int) -> bool:
        """Does this tensor stay on the device?"""
        unit, _, name = key.rpartition("/")
        kind = {"param": "param", "grad": "grad"}.get(name, "master")
        if (unit, kind) not in self._choices:
            self._choices[unit, kind] = self._rounding[kind].stays(numel)
        return self._choices[unit, kind]

    def home(self, key: str) -> Tensor:
        """The live bytes. Everything on its way there has arrived."""
        self._looked(key)
        if key in self._here:
            return self._here[key]
        found = self._packed.get(key) or self._homes[key]
        found.settle()
        return found.tensor

    def home_of(self, key: str) -> Home | None:
        """How to reach a tensor that is not on the device."""
        return self._homes.get(key)

    def lease(self, key: str, device: torch.device) -> HeldLease | MovedLease:
        """The tensor on a device: itself, or a copy that goes back if dirty."""
        self._looked(key)
        if key in self._here:
            return HeldLease(self._here[key])
        return MovedLease(self._homes[key], device)

    def _looked(self, key: str) -> None:
        """Somebody looks at a home: whoever keeps newer values than homes have puts them there first."""
        for looker in self.lookers:
            if (put_away := looker()) is not None:
                put_away()
        self._looks[key.rpartition("/")[0]] += 1

    def drop(self, key: str) -> None:
        """Forget a tensor and whatever else was kept of its unit; the keys are free again."""
        unit = key.rpartition("/")[0]
        self._here.pop(key, None)
        self._packed.pop(key, None)
        for name in [name for name in self._homes if name == key or _follows(name, unit)]:
            self._homes.pop(name).settle()
        for choice in [choice for choice in self._choices if choice[0] == unit]:
            del self._choices[choice]

    def bytes_by_tier(self) -> dict[str, int]:
        """What is held now; a thread that watches may ask."""
        homes = self.kept()
        return {
            "device": sum(tensor.nbytes for tensor in list(self._here.values())),
            "host": sum(home.host_bytes for home in homes),
            "nvme": sum(home.file_bytes for home in homes),
        }

    # -- away ----------------------------------------------------------------------------------------------

    def shares(self, device: torch.device) -> Shares:
        """What leaves the memory of a device; of a CPU, whose memory is the host's, only what is on disk.

        A share below 0 is held twice: a delayed update writes beside what is computed with meanwhile.
        """
        on_host = device.type == "cpu"
        gone = {kind: s.nvme if on_host else s.away for kind, s in self.splits.items()}
        policy, per_element = self.policy, 18  # master, gradient and two moments in fp32, a shard in bf16
        buffers = policy.depth * policy.chunk_numel * per_element if any(gone.values()) else 0
        if on_host and policy.update == "delayed":
            gone |= {kind: s.nvme - s.host for kind, s in self.splits.items() if kind != "moment"}
        elif on_host and policy.update == "speculative":
            buffers += policy.speculate_bytes
        if self.volume is not None:
            buffers += policy.pending_bytes
        grads = min(gone["grad"], self.splits["master"].away)  # it stays where its unit is updated
        return Shares(gone["param"], grads, gone["master"], gone["moment"], buffers)

    def apart(self, kind: Kind) -> bool:
        """Does any of this kind leave the device?"""
        return self.splits[kind].away > 0

    def fetch(self, key: str, out: Tensor) -> Ticket | None:
        """Start filling `out` [numel] from a tensor's home; None where a plain copy of it is as good."""
        if key in self._packed:
            return self._packed[key].fetch(self.moves, out)
        home = self._homes.get(key)
        if home is None or (home.file_bytes == 0 and out.device.type == "cpu"):
            return None
        return self.moves.from_home(home, 0, out)

    def landed(self) -> None:
        """Gradients on their way are in their homes. Raises AioError for the first that is not, once.

        An update that comes late may be writing to other homes meanwhile, and making them.
        """
        self.moves.settle()
        left = [home for key, home in list(self._homes.items()) if key.endswith("/grad")]
        _raise_first([error for home in left for error in home.abandon()])
        self._forget_pages()

    def settle(self) -> None:
        """Everything on its way has arrived, an update of the last step that comes late included.

        Collective where there is one: its weights are published. Raises AioError for the first that did not
        arrive, once.
        """
        for update in self.updates():
            update.settle()
        self.moves.settle()
        _raise_first(self.abandon())
        self._forget_pages()

    def _forget_pages(self) -> None:
        """What plain looks brought into memory of the file. Harmless to who reads or writes meanwhile."""
        for home in self.kept():
            home.forget()

    def abandon(self) -> list[BaseException]:
        """Every write is over, whatever became of it; what went wrong, told once."""
        return [error for home in self.kept() for error in home.abandon()]

    def paged(self, key: str) -> Callable[[], None] | None:
        """Of a tensor that is on disk, at least in part: what lets go of its pages in memory."""
        home = self._homes.get(key)
        return None if home is None or not home.file_bytes else home.forget

    def close(self) -> None:
        """Wait for what is under way and give the file back. The store is of no use afterwards."""
        for update in self.updates():
            update.close()
        self.moves.settle()
        if self.volume is not None:
            self.volume.close()
        if self.io is not None:
            self.io.close()


def _raise_first(errors: list[BaseException]) -> None:
    if errors:
        raise errors[0]


def _kind(key: str) -> Kind:
    return _KINDS.get(key.rpartition("/")[2], "moment")


def _follows(name: str, unit: str) -> bool:
    """Gradients and the optimizer's states go with their unit's master or shard."""
    home, _, what = name.rpartition("/")
    return home == unit and what not in ("param", "master")
