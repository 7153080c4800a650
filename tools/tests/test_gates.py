"""sizes, release, hygiene and ruff's list of banned names: faults are planted and found."""

import shutil
import subprocess
from pathlib import Path

import pytest

import hygiene
import release
import repo
import sizes
from repo import Repo

ZERO = "packages/ds-zero/src/ds_zero"

LARGE = {
    "file": ("x = 1\n" * 31, "31 lines"),
    "function": ("def f():\n" + "    x = 1\n" * 6, "f has 7 lines"),
    "inner function": ("class A:\n    def f(self):\n" + "        x = 1\n" * 6, "f has 7 lines"),
    "methods": (
        "class A:\n" + "".join(f"    def f{i}(self): ...\n" for i in range(3)),
        "class A has 3 methods",
    ),
    "init_args": ("class A:\n    def __init__(self, a, b, *, c, d): ...\n", "A.__init__ takes 4 arguments"),
    "global": ("def f():\n    global state\n", "`global state`"),
}
FITS = (
    "x = 1\n" * 10
    + "class A:\n    def __init__(self, a, *, b, c): ...\n    def f(self):\n"
    + "        x = 1\n" * 5
)


@pytest.mark.parametrize("case", LARGE)
def test_large_is_found(tree, case):
    text, expected = LARGE[case]
    findings = list(sizes.find_large(Repo(tree({f"{ZERO}/x.py": text}))))
    assert len(findings) == 1
    assert expected in findings[0]


def test_limits_themselves_fit(tree):
    assert list(sizes.find_large(Repo(tree({f"{ZERO}/x.py": FITS})))) == []


VERSIONS = {
    "changelog": (
        {"packages/ds-zero/CHANGELOG.md": "# C\n\n## 0.2.0\n\n## 0.1.0\n"},
        "the newest heading is 0.2.0",
    ),
    "no version": ({f"{ZERO}/__init__.py": ""}, "__version__ is missing"),
    "range": (
        {
            "packages/ds-core/src/ds_core/__init__.py": '__version__ = "0.2.0"\n',
            "packages/ds-core/CHANGELOG.md": "## 0.2.0\n",
        },
        "asks for ds-core>=0.1,<0.2, but ds-core is 0.2.0",
    ),
    "license": ({"packages/ds-zero/LICENSE": "other\n"}, "ds-zero/LICENSE: differs"),
}


@pytest.mark.parametrize("case", VERSIONS)
def test_disagreeing_versions_are_found(tree, case):
    files, expected = VERSIONS[case]
    findings = list(release.find_disagreements(Repo(tree(files))))
    assert len(findings) == 1
    assert expected in findings[0]


def test_agreeing_versions_pass(tree):
    assert list(release.find_disagreements(Repo(tree({})))) == []


DIRTY = {
    "a home": "see /ho" + "me/ann/data",
    "a workplace": 'PATH = "/wor' + 'k/data"',
    "a registry": "https://pyp" + "i.org/simple",
    "half a merge": "<" * 7 + " origin/main",
    "a key": "-----BEGIN PRIVATE KE" + "Y-----",
    "pickle": "import pick" + "le",
    "from pickle": "from pick" + "le import loads",
    "marshal": "import marsh" + "al",
    "torch.load": "import torch\ntorch.lo" + "ad('x')",
    "objects": "dist.all_gather_ob" + "ject(a, b)",
    "object lists": "dist.broadcast_ob" + "ject_list(a)",
    "a shell": "run('ls', shell=" + "True)",
    "a shell, hidden": "run('ls', shell=" + "flag)",
    "os.system": "os.sys" + "tem('ls')",
}


@pytest.mark.parametrize("case", DIRTY)
def test_dirt_is_found(tree, case):
    root = tree({f"{ZERO}/x.py": "" if "/" in DIRTY[case] or "KEY" in DIRTY[case] else DIRTY[case]})
    if "/" in DIRTY[case] or "KEY" in DIRTY[case]:
        (root / "notes.md").write_text(DIRTY[case])
    assert len(list(hygiene.find_violations(Repo(root)))) == 1


def test_clean_text_passes(tree):
    text = "import json\nrun(['ls'], shell=False)\nx.all_gather(y)\npath = '/workspace/x'\nurl = 'a/home/b'\n"
    assert list(hygiene.find_violations(Repo(tree({f"{ZERO}/x.py": text})))) == []


BANNED = {
    "import pick" + "le": "TID251",
    "import torch\ntorch.sa" + "ve(1, 'x')": "TID251",
    "import torch.distributed as dist\ndist.new_gro" + "up()": "TID251",
    "from torch.distributed import init_device_me" + "sh": "TID251",
    "import torch\ntorch.distributed.all_gather_into_tens" + "or(1, 2)": "TID251",
    "import torch.distributed as dist\ndist.all_gather_ob" + "ject(1, 2)": "TID251",
    "import os\nos.sys" + "tem('ls')": "TID251",
    "import subprocess\nsubprocess.run('ls', shell=" + "True)": "S602",
    "ev" + "al('1')": "S307",
}


@pytest.mark.parametrize("text", BANNED)
def test_ruff_bans(tmp_path: Path, text: str):
    ruff = shutil.which("ruff")
    assert ruff, "the gates session installs ruff; run `nox -s 'tests(gates)'`"
    command = [
        ruff,
        "check",
        "--no-cache",
        "--config",
        str(repo.ROOT / "pyproject.toml"),
        "--stdin-filename",
        "x.py",
    ]
    done = subprocess.run(
        [*command, "-"], input=text + "\n", capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert BANNED[text] in done.stdout, done.stdout + done.stderr
