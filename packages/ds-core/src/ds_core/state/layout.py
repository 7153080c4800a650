"""Flat buckets as data: slots, cuts, and which part of which slot a rank owns (pure)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Cut = Literal["flat", "whole"]
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one parameter sits in a flat bucket: elements [start, end)."""

    fqn: str
    shape: torch.Size
    start: int
    end: int

    @property
    def numel(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Overlap:
    """The part of `slot` that one rank owns.

    `local` is a range of the rank's shard, `begin` the first flat element of the parameter it holds.
    """

    index: int
    slot: Slot
    local: tuple[int, int]
    begin: int


@dataclass(frozen=True, slots=True)
class BucketLayout:
    """How a bucket is filled and cut into `world` equal shards. `numel` includes all padding."""

    slots: tuple[Slot, ...]
    numel: int
    world: int

    @property
    def shard_numel(self) -> int:
        return self.numel // self.world

    @property
    def used_numel(self) -> int:
        """Elements that belong to parameters."""
        return sum(slot.numel for slot in self.slots)

    def overlaps(self, rank: int) -> list[Overlap]:
        """The parts of slots that `rank` owns, in order."""
        low = rank * self.shard_numel
        high = low + self.shard_numel
        found = []
        for index, slot in enumerate(self.slots):
            start, end = max(slot.start, low), min(slot.end, high)
            if start < end:
                found.append(Overlap(index, slot, (start - low, end - low), start - slot.start))
        return found

    def overlap(self, rank: int, index: int) -> Overlap | None:
        """The part of slot `index` that `rank` owns, if it owns any."""
        return next((part for part in self.overlaps(rank) if part.index == index), None)


def plan_layout(
    params: Iterable[tuple[str, Sequence[int]]], world: int, *, align: int = 8, cut: Cut = "flat"
) -> BucketLayout:
    """Place parameters one after another and cut the row of elements into `world` equal shards.

    `flat` cuts anywhere: at most `world * align - 1` elements of padding. `whole` cuts only between
    parameters (for optimizers that look at whole matrices): each parameter goes, largest first, to the
    rank that holds least, and shards are padded to the fullest one. `align` is in elements, so that
    every shard starts on a vector boundary.
    """
    if world < 1 or align < 1:
        raise ValueError(f"world and align must be at least 1, got world={world}, align={align}")
    sized = [(fqn, torch.Size(shape), math.prod(shape)) for fqn, shape in params]
    if cut == "flat":
        slots, at = [], 0
        for fqn, shape, numel in sized:
            slots.append(Slot(fqn, shape, at, at + numel))
            at += numel
        quantum = world * align
        return BucketLayout(tuple(slots), max(1, math.ceil(at / quantum)) * quantum, world)
    held: list[list[int]] = [[] for _ in range(world)]
    load = [0] * world
    for index in sorted(range(len(sized)), key=lambda i: (-sized[i][2], i)):
        rank = min(range(world), key=lambda r: (load[r], r))
        held[rank].append(index)
        load[rank] += sized[index][2]
    shard = max(1, math.ceil(max(load) / align)) * align
    placed: dict[int, Slot] = {}
    for rank, indices in enumerate(held):
        at = rank * shard
        for index in sorted(indices):
            fqn, shape, numel = sized[index]
            placed[index] = Slot(fqn, shape, at, at + numel)
            at += numel
    return BucketLayout(tuple(placed[i] for i in range(len(sized))), shard * world, world)


def flat_range_boxes(shape: Sequence[int], start: int, end: int) -> list[Box]:
    """A flat range [start, end) of a row-major tensor as at most 2*ndim-1 (offsets, sizes) boxes, in order.

    The bridge from flat shards to checkpoints: boxes are what any other cut can read back.
    """
    if start >= end:
        return []
    if len(shape) == 0:
        return [((), ())]
    if len(shape) == 1:
        return [((start,), (end - start,))]
    row = math.prod(shape[1:])
    first, boxes = start // row, []
    if start % row or end < (first + 1) * row:  # a ragged head, or all of it inside one row
        stop = min(end, (first + 1) * row)
        inner = flat_range_boxes(shape[1:], start - first * row, stop - first * row)
        boxes += [((first, *offsets), (1, *sizes)) for offsets, sizes in inner]
        start, first = stop, first + 1
    if end - start >= row:
        rows = (end - start) // row
        boxes.append(((first, *[0] * (len(shape) - 1)), (rows, *shape[1:])))
        start, first = start + rows * row, first + rows
    if start < end:
        inner = flat_range_boxes(shape[1:], 0, end - start)
        boxes += [((first, *offsets), (1, *sizes)) for offsets, sizes in inner]
    return boxes
