"""A model as sizes: its flat units and its blocks' dimensions, from a module or a Hugging Face config."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ds_core.state.layout import Cut, plan_layout
from ds_core.state.units import plan_units

_ALIASES: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "intermediate": ("moe_intermediate_size", "intermediate_size", "n_inner"),
    "vocab": ("vocab_size",),
    "experts": ("num_experts", "num_local_experts"),
    "experts_per_token": ("num_experts_per_tok",),
    "positions": ("n_positions", "max_position_embeddings"),
}
# Architectures whose parameters follow from their config's standard keys. Every other one is built on the
# meta device by transformers.
_LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
_KNOWN = (*_LLAMAS, "gpt2")


@dataclass(frozen=True, slots=True)
class Dims:
    """The dimensions of a transformer's blocks, which decide its activations and its arithmetic."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    intermediate: int
    kv_heads: int
    head_dim: int
    mlp_saves: int = 4  # tensors of the intermediate size that autograd keeps: gated 4, a fused activation 2
    rms_norm: bool = True  # written out in fp32, as transformers does: keeps an fp32 copy and the normed one
    qk_norm: bool = False
    experts: int = 0
    experts_per_token: int = 1

    @property
    def mlp_matrices(self) -> int:
        """A gated MLP has three, any other two."""
        return 3 if self.mlp_saves == 4 else 2

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Dims:
        """Of a Hugging Face config's keys. Raises LookupError naming the keys that are missing."""
        found = {ours: _first(config, names) for ours, names in _ALIASES.items()}
        missing = [
            "|".join(_ALIASES[key]) for key in ("layers", "hidden", "heads", "vocab") if not found[key]
        ]
        if missing:
            raise LookupError(f"the config has no {', no '.join(missing)}: not a transformer of known keys")
        hidden, heads = int(found["hidden"]), int(found["heads"])
        kind = str(config.get("model_type"))
        act = str(config.get("hidden_act", config.get("activation_function", "gelu_new")))
        return cls(
            layers=int(found["layers"]),
            hidden=hidden,
            heads=heads,
            vocab=int(found["vocab"]),
            intermediate=int(found["intermediate"] or 4 * hidden),
            kv_heads=int(found["kv_heads"] or heads),
            head_dim=int(found["head_dim"] or hidden // heads),
            # transformers' gelu_new is written out: its input, tanh, two factors and the output stay
            mlp_saves=4 if kind in _LLAMAS else 5 if act == "gelu_new" else 2,
            rms_norm=kind in _LLAMAS,
            qk_norm=kind.startswith("qwen3"),
            experts=int(found["experts"] or 0),
            experts_per_token=int(found["experts_per_token"] or 1),
        )


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters that travel together: elements of each."""

    numels: tuple[int, ...]
    trainable: bool = True

    @property
    def numel(self) -> int:
        return sum(self.numels)

    def padded(self, ranks: int, cut: Cut = "flat") -> int:
        """Elements of the flat buffer, padding included, as the runtime lays it out."""
        return plan_layout(((str(i), (n,)) for i, n in enumerate(self.numels)), ranks, cut=cut).numel

    def owned(self, ranks: int, rank: int, cut: Cut = "flat") -> int:
        """Elements of parameters in one rank's shard."""
        layout = plan_layout(((str(i), (n,)) for i, n in enumerate(self.numels)), ranks, cut=cut)
        return sum(part.local[1] - part.local[0] for part in layout.overlaps(rank))


@dataclass(frozen=True, slots=True)
class Use:
    """One module's use of a unit, by number. `lookup`: it only indexes, as an embedding does."""

    unit: int
    lookup: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's units, their uses in the order of a pass, and its blocks' dimensions where known."""

    units: tuple[Unit, ...]
    uses: tuple[Use, ...]
    dims: Dims | None = None

    @property
    def order(self) -> list[int]:
        """The units in the order of their uses."""
        return [use.unit for use in self.uses]

    @property
    def looked_up(self) -> set[int]:
        """Units that no backward needs."""
        return set(self.order) - {use.unit for use in self.uses if not use.lookup}

    @property
    def numel(self) -> int:
        return sum(unit.numel for unit in self.units)

    @classmethod
    def of(cls, model: nn.Module, *, bucket_numel: int = 1_000_000, dims: Dims | None = None) -> Shape:
        """Of a module on any device, cut as an owner with this `bucket_numel` cuts it."""
        modules, users = dict(model.named_modules()), dict[str, list[int]]()
        units = []
        for index, plan in enumerate(plan_units(model, bucket_numel=bucket_numel)):
            units.append(Unit(tuple(p.numel() for _, p in plan.params), plan.trainable))
            for name in plan.users:
                users.setdefault(name, []).append(index)
        uses = (
            Use(index, type(modules[name]) is nn.Embedding)
            for name in modules
            for index in users.get(name, ())
        )
        return cls(tuple(units), tuple(uses), dims)

    @classmethod
    def from_config(cls, source: str | Path | Mapping[str, Any], *, bucket_numel: int = 1_000_000) -> Shape:
        """Of a Hugging Face `config.json` (a file, its folder, or what is in it), without building the model.

        The architectures whose parameters follow from standard keys need no other package; the others are
        built on the meta device by transformers. Raises LookupError when neither is possible.
        """
        config = _read(source)
        config = config.get("text_config") or config
        kind = config.get("model_type")
        if kind not in _KNOWN:
            return cls.of(_on_meta(config), bucket_numel=bucket_numel, dims=Dims.from_config(config))
        dims = Dims.from_config(config)
        units, order = _merged([Unit(numels) for numels in _atoms(config, dims, str(kind))], bucket_numel)
        embeddings = 2 if kind == "gpt2" else 1
        uses = [Use(index, at < embeddings) for at, index in enumerate(order)]
        if _is_tied(config):  # the head uses the first unit again
            uses.append(Use(0))
        return cls(tuple(units), tuple(uses), dims)


def _read(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no model config {str(source)!r}; allowed: a config.json, or its folder")
    try:
        read = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path} holds a {type(read).__name__}; allowed: an object {{...}}")
    return read


def _first(config: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _on_meta(config: Mapping[str, Any]) -> nn.Module:
    kind = config.get("model_type")
    try:
        import transformers
    except ImportError:
        raise LookupError(
            f"model_type {kind!r}: known without transformers are {', '.join(_KNOWN)}; "
            "pip install transformers for the others"
        ) from None
    import torch

    values = {key: value for key, value in config.items() if key != "model_type"}
    made = transformers.AutoConfig.for_model(kind, **values)
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(made)
    return model


# -- the parameters of known architectures, module by module -------------------------------------------------


def _is_tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", config.get("model_type") == "gpt2"))


def _atoms(config: Mapping[str, Any], dims: Dims, kind: str) -> Iterator[tuple[int, ...]]:
    """What is never split, in definition order: embeddings, blocks, the last norm, the head."""
    gpt2 = kind == "gpt2"
    yield (dims.vocab * dims.hidden,)
    if gpt2:
        yield (int(_first(config, _ALIASES["positions"]) or 1024) * dims.hidden,)
    for layer in range(dims.layers):
        yield tuple(_gpt2_block(dims) if gpt2 else _llama_block(config, dims, kind, layer))
    yield (dims.hidden, dims.hidden) if gpt2 else (dims.hidden,)
    if not _is_tied(config):
        yield (dims.vocab * dims.hidden,)


def _gpt2_block(dims: Dims) -> Iterator[int]:
    h, inner = dims.hidden, dims.intermediate
    yield from (h, h, 3 * h * h, 3 * h, h * h, h, h, h, h * inner, inner, inner * h, h)


def _llama_block(config: Mapping[str, Any], dims: Dims, kind: str, layer: int) -> Iterator[int]:
    h, q, kv = dims.hidden, dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    qkv_bias = kind == "qwen2" or bool(config.get("attention_bias"))
    for out in (q, kv, kv):
        yield out * h
        if qkv_bias:
            yield out
    yield q * h
    if config.get("attention_bias") and kind != "qwen2":
        yield h
    if kind in ("qwen3", "qwen3_moe"):
        yield from (dims.head_dim, dims.head_dim)
    sparse = dims.experts and layer not in config.get("mlp_only_layers", ())
    if sparse and (layer + 1) % int(config.get("decoder_sparse_step", 1)) == 0:
        yield from (dims.experts * h, dims.experts * 2 * dims.intermediate * h)
        yield dims.experts * h * dims.intermediate
    else:
        inner = int(config.get("intermediate_size", dims.intermediate))
        for numel, bias in ((inner * h, inner), (inner * h, inner), (h * inner, h)):
            yield numel
            if config.get("mlp_bias"):
                yield bias
    yield from (h, h)


def _merged(atoms: Sequence[Unit], bucket_numel: int) -> tuple[list[Unit], list[int]]:
    """Neighbours together until they reach `bucket_numel`, as state.units does it; and whose unit each is."""
    made: list[Unit] = []
    order: list[int] = []
    for atom in atoms:
        if made and made[-1].numel < bucket_numel:
            last = made[-1]
            made[-1] = Unit((*last.numels, *atom.numels))
        else:
            made.append(atom)
        order.append(len(made) - 1)
    return made, order


def within(following: Sequence[int], numels: Sequence[int], room: int) -> list[int]:
    """The first units of `following` that fit into `room` elements together; the very first always does."""
    chosen: list[int] = []
    for unit in following:
        if room <= 0 or (chosen and numels[unit] > room):
            break
        if unit not in chosen:
            chosen.append(unit)
            room -= numels[unit]
    return chosen
