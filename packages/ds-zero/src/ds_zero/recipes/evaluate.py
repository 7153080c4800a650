"""How well the model predicts held-out text, beside what general compressors make of the same bytes."""

from __future__ import annotations

import lzma
import math
import zlib

import torch
from torch import nn

from ds_zero.recipes.data import Heldout
from ds_zero.recipes.model import IGNORE
from ds_zero.recipes.ranks import Ranks


@torch.no_grad()
def heldout_nats(model: nn.Module, heldout: Heldout, ranks: Ranks, batch: int = 8) -> float:
    """Nats per byte of the held-out text.

    Batches are the same at every world size and only their owners differ, so that a checkpoint costs the
    same wherever it is loaded. A rank without a batch runs one of padding: at stage 3 forward is collective.
    Collective: every rank calls.
    """
    was_training = model.training
    model.eval()
    num_batches = -(-heldout.ids_NT.shape[0] // batch)
    nats = 0.0
    for first in range(0, num_batches, ranks.world):
        mine = (first + ranks.rank) * batch
        ids_BT, targets_BT = heldout.ids_NT[mine : mine + batch], heldout.targets_NT[mine : mine + batch]
        if not ids_BT.numel():
            ids_BT, targets_BT = heldout.ids_NT[:1], torch.full_like(heldout.targets_NT[:1], IGNORE)
        device = ranks.accelerator.device
        nats += float(model(ids_BT.to(device), targets_BT.to(device), reduction="sum"))
    model.train(was_training)
    return ranks.sum(nats)[0] / len(heldout.text)


def bits(nats: float) -> float:
    return nats / math.log(2)


def compressor_bits(text: bytes) -> dict[str, float]:
    """Bits per byte of zlib and lzma at their strongest, all of `text` in one piece."""
    packed = {
        "zlib -9": zlib.compress(text, 9),
        "lzma -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(small) / len(text) for name, small in packed.items()}
