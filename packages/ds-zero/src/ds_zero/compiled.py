"""torch.compile of a sharded model's blocks: their arithmetic in one graph each, gathering outside of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ds_core.state.forwards import Choice, ForwardSwap, choose_blocks


def compile_blocks(model: nn.Module, which: Choice = None, **options: Any) -> ForwardSwap:
    """`torch.compile(..., **options)` of each block's `forward`; before or after sharding, at every stage.

    The hooks that gather and let go run around the graph, so a block that compiles without ZeRO compiles
    with it: no graph break more, and one compilation for all blocks of a kind. `fullgraph=True` may be given.
    `which` is as in `choose_blocks`. `remove()` of the result gives the blocks their own forward back.
    """
    blocks = choose_blocks(model, which).values()
    return ForwardSwap("compile").put(blocks, partial(torch.compile, **options))
