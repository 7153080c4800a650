"""Hostfiles, --include and --exclude, SLURM's node lists: what they mean and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_core.cli.environ import find_place, port_for
from ds_core.cli.hosts import check_host, expand_nodelist, read_hostfile, select

POOL = {"a": [0, 1, 2, 3], "b": [0, 1], "me@c": [0]}


@pytest.mark.parametrize(
    ("include", "exclude", "wanted"),
    [
        (None, None, POOL),
        ("b", None, {"b": [0, 1]}),
        ("b@a:2,0", None, {"a": [0, 2], "b": [0, 1]}),
        ("a:1@a:3", None, {"a": [1, 3]}),
        ("c", None, {"me@c": [0]}),
        (None, "a:0,3@c", {"a": [1, 2], "b": [0, 1]}),
    ],
)
def test_the_filter_grammar(include: str | None, exclude: str | None, wanted: dict[str, list[int]]) -> None:
    assert select(POOL, include, exclude) == wanted


@pytest.mark.parametrize(
    ("include", "exclude", "said"),
    [
        ("x", None, "no host 'x'; there are a, b, c"),
        ("b:0,2", None, r"host b has slots \[0, 1\], not \[2\]"),
        ("b:-1", None, "'-1' is not a list of slots"),
        ("b:", None, "'' is not a list of slots"),
        ("b:0;$(x)", None, "is not a list of slots"),
        ("a", "b", "cannot both be given"),
        (None, "a@b@c", "leaves no slot of a, b, me@c"),
    ],
)
def test_a_filter_that_does_not_fit_is_refused(include: str | None, exclude: str | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        select(POOL, include, exclude)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a slots=2\na slots=1", r":2: host 'a' is listed twice"),
        ("a", ":1: 'a' is not of the form"),
        ("\n\na slots=x", ":3: 'a slots=x' is not of the form"),
        ("a slots=0", ":1: host 'a' has no slots"),
        ("# nothing\n", "no hosts in it"),
        ("-oProxyCommand=x slots=1", "host '-oProxyCommand=x': allowed are"),
        ("-v slots=1", "host '-v': allowed are"),
        ("a;touch slots=1", "host 'a;touch': allowed are"),
        ("$(x) slots=1", "allowed are"),
        ("u@-x slots=1", "allowed are"),
    ],
)
def test_a_hostfile_with_a_fault_is_refused_by_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_hostfile(file)


def test_a_hostfile_is_read_in_order(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("b.example slots=2 # two\n\n  me@10.0.0.1   slots = 1\nfe80::1 slots=1\n")
    assert read_hostfile(file) == {"b.example": [0, 1], "me@10.0.0.1": [0], "fe80::1": [0]}


@pytest.mark.parametrize("name", ["a b", "", "a\n", "a|b", "a`b`", "a/b", "user@", "@a", "a@b@c"])
def test_hosts_with_other_characters_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="allowed are letters"):
        check_host(name)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[08-10,2]-x,gpu", ["n08-x", "n09-x", "n10-x", "n2-x", "gpu"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
        ("", []),
    ],
)
def test_node_lists(text: str, names: list[str]) -> None:
    assert expand_nodelist(text) == names


def test_a_job_agrees_on_its_port_and_two_jobs_seldom_do() -> None:
    assert port_for("slurm 1.0") == port_for("slurm 1.0")
    ports = [port_for(f"slurm {job}.0") for job in range(200)]
    assert all(20000 <= port < 32000 for port in ports)
    assert len(set(ports)) > 190


def test_without_another_launcher_there_is_no_place() -> None:
    assert find_place({}, 1) is None
    assert find_place({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}, 1) is None  # a batch script, not a step
