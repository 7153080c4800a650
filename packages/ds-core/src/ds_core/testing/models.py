"""Tiny seeded models, one for each corner that sharding must turn, with data that splits evenly by rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Batch = Mapping[str, Tensor]

ROWS = 2  # per rank and micro batch
LENGTH = 5
VOCAB = 17


@dataclass(frozen=True)
class Case:
    """One model with its data and losses: functions of seeds, so each rank can build all of it.

    `losses` returns one or more scalars in fp32; training minimises their sum.
    """

    build: Callable[[], nn.Module]
    make_batch: Callable[[int, int], Batch]
    losses: Callable[[nn.Module, Batch], list[Tensor]]

    def rank_batch(self, seed: int, rank: int, ranks: int) -> Batch:
        """This rank's rows of the global batch of `seed`."""
        return split(self.make_batch(seed, ranks), ranks)[rank]


def split(batch: Batch, ranks: int) -> list[Batch]:
    """Cut a global batch by rows into one batch per rank."""
    parts = {name: tensor.chunk(ranks) for name, tensor in batch.items()}
    return [{name: chunks[rank] for name, chunks in parts.items()} for rank in range(ranks)]


# --- the models ---


class Residual(nn.Module):
    """x + down(gelu(up(norm(x)))): the block most cases are made of."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Stack(nn.Module):
    """Linear in, blocks, linear out; with `sizes` odd, nothing divides by anything."""

    def __init__(self, sizes: tuple[int, int, int] = (8, 12, 4), depth: int = 3) -> None:
        super().__init__()
        width, hidden, out = sizes
        self.inp = nn.Linear(6, width)
        self.blocks = nn.ModuleList(Residual(width, hidden) for _ in range(depth))
        self.head = nn.Linear(width, out, bias=out > 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


class Odd(Stack):
    """Prime sizes, a scalar parameter and a one-element one."""

    def __init__(self) -> None:
        super().__init__((7, 13, 5), depth=2)
        self.temperature = nn.Parameter(torch.tensor(1.25))
        self.shift = nn.Parameter(torch.tensor([0.1]))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.temperature + self.shift


class Attention(nn.Module):
    """One causal head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and a residual feed-forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.feed = Residual(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed(x + self.attention(x))  # type: ignore[no-any-return]


class TinyLM(nn.Module):
    """A decoder whose head is its embedding; `recompute` names a kind of activation checkpointing."""

    scale: Tensor

    def __init__(self, recompute: str | None = None, tied: bool = True) -> None:
        super().__init__()
        width = 8
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(Layer(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5))
        self._recompute = recompute

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            if self._recompute is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self._recompute == "reentrant")
        return self.head(self.norm(x)) * self.scale  # type: ignore[no-any-return]


class Twice(nn.Module):
    """The same block runs three times, twice of them in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 8)
        self.shared = Residual(8, 12)
        self.blocks = nn.ModuleList([Residual(8, 12)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.shared(self.inp(x)))
        return self.head(self.shared(self.blocks[0](x)))  # type: ignore[no-any-return]


class Unused(Stack):
    """A whole module, and one parameter of a used block, never take part."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.spare = Residual(8, 12)
        self.blocks[0].register_parameter("idle", nn.Parameter(torch.full((3,), 0.5)))


class UnusedSomewhere(Stack):
    """A block that only ranks with an odd number take part in: `use` is a property of their rows."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.sometimes = Residual(8, 12)

    def forward(self, x: Tensor, use: Tensor) -> Tensor:  # type: ignore[override]
        x = self.blocks[0](self.inp(x))
        if bool(use.any()):
            x = self.sometimes(x)
        return self.head(self.blocks[1](x))  # type: ignore[no-any-return]


class Frozen(Stack):
    """A frozen block, a block with frozen and trainable parameters, and one trainable adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].requires_grad_(False)
        for name, parameter in self.blocks[1].named_parameters():
            parameter.requires_grad_(name not in ("up.weight", "up.bias", "norm.bias"))
        self.adapter = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.inp(x))
        x = self.blocks[1](x) + self.adapter(x)
        return self.head(self.blocks[2](x))  # type: ignore[no-any-return]


class TwoHeads(nn.Module):
    """Keyword-only inputs and a dict of outputs, one of them None: what hooks must look inside of."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Residual(8, 12) for _ in range(2))
        self.heads = nn.ModuleDict({"class": nn.Linear(8, 4), "size": nn.Linear(8, 1)})

    def forward(self, *, x: Tensor) -> dict[str, Tensor | None]:
        x = self.inp(x)
        early = self.heads["size"](self.blocks[0](x))
        late = self.heads["class"](self.blocks[1](x))
        return {"class": late, "size": early.squeeze(-1), "extra": None}


class Few(nn.Module):
    """Three units of one, one and two elements: fewer than the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(2))
        self.head = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.sum(-1, keepdim=True)
        for block in self.blocks:
            x = torch.tanh(block(x)) + x
        return self.head(x)  # type: ignore[no-any-return]


