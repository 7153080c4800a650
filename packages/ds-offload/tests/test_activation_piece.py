"""Pieces hold every byte that a tensor shows, and tensors made of them look the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_offload.activation_piece import Look, Piece, piece_of, plan_piece, whole

BASE = torch.arange(4096, dtype=torch.float32)


@pytest.mark.parametrize(
    ("storage", "begin", "end", "nbytes", "piece"),
    [
        (4096, 0, 4096, 4096, Piece(0, 4096)),
        (4096, 512, 1024, 512, Piece(0, 4096)),  # an eighth of it
        (4096, 516, 1024, 508, Piece(512, 1024)),  # less: only what it spans, from a multiple of 64
        (1 << 20, 0, 4096, 512, Piece(0, 4096)),  # with gaps
        (1 << 20, 0, 4097, 512, None),  # with too many of them
        (4096, 0, 4096, 1 << 20, Piece(0, 4096)),  # expanded
    ],
)
def test_which_bytes(storage: int, begin: int, end: int, nbytes: int, piece: Piece | None) -> None:
    assert plan_piece(storage, begin, end, nbytes) == piece


VIEWS = {
    "all": BASE,
    "a part": BASE[1000:1100],
    "odd begin": BASE[1001:1100],
    "transposed": BASE.view(64, 64).t(),
    "columns": BASE.view(512, 8)[:, 3:5],
    "few columns far in": BASE.view(8, 512)[6:, 100:300],
    "every third": BASE[10:100:3],
    "expanded": BASE[7].expand(3, 4),
    "other type": BASE.view(torch.int16)[9:900],
    "complex": torch.view_as_complex(BASE.view(-1, 2))[5:70],
    "scalar": BASE[77],
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_tensor_over_other_memory_is_the_same(name: str) -> None:
    tensor = VIEWS[name]
    piece = piece_of(tensor)
    assert piece is not None
    assert piece.begin % 64 == 0
    assert piece.nbytes <= max(8 * tensor.nbytes, 8 * tensor.untyped_storage().nbytes() // 8)
    padded = torch.zeros(piece.nbytes + 192, dtype=torch.uint8)  # memory that begins somewhere in its storage
    memory = padded[128 : 128 + piece.nbytes].copy_(piece.of(tensor))
    made = Look.of(tensor, piece).over(memory)
    assert made.stride() == tensor.stride()
    assert torch.equal(made, tensor)
    assert made.untyped_storage().data_ptr() == padded.data_ptr()
    shift = (made.data_ptr() - memory.data_ptr()) - (tensor.data_ptr() - tensor.untyped_storage().data_ptr())
    assert shift % 64 == 0  # as far from a vector's border as it was


def test_pieces_are_the_same_memory() -> None:
    tensor = torch.zeros(64)
    whole(tensor).of(tensor).fill_(1)
    assert bool((tensor != 0).all())


def test_a_column_of_a_large_matrix_stays() -> None:
    column: Tensor = torch.zeros(100, 100)[:, 3]
    assert piece_of(column) is None
