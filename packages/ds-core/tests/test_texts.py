"""Texts of ranks come back by rank and to the letter, over a communicator and around a checkpoint."""

from __future__ import annotations

from ds_core.ground.mesh import Topology
from ds_core.ground.texts import exchange
from ds_core.state.checkpoint_peers import Peers
from ds_core.testing.distributed import distributed

TEXTS = ["", " two spaces ", "gr\u00fc\u00dfe\n\0" * 99]


@distributed(world_size=3)
def test_texts_of_any_length_come_back_to_the_letter(rank: int) -> None:
    comm, peers = Topology().build().communicator("data", "control"), Peers()
    for shift in range(3):
        expected = TEXTS[shift:] + TEXTS[:shift]
        assert exchange(comm, expected[rank], about="a test") == expected
        assert peers.gather_text(expected[rank]) == expected
    assert exchange(comm, "", about="a test") == peers.gather_text("") == ["", "", ""]


def test_one_process_hears_itself() -> None:
    comm = Topology().build().communicator("data")
    for text in TEXTS:
        assert exchange(comm, text, about="a test") == Peers().gather_text(text) == [text]