class TiedBlocks(Stack):
    """Blocks that share a weight, so that it belongs to more than one unit."""

    def __init__(self) -> None:
        super().__init__()
        last = self.blocks[2]
        last.get_submodule("up").weight = self.blocks[0].get_parameter("up.weight")


class Gained(Residual):
    """A block of single precision parameters with one in double precision."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * self.gain).to(x.dtype))


class MixedDtypes(Stack):
    """One block's parameters have two dtypes."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.blocks[0] = Gained(8, 12)


class Adapted(nn.Module):
    """A frozen bf16 matrix with a trainable fp32 detour of rank 2 (LoRA, Hu et al. 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width, dtype=torch.bfloat16).requires_grad_(False)
        self.down = nn.Linear(width, 2, bias=False)
        self.up = nn.Linear(2, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = self.base(x.to(self.base.weight.dtype))
        return base.to(x.dtype) + self.up(self.down(x))  # type: ignore[no-any-return]


class Lora(nn.Module):
    """Three adapted layers and nothing else that trains but the head's bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Adapted(6) for _ in range(3))
        self.head = nn.Linear(6, 4)
        self.head.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)  # type: ignore[no-any-return]


# --- their data and losses ---


def _vectors(seed: int, ranks: int, *, outputs: int = 4) -> Batch:
    """x [rows, 6], y [rows, outputs], label [rows], use [rows] (true on odd ranks)."""
    generator = torch.Generator().manual_seed(seed)
    rows = ROWS * ranks
    return {
        "x": torch.randn(rows, 6, generator=generator),
        "y": torch.randn(rows, outputs, generator=generator),
        "label": torch.randint(4, (rows,), generator=generator),
        "use": torch.arange(rows) // ROWS % 2 == 1,
    }


def _tokens(seed: int, ranks: int) -> Batch:
    """tokens [rows, length + 1]."""
    generator = torch.Generator().manual_seed(seed)
    return {"tokens": torch.randint(VOCAB, (ROWS * ranks, LENGTH + 1), generator=generator)}


def _input(model: nn.Module, batch: Batch) -> Tensor:
    """x in the dtype that the model computes in."""
    trained = (param for param in model.parameters() if param.requires_grad)
    return batch["x"].to(next(trained).dtype)


def _squared(model: nn.Module, batch: Batch) -> list[Tensor]:
    return [F.mse_loss(model(_input(model, batch)).float(), batch["y"])]


def _squared_with_use(model: nn.Module, batch: Batch) -> list[Tensor]:
    return [F.mse_loss(model(_input(model, batch), use=batch["use"]).float(), batch["y"])]


def _next_token(model: nn.Module, batch: Batch) -> list[Tensor]:
    logits = model(batch["tokens"][:, :-1])
    return [F.cross_entropy(logits.float().flatten(0, 1), batch["tokens"][:, 1:].flatten())]


def _two(model: nn.Module, batch: Batch) -> list[Tensor]:
    out = model(x=_input(model, batch))
    return [
        F.cross_entropy(out["class"].float(), batch["label"]),
        0.3 * F.mse_loss(out["size"].float(), batch["y"][:, 0]),
    ]


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Build on the CPU from seed 0, leaving the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def _vector_case(build: Callable[[], nn.Module], outputs: int = 4) -> Case:
    return Case(partial(_seeded, build), partial(_vectors, outputs=outputs), _squared)


def _token_case(build: Callable[[], nn.Module]) -> Case:
    return Case(partial(_seeded, build), _tokens, _next_token)


CASES: dict[str, Case] = {
    "mlp": _vector_case(Stack),
    "tied": _token_case(TinyLM),
    "tied_blocks": _vector_case(TiedBlocks),
    "twice": _vector_case(Twice),
    "unused": _vector_case(Unused),
    "unused_on_one_rank": Case(partial(_seeded, UnusedSomewhere), _vectors, _squared_with_use),
    "frozen": _vector_case(Frozen),
    "two_losses": Case(partial(_seeded, TwoHeads), _vectors, _two),
    "checkpoint_reentrant": _token_case(partial(TinyLM, "reentrant")),
    "checkpoint_non_reentrant": _token_case(partial(TinyLM, "non_reentrant")),
    "odd": _vector_case(Odd, outputs=5),
    "few_elements": _vector_case(Few, outputs=1),
    "mixed_dtypes": _vector_case(MixedDtypes),
    "lora": _vector_case(Lora),
}
