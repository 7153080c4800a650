"""What looking for a changed model costs: steps with and without it, A B B A, and the time inside by itself.

`ds launch --nproc 2 structure.py --size 30m`. Rank 0 prints JSON. Every step looks twice: before the forward
of the root, and before gradients are final.
"""

from __future__ import annotations

from typing import Any

from pairs import compare

from ds_core.state.structure import Look, Structure

NOTHING = Look(False)


def without(structure: Structure) -> Look:
    return NOTHING


def put(look: Any) -> None:
    Structure.look = look  # type: ignore[method-assign]


if __name__ == "__main__":
    compare("looks", Structure.look, without, put)
