"""A decoder-only transformer: RMSNorm, rotary positions, SwiGLU, tied or separate head.

Shape suffixes: B batch, T time, D width, H heads, K width of a head, F hidden width, V vocabulary.
Plain PyTorch: nothing in this file knows about ZeRO.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a target of this value costs nothing
_INIT_STD = 0.02


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """Everything that decides the parameters' shapes, and two things that do not (`seq`, activations)."""

    vocab: int
    dim: int
    layers: int
    heads: int
    hidden: int
    tied: bool = False
    seq: int = 256
    rope_base: float = 10_000.0
    checkpoint_activations: bool = False


# name -> (dim, layers, heads, hidden); the names count parameters with 4096 tokens and a head of its own
SIZES: dict[str, tuple[int, int, int, int]] = {
    "100k": (64, 2, 2, 128),  # for tests: counted with bytes as tokens
    "2m": (128, 4, 4, 384),
    "10m": (384, 4, 6, 1024),
    "30m": (512, 8, 8, 1408),
    "125m": (768, 17, 12, 2048),
    "350m": (1024, 27, 16, 2752),
    "1b": (2048, 20, 16, 5504),
    "7b": (4096, 32, 32, 12288),
}


def gpt_config(size: str, vocab: int, **extra: Any) -> GPTConfig:
    """The configuration behind a name of `SIZES`. Raises ValueError naming the sizes there are."""
    if size not in SIZES:
        raise ValueError(f"no model size {size!r}; sizes: {', '.join(SIZES)}")
    dim, layers, heads, hidden = SIZES[size]
    return replace(GPTConfig(vocab, dim, layers, heads, hidden), **extra)


class Linear(nn.Linear):
    """No bias, normal initialisation of a given deviation."""

    def __init__(self, num_in: int, num_out: int, std: float = _INIT_STD) -> None:
        self.std = std
        super().__init__(num_in, num_out, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class Embedding(nn.Embedding):
    """Normal initialisation with the deviation of the other weights, so that it can double as the head."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=_INIT_STD)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.dim, 3 * config.dim)
        self.out = Linear(config.dim, config.dim, _INIT_STD / math.sqrt(2 * config.layers))

    def forward(self, x_BTD: Tensor, rope_2TK: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q_BHTK, k_BHTK, v_BHTK = rotate(qkv[0], rope_2TK), rotate(qkv[1], rope_2TK), qkv[2]
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        y_BTD: Tensor = self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))
        return y_BTD


class SwiGLU(nn.Module):
    """silu(gate) * up, projected back."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.dim, 2 * config.hidden)
        self.down = Linear(config.hidden, config.dim, _INIT_STD / math.sqrt(2 * config.layers))

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
        y_BTD: Tensor = self.down(F.silu(gate_BTF) * up_BTF)
        return y_BTD


class Block(nn.Module):
    """One layer: attention, then SwiGLU, each on a normalised copy of the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim)
        self.mlp = SwiGLU(config)

    def forward(self, x_BTD: Tensor, rope_2TK: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope_2TK)
        x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return x_BTD


class GPT(nn.Module):
    """Tokens in, logits out; with targets, the cross entropy in nats."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = Linear(config.dim, config.vocab)
        if config.tied:
            self.head.weight = self.embed.weight

    def forward(self, ids_BT: Tensor, targets_BT: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """Shapes: [B, T] int64 -> logits [B, T, V]; with targets a scalar ("mean" or "sum" over tokens)."""
        x_BTD = self.embed(ids_BT)
        rope_2TK = rotary_table(ids_BT.shape[1], self.config, x_BTD)
        for layer in self.layers:
            if self.config.checkpoint_activations and self.training:
                x_BTD = checkpoint(layer, x_BTD, rope_2TK, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, rope_2TK)
        logits_BTV: Tensor = self.head(self.norm(x_BTD))
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORE, reduction=reduction
        )


def rotary_table(num_positions: int, config: GPTConfig, like: Tensor) -> Tensor:
    """cos and sin of every position's angles, [2, T, K], on `like`'s device and in its dtype.

    Computed in fp32 at each forward: cheaper than it looks, and no buffer to restore from a checkpoint.
    """
    width = config.dim // config.heads
    exponents = torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width
    positions = torch.arange(num_positions, device=like.device, dtype=torch.float32)
    angles_TK = torch.outer(positions, config.rope_base**-exponents).repeat(1, 2)
    return torch.stack((angles_TK.cos(), angles_TK.sin())).to(like.dtype)


def rotate(x_BHTK: Tensor, rope_2TK: Tensor) -> Tensor:
    """Turn each pair (i, i + K/2) of a head by its position's angle (RoFormer, eq. 34)."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * rope_2TK[0] + torch.cat((-second, first), dim=-1) * rope_2TK[1]


def count_parameters(config: GPTConfig) -> int:
    """Parameters of the model, without allocating it."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt: Sequence[int],
    num_new: int,
    *,
    context: int,
    seed: int,
    temperature: float = 0.8,
) -> list[int]:
    """Continue `prompt` by `num_new` tokens, recomputing the whole context for each (no KV cache).

    Collective: where the parameters are sharded, every rank calls it with the same arguments; the number of
    forwards does not depend on what is drawn.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(num_new):
        window = torch.tensor([ids[-context:]], device=device)
        logits_V = model(window)[0, -1].float().cpu()
        ids.append(int(torch.multinomial(torch.softmax(logits_V / temperature, 0), 1, generator=generator)))
    model.train(was_training)
    return ids[len(prompt) :]
