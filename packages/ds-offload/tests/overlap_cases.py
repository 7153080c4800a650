"""A small model in several units, trained with any store: what the tests of overlap modes compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_core.state.owner import ReplicatedOwner
from ds_core.train.joint import JointOptimizer
from ds_core.train.optim import ShardedOptimizer
from ds_kernels.optim import FusedAdamW
from ds_offload import TieredStore

WIDTH = 96  # a layer has 9312 elements: three chunks of 4096


def joined(params: Any) -> torch.optim.Optimizer:
    """Matrices by one rule, the rest of each unit by another."""
    known = list(params)
    matrices, rest = [p for p in known if p.dim() > 1], [p for p in known if p.dim() == 1]
    return JointOptimizer([torch.optim.AdamW(matrices, lr=1e-2), torch.optim.SGD(rest, lr=0.1, momentum=0.9)])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "fused": lambda params: FusedAdamW(params, lr=1e-2, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True),
    "joined": joined,
    "plain sgd": lambda params: torch.optim.SGD(params, lr=1e-2),
}


class Run:
    """A model on one rank with its optimizer, and the store if there is one."""

    def __init__(
        self, optimizer: str = "adamw", dtype: torch.dtype | None = None, layers: int = 6, **settings: Any
    ) -> None:
        torch.manual_seed(0)
        stack: list[nn.Module] = []
        for _ in range(layers):
            stack += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
        self.model = nn.Sequential(*stack)
        made = OPTIMIZERS[optimizer](self.model.parameters())
        self.store = TieredStore(**settings) if settings else None
        self.owner = ReplicatedOwner(self.model, dtype=dtype, store=self.store, bucket_numel=1)
        self.sharded = ShardedOptimizer(made, self.owner)
        self.optimizer = made

    @property
    def update(self) -> Any:
        """The store's update of this optimizer."""
        return self.sharded.elsewhere

    def loss(self, seed: int, scale: float = 1.0) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(8, WIDTH, generator=draw).to(self.owner.units[0].dtype)
        return self.model(x).float().square().mean() * scale

    def step(self, seed: int, micro: int = 1) -> None:
        for number in range(micro):
            self.loss(100 * seed + number).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self) -> dict[str, Tensor]:
        """Everything that training left: parameters, masters, states."""
        self.owner.settle()
        found = {name: param.detach().clone() for name, param in self.model.named_parameters()}
        found |= {f"master {unit.key}": unit.values().detach().clone() for unit in self.owner.trainable}
        for piece in self.sharded.pieces:
            for name, value in self.optimizer.state.get(piece.param, {}).items():
                if isinstance(value, Tensor):
                    found[f"{piece.fqn}/{name}"] = value.detach().clone()
        return found


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Equal, bit for bit."""
    assert sorted(one) == sorted(two)
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, f"{len(different)} of {len(one)} differ: {different[:4]}"
