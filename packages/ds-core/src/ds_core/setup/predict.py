"""Bytes on one rank, part by part, of a model under given settings, before anything runs (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ds_core.setup.estimate import DTYPE_BYTES, Stage
from ds_core.setup.shape import Dims, Shape, Unit, within
from ds_core.state.layout import Cut
from ds_core.state.reduce import IN_FLIGHT
from ds_core.train.memory import Memory

Attention = Literal["sdpa", "eager"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What decides the bytes. Budgets are elements, with ds_zero's defaults; `states` as in Recipe.

    `grad_dtype` None: the masters' (fp32 in mixed precision). `on_meta`: built on the meta device, else whole
    on every rank, in `built_dtype`.
    """

    ranks: int = 1
    stage: Stage = 0
    dtype: str = "bfloat16"
    grad_dtype: str | None = None
    built_dtype: str = "float32"
    states: int = 2
    cut: Cut = "flat"
    micro_batch: int = 1
    accumulate: int = 1
    seq: int = 0
    recompute: bool = False
    attention: Attention = "sdpa"
    bucket_numel: int = 1_000_000
    prefetch_numel: int = 20_000_000
    keep_numel: int = 20_000_000
    persist_numel: int = 0
    on_meta: bool = True

    def __post_init__(self) -> None:
        for name in ("dtype", "grad_dtype", "built_dtype"):
            value = getattr(self, name)
            if value is not None and value not in DTYPE_BYTES:
                raise ValueError(f"{name} {value!r}; allowed: {', '.join(DTYPE_BYTES)}")
        for name in ("ranks", "micro_batch", "accumulate", "bucket_numel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"stage is {self.stage!r}; allowed: 0, 1, 2, 3")

    @property
    def low(self) -> bool:
        """Are there fp32 masters beside the parameters?"""
        return DTYPE_BYTES[self.dtype] < 4

    @property
    def param_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def grad_bytes(self) -> int:
        return DTYPE_BYTES[self.grad_dtype] if self.grad_dtype else 4

    @property
    def cuts(self) -> int:
        """Into how many shards a unit is cut."""
        return self.ranks if self.stage > 0 else 1


def predict(shape: Shape, settings: Settings, *, rank: int = 0) -> Memory:
    """The bytes of one rank, as the flat runtime allocates them.

    Parameters, gradients, optimizer state and buckets are exact, padding included; `gathered` is what the
    pass in definition order brings at most; activations follow `activation_bytes`, and are 0 where the
    model's dimensions or `seq` are not known.
    """
    s = settings
    kept = [s.stage < 3 or unit.numel < s.persist_numel for unit in shape.units]
    padded = [unit.padded(s.cuts, s.cut) for unit in shape.units]
    params = sum(n if keep else n // s.cuts for n, keep in zip(padded, kept, strict=True)) * s.param_bytes
    trained = [n for n, unit in zip(padded, shape.units, strict=True) if unit.trainable]
    masters = sum(n // s.cuts for n in trained) * 4 if s.low else 0
    states = sum(u.owned(s.cuts, rank if s.stage else 0, s.cut) for u in shape.units if u.trainable)
    whole_grads = s.stage == 0 or (s.stage == 1 and s.accumulate > 1)
    grads = sum(n if whole_grads else n // s.cuts for n in trained) * s.grad_bytes
    optimizer = masters + states * 4 * s.states
    activations = 0
    if shape.dims is not None and s.seq:
        activations = activation_bytes(shape.dims, s)
    built = DTYPE_BYTES[s.built_dtype]
    each = s.ranks if s.stage == 0 else 1  # what every rank holds is written by all of them together
    wide = [4 if s.low and unit.trainable else s.param_bytes for unit in shape.units]
    values = sum(n // s.cuts * size for n, size in zip(padded, wide, strict=True))
    saved = (values + optimizer - masters) // each
    return Memory(
        params=params,
        grads=grads,
        optimizer=optimizer,
        buckets=_buckets(trained, s),
        gathered=_gathered(shape, padded, kept, s) * s.param_bytes,
        activations=activations,
        loading=_loading(shape.units, padded, kept, s, built),
        host=max(0 if s.on_meta else shape.numel * built, saved),
    )


def _buckets(trained: list[int], s: Settings) -> int:
    """The most that is on its way at once: three neighbouring buckets, and what comes for two thirds of them.

    Every bucket is in the parameters' dtype. A reduction receives the other ranks' parts of its shard before
    it adds them up. At stage 0 the reduced bucket becomes the gradient where the dtypes are the same.
    """
    width = IN_FLIGHT + 1
    most = max((sum(trained[at : at + width]) for at in range(max(1, len(trained) - width + 1))), default=0)
    if s.stage == 0:
        return 0 if s.param_bytes == s.grad_bytes else most * s.param_bytes
    return (most + most // s.ranks * (s.ranks - 1)) * s.param_bytes


def _gathered(shape: Shape, padded: list[int], kept: list[bool], s: Settings) -> int:
    """Elements whole at once while a pass goes forward and back through the units in their order of use."""
    if s.stage < 3:
        return 0
    order, most = shape.order, 0
    tail = set(within(order[::-1], padded, s.keep_numel))
    for at, index in enumerate(order):
        others = [other for other in order[at + 1 :] if other != index]
        passed = tail & {use.unit for use in shape.uses[:at] if not use.lookup}
        forward = {index, *within(others, padded, s.prefetch_numel), *passed}
        # Backward: the unit after this one goes when its last gradient is taken, which may be later. One that
        # is used again before (a tied weight) stays until then.
        behind = within(order[:at][::-1], padded, s.prefetch_numel)
        again = set(order[:at]) & {use.unit for use in shape.uses[at:] if not use.lookup}
        backward = {*order[at : at + 2], *behind, *passed} - shape.looked_up | again
        for whole in (forward, backward):
            most = max(most, sum(padded[each] for each in whole if not kept[each]))
    return most


def _loading(units: tuple[Unit, ...], padded: list[int], kept: list[bool], s: Settings, built: int) -> int:
    """The peak while units are cut one after another: as built, flat, in their dtype, and cut."""
    done, most = 0, 0
    waiting = 0 if s.on_meta else sum(unit.numel for unit in units) * built
    for unit, numel, keep in zip(units, padded, kept, strict=True):
        cut = numel // s.cuts
        stays = (numel if keep else cut) * s.param_bytes + (cut * 4 if s.low and unit.trainable else 0)
        fresh = unit.numel * built if s.on_meta else 0
        whole = numel * s.param_bytes if s.param_bytes != built else 0
        most = max(
            most, waiting + done + fresh + numel * built + whole + (0 if keep else cut * s.param_bytes)
        )
        waiting -= 0 if s.on_meta else unit.numel * built
        done += stays
    return max(most, done)


def activation_bytes(dims: Dims, s: Settings) -> int:
    """What autograd keeps of one micro batch of a decoder, for its backward.

    For each token of a block, after Korthikanti et al., "Reducing Activation Recomputation in Large
    Transformer Models", 2022, section 4, with attention that never writes its scores: of each of two norms
    the input (hidden; an RMS norm in fp32, with the normed values beside it) and the output (hidden);
    queries, keys, values and attended values ((2 heads + 2 kv_heads) x head_dim), normed queries and keys as
    norms; `mlp_saves` x intermediate, for each of a token's experts with its input and output (2 hidden).
    "eager" attention adds the scores, heads x seq in `dtype` and in fp32. With recompute a block keeps its
    input (hidden), and one block at a time has all of the above. Outside of the blocks: the last norm, and of
    the logits (vocab) `dtype`, fp32, their log-softmax and its gradient.
    """
    size, tokens = s.param_bytes, s.micro_batch * s.seq
    normed = 4 + size if dims.rms_norm else size
    queries, keys = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    block = 2 * dims.hidden * (normed + size) + 2 * (queries + keys) * size
    block += (queries + keys) * normed if dims.qk_norm else 0
    mlp = dims.mlp_saves * dims.intermediate
    block += (dims.experts_per_token * (mlp + 2 * dims.hidden) if dims.experts else mlp) * size
    if s.attention == "eager":
        block += dims.heads * s.seq * (size + 4)
    blocks = dims.layers * dims.hidden * size + block if s.recompute else dims.layers * block
    rest = dims.hidden * (normed + size) + dims.vocab * (size + 12)
    return tokens * (blocks + rest)
