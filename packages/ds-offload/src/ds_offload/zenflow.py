"""ZenFlow's settings, and what follows from them before anything runs: bounds and bytes (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from ds_core.setup.config import Config

AUTO_LONGEST = 16  # steps that an automatic interval lasts at most: the bound on staleness


class ZenFlow(Config):
    """Important gradients now, the rest later (Lan et al., "ZenFlow", arXiv 2505.12242). Lossy by definition.

    Of every parameter with two or more dims, seen as [rows, columns], the `topk_ratio` of its columns with
    the largest squared gradient norm are updated at every step, from copies of their master and states on the
    device. Gradients of all other elements are added up on the host, and every `update_interval` steps the
    optimizer's rule is applied there once to their mean, as the paper and its implementation do: those
    elements take one step, of the learning rate of the interval's last step, where plain training takes
    `update_interval`. Parameters of fewer dims are always updated at once.

    With `overlap` a thread does that while the next interval trains, so elements outside of the selection lag
    at most `staleness` steps behind the gradients. "auto": see `ds_offload.zen_select`.
    """

    topk_ratio: float = Field(
        default=0.1, gt=0, le=1, description="share of columns that are updated at once"
    )
    select_interval: int | Literal["auto"] = Field(
        default="auto",
        description="steps between choices of columns; auto: when the choice has lost its worth",
    )
    update_interval: int | Literal["auto"] = Field(
        default=4, description="steps between updates of the rest; auto: when enough has been added up"
    )
    auto_ratio: float = Field(
        default=0.99, gt=0, le=1, description="auto: the share of parameters that must be due for an update"
    )
    warmup: int = Field(
        default=1, ge=1, description="first steps that are whole ones; the first is, as it makes the states"
    )
    overlap: bool = Field(default=True, description="update the rest in a thread, while the next steps run")

    @model_validator(mode="after")
    def _agree(self) -> ZenFlow:
        for name in ("select_interval", "update_interval"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ValueError(f'{name} = {value}: allowed are whole numbers from 1 on, and "auto"')
        if self.select_interval == "auto":
            return self
        longest = AUTO_LONGEST if self.update_interval == "auto" else self.update_interval
        least = longest * (2 if self.overlap else 1)
        if self.select_interval < least:
            raise ValueError(
                f"select_interval = {self.select_interval} with update_interval = {self.update_interval!r} "
                f"and overlap = {self.overlap}: columns are chosen between two updates of the rest, which "
                f"then cannot overlap anything; allowed are {least} and above, or set overlap=False"
            )
        return self

    @property
    def staleness(self) -> int:
        """A gradient outside of the selection is in the weights at most this many steps after it was made."""
        longest = AUTO_LONGEST if self.update_interval == "auto" else self.update_interval
        return longest * (2 if self.overlap else 1) - 1


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes per step and rank between device and host for the optimizer's sake, means over a whole interval.

    `to_host`: gradients. `to_device`: new parameters. `plain_*`: the same without ZenFlow. Selecting anew
    moves `selecting` bytes more each time, both ways together.
    """

    to_host: float
    to_device: float
    plain_to_host: float
    plain_to_device: float
    selecting: int

    @property
    def saved(self) -> float:
        """How many times fewer bytes than plain offload."""
        mine = self.to_host + self.to_device
        return (self.plain_to_host + self.plain_to_device) / mine if mine else float("inf")
