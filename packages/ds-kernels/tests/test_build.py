"""Building: keys, caches, broken compilers, killed and simultaneous builds, wheels."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from ds_kernels import BuildError, build, cli, library, registry, table

CPU = torch.device("cpu")
PACKAGE = Path(__file__).resolve().parents[1]
# A compiler that answers --version and then fails the way compilers do.
FAILING = """#!/bin/sh
[ "$1" = --version ] && { echo "fake++ 1.0"; exit 0; }
echo "optim_cpu.cpp: In function 'int f()':"
echo "optim_cpu.cpp:7:1: error: 'omp.h' was eaten by a dog" >&2
echo "optim_cpu.cpp:8:1: error: and another thing" >&2
exit 1
"""
# A compiler that says when it was called, waits, and then does the work.
SLOW = """#!/bin/sh
[ "$1" = --version ] && { echo "slow++ 1.0"; exit 0; }
echo called >> "$CALLS"
sleep "$WAIT"
exec g++ "$@"
"""
LOAD = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
from ds_kernels import load
print(*{row.implementation for _ in range(2) for row in load("optim", torch.device("cpu"))})
from ds_kernels import FusedAdamW
p = torch.nn.Parameter(torch.ones(5)); p.grad = torch.ones(5)
FusedAdamW([p], lr=0.5, weight_decay=0.0).step()
assert torch.allclose(p, torch.full((5,), 0.5)), p
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DS_KERNELS_CACHE", str(folder))
    return folder


def script(folder: Path, text: str) -> str:
    path = folder / "fake++"
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A family that compiles at once; the value is what another process runs to see it."""
    folder = tmp_path / "kernels" / "toy"
    folder.mkdir(parents=True)
    (folder / "toy.h").write_text("#define SEVEN 7\n")
    (folder / "toy_cpu.cpp").write_text(
        '#include "toy.h"\nextern "C" __attribute__((visibility("default"))) int toy() { return SEVEN; }\n'
    )
    monkeypatch.setattr(build, "SOURCES", folder.parent)
    lines = [
        "from pathlib import Path",
        "from ds_kernels import build",
        f"build.SOURCES = Path({str(folder.parent)!r})",
    ]
    return "\n".join([*lines, ""])


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(PACKAGE / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_key_follows_sources_and_flags(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [build.source_key("toy")]
    for name in ("toy.h", "toy_cpu.cpp"):
        path = build.SOURCES / "toy" / name
        path.write_text(path.read_text() + "// changed\n")
        keys.append(build.source_key("toy"))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    assert len({*keys, build.source_key("toy")}) == 4


def test_cached_path_follows_the_compiler(cache: Path) -> None:
    one, two = (build.cached_path("optim", build.Compiler(("g++",), version)) for version in ("12", "13"))
    assert one != two
    assert one.is_relative_to(cache)


@pytest.mark.parametrize(
    ("cxx", "words"),
    [
        ("/bin/false", "/bin/false --version exited with 1"),
        ("/no/such/cxx", "CXX=/no/such/cxx: no such program"),
    ],
)
def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch, cxx: str, words: str) -> None:
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(BuildError, match=words) as caught:
        build.compiler("optim")
    assert "apt install g++" in str(caught.value)


def test_first_error_of_the_compiler(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(tmp_path, FAILING))
    with pytest.raises(BuildError) as caught:
        build.build("optim", cache)
    assert caught.value.reason == "optim_cpu.cpp:7:1: error: 'omp.h' was eaten by a dog"
    assert "and another thing" in caught.value.log
    assert not list(cache.glob("*.so")) + list(cache.glob(".work-*"))


def test_unknown_family_and_unwritable_folder(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="there are: "):
        build.build("adma", cache)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(BuildError, match="DS_KERNELS_CACHE"):
        build.build("optim", blocked / "sub")


def test_odd_folder_names(toy: str, tmp_path: Path) -> None:
    """Spaces, dollars and colons mean something to ninja and to shells."""
    built = build.build("toy", tmp_path / "a b$c:d")
    assert ctypes.CDLL(str(built)).toy() == 7


def test_broken_compiler_falls_back_with_one_warning(tmp_path: Path) -> None:
    done = run(LOAD, CXX=script(tmp_path, FAILING), DS_KERNELS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "reference\n" in done.stdout
    warnings = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "optim_cpu.cpp:7:1: error: 'omp.h' was eaten by a dog" in warnings[0]
    assert "apt install g++" in done.stdout
    assert not done.stderr


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> registry.Registry:
    """A registry that knows the ops and has loaded nothing."""
    for family in registry.FAMILIES:
        registry.registry().of(family)
    fresh = registry.Registry()
    fresh.kernels.update(registry.registry().kernels)
    for module in (registry, table):
        monkeypatch.setattr(module, "registry", lambda: fresh)
    return fresh


def test_strict_and_forced_native_raise(
    cache: Path,
    unloaded: registry.Registry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    with monkeypatch.context() as forced:
        forced.setenv("DS_KERNELS", "native")
        words = "no native implementation for cpu: /bin/false --version exited"
        with pytest.raises(registry.KernelUnavailable, match=words):
            registry.load("optim", CPU)
    words = "only its reference: no native one: /bin/false --version exited"
    with pytest.raises(registry.KernelUnavailable, match=words):
        registry.load("optim", CPU, strict=True)
    assert not caplog.records
    unloaded.chosen.clear()
    for _ in range(3):
        assert {row.implementation for row in registry.load("optim", CPU)} == {"reference"}
    assert len(caplog.records) == 1
    assert "with no native one: /bin/false --version exited with 1" in caplog.text
    with pytest.raises(registry.KernelUnavailable, match=words):
        registry.load("optim", CPU, strict=True)


def test_forced_reference_is_silent_and_other_words_are_refused(
    cache: Path,
    unloaded: registry.Registry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("DS_KERNELS", "fast")
    with pytest.raises(
        ValueError, match="DS_KERNELS='fast': allowed are 'reference', 'torch', 'triton', 'native'"
    ):
        registry.load("optim", CPU)
    monkeypatch.setenv("DS_KERNELS", "reference")
    assert {row.implementation for row in registry.load("optim", CPU)} == {"reference"}
    used = [row for row in table.report() if row.used and row.op.startswith("ds::")]
    assert ("ds::adam_step_", "cpu", "reference", True, "always there") in used
    assert {row.implementation for row in used} == {"reference"}
    assert not caplog.records
    with pytest.raises(LookupError, match="no kernel family 'adma'; there are: "):
        registry.load("adma", CPU)


def test_two_processes_build_once(toy: str, tmp_path: Path) -> None:
    env = {"CXX": script(tmp_path, SLOW), "CALLS": str(tmp_path / "calls"), "WAIT": "1"}
    path = {"PYTHONPATH": str(PACKAGE / "src")}
    command = [sys.executable, "-c", toy + f"print(build.build('toy', Path({str(tmp_path / 'out')!r})))"]
    started = [
        subprocess.Popen(command, env={**os.environ, **env, **path}, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert said == [f"{tmp_path / 'out' / 'libds_toy.so'}\n"] * 2
    assert [process.returncode for process in started] == [0, 0]
    assert (tmp_path / "calls").read_text() == "called\n" * 2  # one object, one library


def test_killed_build_leaves_no_lock(toy: str, tmp_path: Path) -> None:
    """SIGKILL in mid-compile; the next build starts at once, sweeps up and succeeds."""
    out = tmp_path / "out"
    env = {"CXX": script(tmp_path, SLOW), "CALLS": str(tmp_path / "calls"), "WAIT": "60"}
    path = {"PYTHONPATH": str(PACKAGE / "src")}
    command = [sys.executable, "-c", toy + f"build.build('toy', Path({str(out)!r}))"]
    victim = subprocess.Popen(command, env={**os.environ, **env, **path}, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "calls").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert list(out.glob(".work-*"))
    assert build.build("toy", out).exists()
    assert not list(out.glob(".work-*"))


def test_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\* +ds::adam_step_ +cpu +native +built (now|before|on first use,) by ", shown)
    assert re.search(r" +ds::adam_step_ +cpu +reference +always there; native comes first", shown)
    assert str(build.cache_root()) in shown
    assert cli.main(["build", "optim"]) == 0
    assert Path(capsys.readouterr().out.strip()).name == "libds_optim.so"
    monkeypatch.setenv("CXX", "/bin/false")
    assert cli.main(["build", "optim"]) == 1
    assert "/bin/false --version exited with 1" in capsys.readouterr().out


def test_import_is_quiet_and_needs_no_torch() -> None:
    """Importing the package and its build driver takes no torch and prints nothing."""
    done = run("import sys, ds_kernels, ds_kernels.build; sys.exit('torch' in sys.modules)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    names = run("import ds_kernels\nfor name in ds_kernels.__all__: getattr(ds_kernels, name)")
    assert (names.returncode, names.stdout, names.stderr) == (0, "", "")


def test_wheels(tmp_path: Path) -> None:
    """Built without torch, a wheel of this platform; unpacked, it runs where there is no compiler."""
    hatchling = (
        "import sys; sys.modules['torch'] = None; from hatchling.cli import hatchling; sys.exit(hatchling())"
    )
    command = [sys.executable, "-c", hatchling, "build", "-t", "wheel", "-d"]
    for name, aot in (("pure", ""), ("native", "optim,aio")):
        env = {**os.environ, "DS_KERNELS_AOT": aot}
        subprocess.run(
            [*command, str(tmp_path / name)],
            cwd=PACKAGE,
            env=env,
            check=True,
            capture_output=True,
            timeout=120,
        )
    pure, native = (next((tmp_path / name).glob("*.whl")) for name in ("pure", "native"))
    assert pure.name.endswith("-py3-none-any.whl")
    assert "-py3-none-linux_" in native.name
    names = {*zipfile.ZipFile(native).namelist()} - {*zipfile.ZipFile(pure).namelist()}
    made = {f"libds_{family}.so{end}" for family in ("optim", "aio") for end in ("", ".key")}
    assert names == {f"ds_kernels/prebuilt/{name}" for name in made}
    assert "ds_kernels/sources/optim/optim_cpu.cpp" in zipfile.ZipFile(pure).namelist()
    site = tmp_path / "site"
    zipfile.ZipFile(native).extractall(site)
    env = {"CXX": "/bin/false", "DS_KERNELS_CACHE": str(tmp_path / "none"), "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "native\n", "")
    assert not (tmp_path / "none").exists()


def test_a_prebuilt_library_of_other_sources_is_not_used(
    toy: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.build("toy", tmp_path)
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    assert library.open_library("toy").origin == "came with the wheel"
    (tmp_path / "libds_toy.so.key").write_text("of other sources")
    assert library.open_library("toy").origin.startswith("built now by")
    assert library.open_library("toy").origin.startswith("built before by")


def test_a_damaged_library_is_an_error(toy: str, cache: Path) -> None:
    path = build.cached_path("toy", build.compiler("toy"))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a library")
    with pytest.raises(BuildError, match=r"does not load.*delete it"):
        library.open_library("toy")
