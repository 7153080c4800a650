"""Which samples each rank sees: one global order per epoch, resumable at any world size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ds_core.state.shard import FlatShard, Json, SavedTensor
from ds_core.train.lr import no_tensors

Tail = Literal["drop", "pad"]


def epoch_order(length: int, seed: int, epoch: int, *, shuffle: bool = True) -> Tensor:
    """[length] the order of samples in an epoch: a pure function of its arguments, the same on every rank."""
    if not shuffle:
        return torch.arange(length)
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(length, generator=generator)


class ResumableSampler(Sampler[list[int]]):
    """Batches of indices for one rank: give it to a DataLoader as `batch_sampler`.

    Each micro step takes the next `micro_batch * world` samples of the epoch's order; rank r has the r-th
    part of them. So the samples of an optimizer step depend on the global batch alone, not on how many
    ranks or micro steps share it. `tail` says what happens to samples that do not fill the last global
    batch (`micro_batch * accumulate * world`): "drop" leaves them out, "pad" fills up from the epoch's start.

    Iterating changes nothing: `advance` is called when a batch has been used (ResumableLoader does), so
    workers that read ahead cannot lose samples. State: epoch and samples consumed, as JSON.
    """

    def __init__(
        self,
        length: int,
        micro_batch: int,
        *,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        tail: Tail = "drop",
    ) -> None:
        for name, value in (("length", length), ("micro_batch", micro_batch), ("accumulate", accumulate)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} does not fit a world of {world}; allowed: 0 to {world - 1}")
        if tail not in ("drop", "pad"):
            raise ValueError(f'tail is {tail!r}; allowed: "drop" (leave out), "pad" (repeat from the start)')
        self.length, self.micro_batch, self.accumulate = length, micro_batch, accumulate
        self.rank, self.world = rank, world
        self.seed, self.shuffle, self.tail = seed, shuffle, tail
        self.epoch = 0
        self.consumed = 0  # samples of finished optimizer steps
        self._micro = 0  # micro batches into the present one
        if self.epoch_samples == 0:
            raise ValueError(
                f"{length} samples do not fill one global batch of {self.global_batch} (micro batch"
                f" {micro_batch} x accumulation {accumulate} x {world} ranks);"
                " use tail='pad', smaller batches or more data"
            )

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.micro_batch * self.accumulate * self.world

    @property
    def epoch_samples(self) -> int:
        """Samples that an epoch hands out over all ranks: whole global batches."""
        whole, rest = divmod(self.length, self.global_batch)
        return (whole + (1 if rest and self.tail == "pad" else 0)) * self.global_batch

    def steps_left(self) -> int:
        """Optimizer steps to go in this epoch, the present one included."""
        rest = max(0, self.length - self.consumed)
        return -(-rest // self.global_batch) if self.tail == "pad" else rest // self.global_batch

    def __len__(self) -> int:
        """Micro batches to go in this epoch."""
        return self.steps_left() * self.accumulate - self._micro

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.length, self.seed, self.epoch, shuffle=self.shuffle)
        take = self.micro_batch * self.world
        start = self.consumed + self._micro * take + self.rank * self.micro_batch
        for step in range(len(self)):
            begin = start + step * take
            yield [int(order[at % self.length]) for at in range(begin, begin + self.micro_batch)]

    def advance(self, micro_batches: int = 1) -> None:
        """Note that so many of this rank's batches were used; the epoch turns after its last one."""
        for _ in range(micro_batches):
            self._micro += 1
            if self._micro == self.accumulate:
                self.consumed += self.global_batch
                self._micro = 0
                self._turn()

    def _turn(self) -> None:
        if self.steps_left() == 0:
            self.epoch += 1
            self.consumed = 0

    def state_dict(self) -> dict[str, Json]:
        """Where the last whole optimizer step ended; micro batches after it are handed out again."""
        names = ("epoch", "consumed", "seed", "shuffle", "length")
        return {name: getattr(self, name) for name in names}

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        """A sampler has no tensors: anything saved is an error."""
        return no_tensors("ResumableSampler", saved)

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        """Continue the saved order, at this sampler's own world size and batch sizes.

        Raises: ValueError when the data set has another length, since the order would be another.
        """
        if values.get("length") != self.length:
            raise ValueError(
                f"the checkpoint's sampler was over {values.get('length')} samples, this one is over"
                f" {self.length}; give it the same data, or leave the sampler out of the parts to load"
            )
        self.epoch, self.consumed = int(values["epoch"]), int(values["consumed"])
        self.seed, self.shuffle = int(values["seed"]), bool(values["shuffle"])
        self._micro = 0
        self._turn()


class ResumableLoader:
    """A DataLoader over a ResumableSampler that notes each batch as it is handed out.

    A loop over it runs to the end of the epoch, from wherever the sampler stands; the next loop is the next
    epoch.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: ResumableSampler,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate_fn,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        """Micro batches to go in this epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self.sampler.advance()
            yield batch

    def state_dict(self) -> dict[str, Json]:
        return self.sampler.state_dict()

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        return self.sampler.load_targets(saved)

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        self.sampler.load_state_dict(values)
