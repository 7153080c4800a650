"""The quick sum of checkpoint files: the same whatever the pieces, different after any small damage."""

import hashlib

import numpy as np
import pytest

from ds_core.state.checkpoint_digest import BLOCK, CHUNK, Digest


def digest(data: np.ndarray, piece: int = CHUNK) -> str:
    found = Digest()
    for at in range(0, len(data), piece):
        found.update(data[at : at + piece])
    record = found.record()
    assert record.bytes == len(data)
    assert record.sha256 == hashlib.sha256(data.data).hexdigest()
    return record.sum64


@pytest.fixture
def data() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, 5 * BLOCK + 1234, dtype=np.uint8)


def test_it_is_the_hash_of_weighted_sums_that_the_format_says(data: np.ndarray):
    sums = []
    for at in range(0, len(data), BLOCK):
        block = data[at : at + BLOCK].tobytes().ljust(BLOCK, b"\0")
        total = 0
        for place in range(BLOCK // 8):
            word = int.from_bytes(block[8 * place : 8 * place + 8], "little")
            total += word * ((place * 0x9E3779B97F4A7C15) % 2**64 | 1)
        sums.append((total % 2**64).to_bytes(8, "little"))
    assert digest(data) == hashlib.sha256(b"".join(sums)).hexdigest()


def test_pieces_do_not_matter(data: np.ndarray):
    assert digest(data) == digest(data, BLOCK) == digest(data, 3 * BLOCK)


@pytest.mark.parametrize(
    "damage", ["bit", "last byte", "swapped words", "swapped blocks", "zeroed page", "cut"]
)
def test_damage_shows(data: np.ndarray, damage: str):
    whole, hurt = digest(data), data.copy()
    if damage == "bit":
        hurt[BLOCK + 7] ^= 0x80
    elif damage == "last byte":
        hurt[-1] += 1
    elif damage == "swapped words":
        hurt[:8], hurt[80:88] = data[80:88], data[:8]
    elif damage == "swapped blocks":
        hurt[:BLOCK], hurt[BLOCK : 2 * BLOCK] = data[BLOCK : 2 * BLOCK], data[:BLOCK]
    elif damage == "page":
        hurt[4096:8192] = 0
    else:
        hurt = hurt[:-1234]
    assert digest(hurt) != whole
