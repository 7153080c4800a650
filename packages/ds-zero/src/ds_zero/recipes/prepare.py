"""What has to be known before a model is built: the text as tokens, the dtype, whether it all fits."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ds_core.setup.estimate import DTYPE_BYTES, STAGES, DoesNotFit, Recipe, check_fits
from ds_core.train.memory import gigabytes
from ds_zero.recipes.build import Split
from ds_zero.recipes.data import (
    Heldout,
    Tokenizer,
    Windows,
    read_corpus,
    read_tokenizer,
    token_stream,
    write_tokenizer,
)
from ds_zero.recipes.flags import Settings
from ds_zero.recipes.model import GPT, GPTConfig
from ds_zero.recipes.ranks import Ranks

TOKENIZER_FILE = "tokenizer.json"
_PROBE_ROUNDS = 5
_WORTH_IT = 0.9  # bfloat16 has to take less than this share of float32's time


@dataclass(frozen=True, slots=True)
class Text:
    """The data of a run, ready to train and measure on."""

    tokenizer: Tokenizer
    windows: Windows
    heldout: Heldout
    description: str
    notes: tuple[str, ...]


def prepare_text(settings: Settings, directory: Path, ranks: Ranks) -> Text:
    """Rank 0 reads, trains the tokenizer, makes the run directory and encodes; the others get the results.

    The tokenizer goes through a file in the run directory, whole or not at all; tokens through the wire.
    Collective: every rank calls. Raises ValueError where there is no text, or too little.
    """
    file, made = directory / TOKENIZER_FILE, list[_Encoded]()

    def encode() -> Tensor:
        made.append(_encode(settings, file))
        return made[0].train_N

    stream_N = ranks.share(encode, torch.int32)
    heldout_M = ranks.share(lambda: made[0].heldout_M, torch.int32)
    text = ranks.share(lambda: torch.tensor(list(made[0].heldout_text)), torch.uint8)
    tokenizer = read_tokenizer(settings.tokenizer, file)
    windows = Windows(stream_N, settings.seq)
    heldout = Heldout.cut(text.numpy().tobytes(), heldout_M, settings.seq, tokenizer.file_mark)
    description = f"{stream_N.numel():,} tokens ({tokenizer.name})" + (made[0].origin if made else "")
    return Text(tokenizer, windows, heldout, description, made[0].notes if made else ())


@dataclass(frozen=True, slots=True)
class _Encoded:
    """What rank 0 made of the files."""

    train_N: Tensor
    heldout_M: Tensor
    heldout_text: bytes
    origin: str
    notes: tuple[str, ...]


def _encode(settings: Settings, file: Path) -> _Encoded:
    corpus = read_corpus(settings.data)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not (settings.resume and file.exists()):
        write_tokenizer(settings.tokenizer, corpus, settings.vocab, file)
    tokenizer = read_tokenizer(settings.tokenizer, file)
    measured = corpus.heldout_sample(settings.eval_bytes)
    notes = []
    if corpus.left_out:
        notes.append(f"{corpus.left_out} files beyond the first 64 MiB of text were left out")
    return _Encoded(
        token_stream(tokenizer, corpus.train),
        token_stream(tokenizer, measured),
        "".join(document.text for document in measured).encode(),
        f" of {len(corpus.train)} files in {corpus.origin}; {len(corpus.heldout)} files held out",
        tuple(notes),
    )


def choose_dtype(name: str, ranks: Ranks) -> str:
    """`auto` becomes bfloat16 where a matrix product is faster in it, else float32. Collective."""
    if name != "auto":
        return name
    device = ranks.accelerator.device
    faster = ranks.share(lambda: torch.tensor([_prefers_bfloat16(device)]))
    return "bfloat16" if int(faster) else "float32"


def _prefers_bfloat16(device: torch.device) -> bool:
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.ones(512, 512, dtype=dtype, device=device) for _ in range(2))
        laps = []
        for _ in range(_PROBE_ROUNDS):
            began = time.perf_counter()
            float((left @ right)[0, 0])  # waits for the device
            laps.append(time.perf_counter() - began)
        times[dtype] = min(laps)
    return times[torch.bfloat16] < _WORTH_IT * times[torch.float32]


def refuse_if_too_big(
    settings: Settings, config: GPTConfig, split: Split, stage: int, ranks: Ranks, *, when: str = ""
) -> None:
    """Compare an estimate with the memory there is, before anything is allocated.

    Raises: DoesNotFit (a ValueError) with the estimate for every stage.
    """
    with torch.device("meta"):
        model = GPT(config)
    local = min(split.world, int(os.environ.get("LOCAL_WORLD_SIZE", split.world)))
    sharing = local if ranks.accelerator.is_cpu else 1
    activations = activation_bytes(config, split.batch, DTYPE_BYTES[settings.dtype])
    free = ranks.accelerator.free_bytes() / sharing
    largest = max(config.vocab * config.dim, sum(p.numel() for p in model.layers[0].parameters()))
    try:
        check_fits(
            model,
            ranks=split.world,
            stage=STAGES[stage],
            available=max(0.0, free - activations),
            recipe=Recipe(settings.dtype, "float32", num_states(settings)),
            largest_unit=largest,
        )
    except DoesNotFit as error:
        raise DoesNotFit(
            f"--model-size {settings.model_size}: {when}{error}\nof {gigabytes(free)} free here for each "
            f"rank, activations of {split.batch} x {config.seq} tokens take about {gigabytes(activations)}; "
            "nothing was allocated"
        ) from None


def num_states(settings: Settings) -> int:
    """fp32 numbers that the optimizer keeps per parameter."""
    return 1 if settings.optimizer == "sgd" else 2


def activation_bytes(config: GPTConfig, batch: int, itemsize: int) -> float:
    """Roughly what one micro batch keeps for its backward: inputs of every product, and the logits."""
    tokens, layer = batch * config.seq, 12 * config.dim + 4 * config.hidden
    inside = layer + config.layers * config.dim if config.checkpoint_activations else layer * config.layers
    return float(tokens * (inside * itemsize + config.vocab * (2 * itemsize + 8)))


def prompt_of(heldout: Heldout, num_tokens: int = 32) -> Sequence[int]:
    """The start of the held-out text."""
    return [int(token) for token in heldout.ids_NT[0, 1 : num_tokens + 1]]
