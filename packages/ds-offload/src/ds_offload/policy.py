"""Tiered: who lives where, as one frozen value; and the shares it is made of (pure)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ds_core.setup.config import Config
from ds_offload.zenflow import ZenFlow

Tier = Literal["device", "host", "nvme"]
TIERS: tuple[Tier, ...] = ("device", "host", "nvme")
PAGE_NUMEL = 4096  # shares are cut at multiples of this many elements: whole pages of every dtype


@dataclass(frozen=True, slots=True)
class Split:
    """Shares of one kind of state per tier, which sum to 1. Read from "nvme" or "0.3 device / 0.7 host"."""

    device: float = 0.0
    host: float = 0.0
    nvme: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Split:
        """Raises ValueError for an unknown tier, one named twice, or shares that do not sum to 1."""
        shares: dict[str, float] = {}
        for part in text.split("/"):
            words = part.split()
            number, name = (words[0], words[1]) if len(words) == 2 else ("1", part.strip())
            if name not in TIERS or name in shares or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", number):
                raise ValueError(
                    f"{text!r} is no split: give a tier ({', '.join(TIERS)}) or shares of several, such as "
                    '"0.3 device / 0.5 host / 0.2 nvme"'
                )
            shares[name] = float(number)
        if abs(sum(shares.values()) - 1.0) > 1e-6:
            raise ValueError(f"{text!r}: the shares sum to {sum(shares.values()):g}; they must sum to 1")
        return cls(**shares)

    @property
    def away(self) -> float:
        """The share that leaves the device."""
        return self.host + self.nvme

    def __str__(self) -> str:
        named = [(share, tier) for tier in TIERS if (share := getattr(self, tier))]
        return " / ".join(tier if share == 1 else f"{share:g} {tier}" for share, tier in named)


def file_numel(numel: int, split: Split) -> int:
    """Of `numel` elements that left the device, how many are on disk: the share, behind whole pages."""
    if not split.away:
        return 0
    share = split.nvme / split.away
    if share in (0.0, 1.0):
        return int(numel * share)
    return numel - min(numel, round(numel * (1 - share) / PAGE_NUMEL) * PAGE_NUMEL)


class Rounding:
    """Units stay on the device whole or not at all: which do, so that the share is met as they come."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.seen = self.stayed = 0  # elements

    def stays(self, numel: int) -> bool:
        """Does the next unit stay? The error never exceeds half the largest unit."""
        self.seen += numel
        stays = self.share > 0 and self.stayed + numel / 2 <= self.share * self.seen
        self.stayed += numel * stays
        return stays


class Tiered(Config):
    """Where each kind of training state lives between its uses, and how it travels.

    Every kind takes one tier or shares of several. "host" is memory of the host (pinned where the device is
    a GPU), "nvme" a file in the folder `nvme`. Where parameters are fp32, their shards at stage 3 are the
    masters and live where masters do; below stage 3 parameters stay whole on the device.
    """

    nvme: str | None = Field(default=None, description="folder on a fast disk; needed when a share is on it")
    params: str = Field(default="device", description="shards of low precision parameters at stage 3")
    grads: str = Field(default="host", description="reduced gradients, from the backward to the step")
    masters: str = Field(default="host", description="what the optimizer updates")
    moments: str = Field(default="host", description="the optimizer's states")
    chunk_numel: int = Field(
        default=1 << 22, ge=PAGE_NUMEL, description="elements of a shard that are fetched and updated at once"
    )
    depth: int = Field(default=3, ge=1, le=16, description="chunks under way: fetched, updated, flushed")
    queue_depth: int = Field(default=64, ge=1, le=4096, description="blocks that are with the disk at once")
    block_bytes: int = Field(default=1 << 20, ge=4096, description="bytes of a block")
    params_format: Literal["int8", "int4"] | None = Field(
        default=None, description="how frozen matrices that leave the device are kept; None: as they are"
    )
    pending_bytes: int = Field(
        default=256 << 20, ge=1 << 20, description="bytes on their way to the disk before a write waits"
    )
    zenflow: ZenFlow | None = Field(
        default=None, description="important columns now, the rest later (lossy); None: everything at once"
    )

    update: Literal["step", "speculative", "delayed"] = Field(
        default="step",
        description="when masters change: in the step; during the backward, taken back if that was wrong; "
        "or a step late, beside the next forward and backward, which is another training",
    )
    speculate_bytes: int = Field(
        default=1 << 30, ge=0, description="update=speculative: memory for updates that are not proven yet"
    )
    delay_after: int = Field(
        default=40, ge=0, description="update=delayed: steps of this process that are plain at first"
    )

    @field_validator("params", "grads", "masters", "moments")
    @classmethod
    def _split(cls, text: str) -> str:
        return str(Split.parse(text))

    @model_validator(mode="after")
    def _place(self) -> Tiered:
        wanting = [kind for kind, split in self.splits().items() if split.nvme]
        if wanting and self.nvme is None:
            raise ValueError(
                f"{', '.join(wanting)} are to live on nvme, and no folder is given: set nvme=<folder>"
            )
        if self.params_format is not None and not self.splits()["params"].away:
            raise ValueError(
                f'params_format = "{self.params_format}" is for weights off the device, and params = '
                '"device": set params to "host" or "nvme"'
            )
        if self.zenflow is not None and self.update != "step":
            raise ValueError(
                f'update = "{self.update}" with zenflow=ZenFlow(...): each says another order of the '
                'same update; set update="step", or leave zenflow out'
            )
        if self.splits()["masters"].device != self.splits()["moments"].device:
            raise ValueError(
                f'masters = "{self.masters}" and moments = "{self.moments}" leave different shares on the '
                "device; a unit is updated where both are, so give them the same device share"
            )
        splits, asked = self.splits(), "grads" in self.model_fields_set
        if asked and splits["grads"].away and not splits["masters"].away:
            raise ValueError(
                f'grads = "{self.grads}" leave the device, and masters = "{self.masters}" are updated there, '
                'which needs them there: set grads="device", or let masters and moments leave, too'
            )
        return self

    def splits(self) -> Mapping[str, Split]:
        """The shares of every kind."""
        return {kind: Split.parse(getattr(self, kind)) for kind in ("params", "grads", "masters", "moments")}
