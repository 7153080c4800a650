"""What ranks would all import by themselves is imported once, by the server that forks them.

A test file names it in `RANKS_IMPORT`; nothing is imported for files that are not run.
"""

from __future__ import annotations

import os

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """The server starts with the first test of several ranks, and reads the variable."""
    names = set(os.environ.get("DS_TEST_PRELOAD", "").split())
    for item in session.items:
        names.update(getattr(getattr(item, "module", None), "RANKS_IMPORT", ()))
    if names:
        os.environ["DS_TEST_PRELOAD"] = " ".join(sorted(names))
