"""Names to objects: own names, entry points, and what a missing name says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_core.setup import plugins

MODULE = """
from ds_core.setup.config import Config

class Nvme(Config):
    path: str
    depth: int = 8

def plain(size):
    return ("plain", size)
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with entry points, as pip would leave it."""
    info = tmp_path / "ds_fake-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ds-fake\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[ds.store]\nnvme = ds_fake_plugin:Nvme\nplain = ds_fake_plugin:plain\n"
    )
    (tmp_path / "ds_fake_plugin.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield
    forget()
    sys.modules.pop("ds_fake_plugin", None)


def forget() -> None:
    plugins._entries.cache_clear()
    plugins.find.cache_clear()


@pytest.mark.usefixtures("installed")
def test_names_become_objects() -> None:
    made = plugins.resolve("store", {"type": "nvme", "path": "/mnt"})
    assert (type(made).__name__, made.path, made.depth) == ("Nvme", "/mnt", 8)
    assert plugins.resolve("store", {"type": "plain", "size": 3}) == ("plain", 3)
    assert plugins.find("store", "nvme") is type(made)
    assert plugins.known("store") == ["device", "nvme", "plain"]


@pytest.mark.usefixtures("installed")
def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match=r'store "nvme": 2 problems') as caught:
        plugins.resolve("store", {"type": "nvme", "dept": 3})
    assert 'dept: unknown key; did you mean "depth"?' in str(caught.value)
    with pytest.raises(ValueError, match='store "plain" does not take'):
        plugins.resolve("store", {"type": "plain"})
    with pytest.raises(ValueError, match=r'a store needs "type", one of device, nvme, plain'):
        plugins.resolve("store", {"path": "/mnt"})


def test_a_missing_name_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "entry_points", lambda group: [])
    forget()
    with pytest.raises(LookupError) as caught:
        plugins.resolve("store", {"type": "nvme"})
    assert str(caught.value) == (
        'no store "nvme"; known: device. "nvme" comes with ds-offload (pip install ds-offload)'
    )
    with pytest.raises(LookupError, match=r'no store "nvm"; known: device; did you mean "nvme"\?'):
        plugins.resolve("store", "nvm")
    with pytest.raises(LookupError, match=r'no dispatcher "x"; known: none'):
        plugins.resolve("dispatcher", "x")
    forget()


def test_objects_pass_through_and_nice_to_haves_may_be_absent() -> None:
    thing = object()
    assert plugins.resolve("store", thing) is thing
    assert plugins.find("optimizer", "no_such_optimizer") is None


def test_every_own_name_points_into_the_package() -> None:
    for (kind, name), home in plugins._OWN.items():
        assert home.startswith("ds_core."), (kind, name)
        assert plugins.find(kind, name) is not None
