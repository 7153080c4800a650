"""The probe itself: what a loud package does is seen, and a quiet one is not accused."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

LOUD = """
import subprocess, sys, threading, time
from pathlib import Path

print("to stdout")
print("to stderr", file=sys.stderr)
(Path.home() / ".ds").touch()
Path("here").touch()
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
subprocess.Popen(["sleep", "5"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
time.sleep(0.3)
"""


def test_loud_package_is_heard(tmp_path: Path, probe_in: Callable[..., dict]):
    (tmp_path / "loud.py").write_text(LOUD)
    seen = probe_in(sys.executable, "loud", "package", path=str(tmp_path))
    assert seen["printed"] == "to stdout\nto stderr\n"
    assert [Path(p).name for p in seen["left"]] == [".ds", "here"]
    assert seen["after"]["threads"] == seen["before"]["threads"] + 1
    assert len(seen["after"]["children"]) == 1
    assert seen["seconds"] > 0.3


def test_quiet_package_is_not_accused(tmp_path: Path, probe_in: Callable[..., dict]):
    (tmp_path / "quiet.py").write_text("import json\n")
    seen = probe_in(sys.executable, "quiet", "package", path=str(tmp_path))
    assert (seen["printed"], seen["left"], seen["after"]) == ("", [], seen["before"])


def test_only_a_recipe_may_lack_what_an_extra_brings(tmp_path: Path, probe_in: Callable[..., dict]):
    for place, lacks in (("recipes", "ds_extra"), ("recipes", "ds_other"), ("rest", "ds_extra")):
        folder = tmp_path / f"{place}-{lacks}"
        (folder / "poor" / place).mkdir(parents=True)
        (folder / "poor" / "__init__.py").touch()
        (folder / "poor" / place / "__init__.py").write_text(f"import {lacks}\n")
        known = folder / "poor-1.dist-info"
        known.mkdir()
        (known / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: poor\nVersion: 1\nRequires-Dist: ds-extra; extra == 'recipes'\n"
        )
        if (place, lacks) == ("recipes", "ds_extra"):
            assert "poor.recipes" in probe_in(sys.executable, "poor", "modules", path=str(folder))["names"]
        else:
            with pytest.raises(AssertionError, match=lacks):
                probe_in(sys.executable, "poor", "modules", path=str(folder))
