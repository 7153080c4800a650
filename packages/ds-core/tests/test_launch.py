"""`ds launch` with real processes: what ranks see, who is blamed, who is stopped, what reaches no shell."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from ds_core.cli import launch
from ds_core.cli.plan import Node

DS = [sys.executable, "-m", "ds_core.cli.main"]
NASTY = [
    "a b",
    "$(touch pwned)",
    ";touch pwned;",
    "`touch pwned`",
    "'",
    '"',
    "--",
    "-m",
    "*",
    "",
    "\\",
    "\n",
    "ö",
]
SHOW = """
    import json, os, sys
    keys = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT OMP_NUM_THREADS"
    keys = [*keys.split(), "CUDA_VISIBLE_DEVICES", "DS_LOG_DIR", "DS_MARK", "OTHER_MARK"]
    shown = {k: os.environ[k] for k in keys if k in os.environ}
    shown |= {"args": sys.argv[1:], "cores": sorted(os.sched_getaffinity(0)), "torch": "torch" in sys.modules}
    open(f"seen-{os.environ['RANK']}.json", "w").write(json.dumps(shown))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with spaces, and an environment without another launcher's traces."""
    work = tmp_path / "a b"
    work.mkdir()
    monkeypatch.chdir(work)
    path = [*(str(Path(p).resolve()) for p in sys.path if p), str(work / "$(touch pwned); 'x")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    for name in [n for n in os.environ if n.startswith(("SLURM_", "OMPI_", "PMI_", "PET_", "OMP_", "CUDA_"))]:
        monkeypatch.delenv(name)
    return work


def write(name: str, code: str) -> str:
    Path(name).write_text(textwrap.dedent(code))
    return name


def ds(*args: str, env: Mapping[str, str] = {}, limit: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DS, *args], env={**os.environ, **env}, capture_output=True, text=True, timeout=limit, check=False
    )


def seen() -> list[dict[str, object]]:
    files = sorted(Path().glob("seen-*.json"), key=lambda p: int(re.findall(r"\d+", p.name)[0]))
    return [json.loads(file.read_text()) for file in files]


def alive(pids: Sequence[int]) -> list[int]:
    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return [pid for pid in pids if runs(pid)]


def wait_for(condition: object, limit: float = 20) -> None:
    end = time.monotonic() + limit
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


# --- what ranks see ---


def test_ranks_get_what_torchrun_gives_and_arguments_arrive_unchanged() -> None:
    done = ds("launch", "--nproc", "3", "--logs", "l o g s", write("show.py", SHOW), *NASTY)
    assert (done.returncode, done.stderr) == (0, "")
    ranks = seen()
    assert [(r["RANK"], r["LOCAL_RANK"]) for r in ranks] == [("0", "0"), ("1", "1"), ("2", "2")]
    for r in ranks:
        assert r["args"] == NASTY
        assert (r["WORLD_SIZE"], r["LOCAL_WORLD_SIZE"], r["GROUP_RANK"]) == ("3", "3", "0")
        assert r["MASTER_ADDR"] == "127.0.0.1"
        assert r["MASTER_PORT"] == ranks[0]["MASTER_PORT"] != "29500"
        assert r["DS_LOG_DIR"] == str(Path("l o g s").resolve())
        assert int(str(r["OMP_NUM_THREADS"])) >= 1
        assert "CUDA_VISIBLE_DEVICES" not in r
    assert not Path("pwned").exists()


def test_what_the_user_has_set_stays() -> None:
    env = {"OMP_NUM_THREADS": "7", "CUDA_VISIBLE_DEVICES": "5,3", "DS_ACCELERATOR": "cpu"}
    assert ds("launch", write("show.py", SHOW), env=env).returncode == 0
    assert [(r["OMP_NUM_THREADS"], r["CUDA_VISIBLE_DEVICES"]) for r in seen()] == [("7", "5,3")] * 2
    assert len(list(Path("ds-logs").glob("*/rank-*.log"))) == 2  # two ranks where there is no GPU


def test_slots_are_chosen_inside_the_mask_and_cores_are_shared_out() -> None:
    env = {"CUDA_VISIBLE_DEVICES": "5,3,7,1", "DS_ACCELERATOR": "cpu"}
    args = ["--nproc", "4", "--include", "localhost:0,2", "--bind-cores"]
    refused = ds("launch", *args, write("show.py", SHOW), env=env)
    assert refused.returncode == 2
    assert "--nproc 4, but only slots [0, 2] are left" in refused.stderr
    done = ds("launch", "--nproc", "2", "--exclude", "localhost:0", "show.py", env=env)
    assert done.returncode == 2
    assert (
        ds("launch", *args[2:], "--nproc", "auto", "show.py", env=env).returncode == 2
    )  # two slots by default
    assert (
        ds(
            "launch", "--nproc", "1", "--include", "localhost:0", "--bind-cores", "show.py", env=env
        ).returncode
        == 0
    )
    assert [(r["CUDA_VISIBLE_DEVICES"], r["cores"]) for r in seen()] == [
        ("5", sorted(os.sched_getaffinity(0)))
    ]
    assert ds("launch", "--bind-cores", "show.py", env=env).returncode == 0
    first, second = (r["cores"] for r in seen())
    if len(os.sched_getaffinity(0)) > 1:
        assert not {*first} & {*second}  # type: ignore[misc]


def test_cores_are_shared_out_by_a_package_that_knows_how(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(0, 1, 0, 3, 3, "127.0.0.1", 1)
    job = launch.Job(["x"], ".", "logs", 1.0, bind_cores=True)
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda pid: {4, 5, 7, 9, 10, 11, 12})
    monkeypatch.setattr(launch, "entry_points", lambda group: [])
    by_number = launch._rank_members(node, job)
    assert [list(member.cores) for member in by_number] == [[4, 5], [7, 9], [10, 11]]
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda pid: {4, 5})
    assert [list(m.cores) for m in launch._rank_members(node, job)] == [[4], [5], [4]]

    class Entry:
        @staticmethod
        def load() -> Callable[[int], list[tuple[int, ...]]]:
            return lambda ranks: [(rank, rank + 8) for rank in range(ranks)]

    monkeypatch.setattr(launch, "entry_points", lambda group: [Entry] if group == "ds.binding" else [])
    members = launch._rank_members(node, job)
    assert [member.cores for member in members] == [(0, 8), (1, 9), (2, 10)]
    assert {member.environ["DS_BOUND_CORES"] for member in members} == {"1"}
    free = launch._rank_members(node, launch.Job(["x"], ".", "logs", 1.0, bind_cores=False))
    assert [(list(m.cores), "DS_BOUND_CORES" in m.environ) for m in free] == [([], False)] * 3


def test_a_module_and_a_program_run_too() -> None:
    write("mod.py", SHOW)
    assert (
        ds("launch", "-m", "mod", "-m", "x", env={"PYTHONPATH": f"{os.environ['PYTHONPATH']}:."}).returncode
        == 0
    )
    assert seen()[1]["args"] == ["-m", "x"]
    done = ds("launch", "--nproc", "2", "--no-python", "--logs", "logs", "/bin/echo", "x y")
    assert done.stdout == "x y\n"
    assert Path("logs/rank-1.log").read_text() == "x y\n"


def test_rank_0_is_shown_and_all_are_logged() -> None:
    code = """
        import os, sys
        print("out", os.environ["RANK"])
        print("err", os.environ["RANK"], file=sys.stderr)
    """
    done = ds("launch", "--nproc", "2", "--logs", "logs", write("talk.py", code))
    assert (done.stdout, done.stderr) == ("out 0\n", "err 0\n")
    assert sorted(Path("logs/rank-0.log").read_text().split("\n")) == ["", "err 0", "out 0"]
    assert sorted(Path("logs/rank-1.log").read_text().split("\n")) == ["", "err 1", "out 1"]


def test_on_a_terminal_rank_0_has_one_too() -> None:
    code = """
        import os, sys
        both = sys.stdout.isatty() and sys.stderr.isatty()
        print("tty", os.get_terminal_size().columns if both else "none")
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 123, 0, 0))
    args = [*DS, "launch", "--nproc", "2", "--logs", "logs", write("term.py", code)]
    with subprocess.Popen(args, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], 30)[0]:
            try:
                shown += os.read(ours, 4096)
            except OSError:
                break
        assert process.wait(30) == 0, shown
    os.close(ours)
    assert shown == b"tty 123\r\n"
    assert Path("logs/rank-0.log").read_text() == "tty 123\n"


# --- failures ---


def test_the_first_failing_rank_is_blamed_last_and_the_others_are_stopped() -> None:
    code = """
        import os, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open(f"pids-{os.environ['RANK']}", "w").write(f"{os.getpid()} {child.pid}")
        if os.environ["RANK"] == "2":
            while not all(os.path.exists(f"pids-{r}") for r in range(3)):
                time.sleep(0.01)
            try:
                {}["x"]
            except KeyError as error:
                raise ValueError("planted") from error
        time.sleep(60)
    """
    start = time.monotonic()
    done = ds("launch", "--nproc", "3", "--logs", "logs", write("fail.py", code))
    assert time.monotonic() - start < 20
    assert done.returncode == 1
    before, _, last = done.stderr.partition("--- rank 2, the first to fail:\n")
    assert "rank 0: stopped; log: " in before
    assert last.startswith("Traceback (most recent call last):")
    assert "KeyError: 'x'" in last
    assert "direct cause" in last
    assert "\nValueError: planted\n---\n" in last
    verdict = last.splitlines()[-1]
    assert re.search(r"rank 2 \(pid \d+\) on .* failed after .* s: exit code 1; log: .*rank-2.log$", verdict)
    pids = [int(n) for rank in range(3) for n in Path(f"pids-{rank}").read_text().split()]
    wait_for(lambda: not alive(pids))  # the child of the rank that failed among them


def test_a_rank_that_lost_its_peer_is_not_blamed() -> None:
    code = """
        import os, time
        if os.environ["RANK"] == "0":
            raise RuntimeError("[..] Connection closed by peer [127.0.0.1]:1")
        try:
            raise ValueError("the real reason")
        except ValueError:
            import traceback
            traceback.print_exc()
        time.sleep(60)
    """
    done = ds("launch", "--nproc", "2", "--logs", "logs", write("peer.py", code))
    assert done.returncode == 1
    assert "--- rank 1, the first to fail:" in done.stderr
    assert "the real reason" in done.stderr
    assert "Connection closed" not in done.stderr.partition("--- rank 1")[2]


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", 137), ("SIGSEGV", 139)])
def test_a_signal_is_decoded(name: str, code: int) -> None:
    script = write("die.py", f"import os, signal; os.kill(os.getpid(), signal.{name})")
    done = ds("launch", "--nproc", "2", "--logs", "logs", script)
    assert done.returncode == code
    assert f"killed by {name} ({code - 128})" in done.stderr.splitlines()[-1]
    assert "memory" not in done.stderr


def test_a_rank_that_does_not_stop_is_killed_in_time() -> None:
    code = """
        import os, signal, sys, time
        if os.environ["RANK"] == "1":
            while not os.path.exists("ready"):
                time.sleep(0.01)
            sys.exit(5)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open("pid", "w").write(str(os.getpid()))
        open("ready", "w").close()
        time.sleep(60)
    """
    start = time.monotonic()
    done = ds("launch", "--nproc", "2", "--timeout", "0.5", "--logs", "logs", write("deaf.py", code))
    assert time.monotonic() - start < 15
    assert done.returncode == 5
    wait_for(lambda: not alive([int(Path("pid").read_text())]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_forwarded(number: signal.Signals) -> None:
    code = """
        import os, signal, sys, time
        def note(number, frame):
            open(f"got-{os.environ['RANK']}", "w").write(str(number))
            sys.exit(0)
        signal.signal(signal.SIGINT, note)
        signal.signal(signal.SIGTERM, note)
        open(f"ready-{os.environ['RANK']}", "w").close()
        time.sleep(60)
    """
    args = [*DS, "launch", "--nproc", "2", "--logs", "logs", write("wait.py", code)]
    with subprocess.Popen(args, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: all(Path(f"ready-{rank}").exists() for rank in range(2)))
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert err == f"ds launch: stopped by {number.name}\n"
    assert [Path(f"got-{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2


def test_ranks_do_not_outlive_a_killed_launcher() -> None:
    code = """
        import os, time
        open(f"pid-{os.environ['RANK']}", "w").write(str(os.getpid()))
        os.rename(f"pid-{os.environ['RANK']}", f"done-{os.environ['RANK']}")
        time.sleep(60)
    """
    with subprocess.Popen(
        [*DS, "launch", "--nproc", "2", "--logs", "logs", write("wait.py", code)]
    ) as process:
        wait_for(lambda: all(Path(f"done-{rank}").exists() for rank in range(2)))
        process.kill()
    pids = [int(Path(f"done-{rank}").read_text()) for rank in range(2)]
    wait_for(lambda: not alive(pids))


def test_a_reader_that_goes_away_does_not_stop_the_run() -> None:
    code = """
        import os
        for i in range(20000):
            print("line", i)
        open(f"end-{os.environ['RANK']}", "w").close()
    """
    args = [*DS, "launch", "--nproc", "1", "--logs", "logs", write("long.py", code)]
    with subprocess.Popen(args, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(30) == 0
    assert Path("end-0").exists()
    assert Path("logs/rank-0.log").read_text().endswith("line 19999\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nope.py"], "no script 'nope.py' in "),
        (["--nproc", "zwei", "x"], "--nproc 'zwei': allowed are auto and whole numbers from 1"),
        (["--nproc", "0", "x"], "--nproc '0': allowed"),
        (["--nnodes", "2", "x"], "--nnodes 2 needs --master-addr and --master-port"),
        (["--nnodes", "2", "--node-rank", "2", "x"], "--node-rank 2: with --nnodes 2 allowed are 0 to 1"),
        (
            ["--nnodes", "2", "--master-port", "5", "--master-addr", "no.such.host.invalid", "x"],
            "--master-addr 'no.such.host.invalid' has no address on",
        ),
        (["--hostfile", "nope", "x"], "nope"),
        (["--master-port", "TAKEN", "x"], "--master-port TAKEN cannot be used on this host"),
    ],
)
def test_bad_input_is_refused_in_one_line(args: list[str], said: str) -> None:
    Path("x").touch()
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = ds("launch", *[a.replace("TAKEN", port) for a in args])
    assert done.returncode == 2
    assert said.replace("TAKEN", port) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not Path("ds-logs").exists()


# --- several hosts, other launchers ---

RSH = """\
#!{python}
# Does what sshd does: hands one string to a shell, in another environment.
import os, sys
at = sys.argv.index("--end-of-options") if "--end-of-options" in sys.argv else 0
host, command = sys.argv[at + 1], " ".join(sys.argv[at + 2:])
open(f"{folder}/rsh-{{host}}", "w").write(repr(sys.argv[1:]))
if host == "down":
    sys.exit(255)
env = {{"PATH": os.environ["PATH"], "HOME": "/"}}
os.chdir("/")
os.execve("/bin/sh", ["/bin/sh", "-c", command], env)
"""


@pytest.fixture
def rsh(tmp_path: Path) -> str:
    file = tmp_path / "fake rsh"
    file.write_text(RSH.format(python=sys.executable, folder=tmp_path))
    file.chmod(0o755)
    return str(file)


def test_a_hostfile_starts_the_other_hosts(rsh: str, tmp_path: Path) -> None:
    Path("hosts").write_text("# two hosts\nlocalhost slots=2\n\nuser@far.away slots=3  # and one more\n")
    args = ["--hostfile", "hosts", "--rsh", rsh, "--rsh-arg=-p 1;2", "--rsh-arg=--end-of-options"]
    more = ["--exclude", "far.away:1", "--export", "OTHER_MARK", "--logs", "logs"]
    env = {"DS_MARK": "$(x) 'y'", "OTHER_MARK": "a\nb"}
    done = ds("launch", *args, *more, write("show.py", SHOW), *NASTY, env=env)
    assert done.returncode == 0, done.stderr
    assert "'-p 1;2'" in (tmp_path / "rsh-user@far.away").read_text()
    ranks = seen()
    wanted = [("0", "0", "2", "0"), ("1", "1", "2", "0"), ("2", "0", "2", "1"), ("3", "1", "2", "1")]
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    assert [tuple(r[n] for n in names) for r in ranks] == wanted
    assert len({(r["WORLD_SIZE"], r["MASTER_ADDR"], r["MASTER_PORT"]) for r in ranks}) == 1
    assert [r["CUDA_VISIBLE_DEVICES"] for r in ranks] == ["0,1", "0,1", "0,2", "0,2"]
    assert all(
        r["args"] == NASTY and (r["DS_MARK"], r["OTHER_MARK"]) == (env["DS_MARK"], "a\nb") for r in ranks
    )
    assert not Path("pwned").exists()


def test_a_failure_on_another_host_is_blamed_with_its_own_words(rsh: str) -> None:
    Path("hosts").write_text("localhost slots=1\nfar slots=1\n")
    code = """
        import os, time
        open(f"pid-{os.environ['RANK']}", "w").write(str(os.getpid()))
        if os.environ["RANK"] == "1":
            raise ValueError("far away")
        time.sleep(60)
    """
    done = ds("launch", "--hostfile", "hosts", "--rsh", rsh, "--logs", "logs", write("fail.py", code))
    assert done.returncode == 1
    assert "--- host far, the first to fail:" in done.stderr
    assert "ValueError: far away" in done.stderr
    wait_for(lambda: not alive([int(Path("pid-0").read_text())]))


def test_a_failure_here_stops_the_other_hosts(rsh: str) -> None:
    Path("hosts").write_text("localhost slots=1\nfar slots=1\n")
    code = """
        import os, time
        if os.environ["RANK"] == "1":
            open("part", "w").write(str(os.getpid()))
            os.rename("part", "pid")
            time.sleep(60)
        while not os.path.exists("pid"):
            time.sleep(0.01)
        raise ValueError("here")
    """
    start = time.monotonic()
    args = ["--hostfile", "hosts", "--rsh", rsh, "--timeout", "30", "--logs", "logs"]
    done = ds("launch", *args, write("fail.py", code))
    assert time.monotonic() - start < 25, "the other host was not told, but killed"
    assert done.returncode == 1
    assert "ValueError: here" in done.stderr
    assert not alive([int(Path("pid").read_text())])


def test_a_host_that_cannot_be_reached_is_named(rsh: str) -> None:
    Path("hosts").write_text("localhost slots=1\ndown slots=1\n")
    script = write("wait.py", "import time; time.sleep(60)")
    done = ds("launch", "--hostfile", "hosts", "--rsh", rsh, "--logs", "logs", script)
    assert done.returncode == 255
    assert "host down could not be reached" in done.stderr.splitlines()[-1]


SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "node[08-10]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "PMI_RANK": "9",
    "PMI_SIZE": "10",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        (SLURM, ("3", "1", "5", "2", "node08")),
        (OPEN_MPI, ("1", "1", "2", "2", "127.0.0.1")),
        ({**SLURM, **OPEN_MPI}, ("1", "1", "2", "2", "127.0.0.1")),
        ({**HYDRA, "MASTER_ADDR": "head", "MASTER_PORT": "4321"}, ("3", "1", "4", "2", "head")),
    ],
    ids=["slurm", "openmpi", "openmpi in slurm", "hydra"],
)
def test_under_another_launcher_the_process_becomes_its_rank(
    env: dict[str, str], wanted: tuple[str, ...]
) -> None:
    done = ds("launch", write("show.py", SHOW), *NASTY, env=env)
    assert done.returncode == 0, done.stderr
    [rank] = seen()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    assert tuple(rank[n] for n in names) == wanted
    assert rank["args"] == NASTY
    assert 20000 <= int(str(rank["MASTER_PORT"])) < 32000 or rank["MASTER_PORT"] == "4321"
    assert not Path("ds-logs").exists()


def test_one_task_per_node_is_a_node_of_ranks() -> None:
    one = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    one |= {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost,elsewhere"}
    done = ds("launch", "--nproc", "2", write("show.py", SHOW), env={**SLURM, **one})
    assert done.returncode == 0, done.stderr
    assert [(r["RANK"], r["WORLD_SIZE"], r["GROUP_RANK"], r["MASTER_ADDR"]) for r in seen()] == [
        ("2", "4", "1", "localhost"),
        ("3", "4", "1", "localhost"),
    ]


def test_mpi_on_several_hosts_asks_where_rank_0_is() -> None:
    done = ds("launch", write("show.py", SHOW), env=HYDRA)
    assert done.returncode == 2
    assert "give --master-addr and --master-port" in done.stderr
    assert ds("launch", "--under", "local", "--nproc", "1", "show.py", env=HYDRA).returncode == 0
    assert seen()[0]["WORLD_SIZE"] == "1"


# --- with torch, once ---


def test_a_gloo_job_runs_and_the_rank_that_broke_it_is_found() -> None:
    code = """
        import sys
        import torch
        import torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        print("total", total.item())
        if dist.get_rank() == 1 and "fail" in sys.argv:
            raise ValueError("planted")
        dist.barrier()
        dist.destroy_process_group()
    """
    env = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = ds("launch", "--nproc", "2", "--logs", "logs", write("gloo.py", code), "fail", env=env)
    assert done.returncode in (1, 128 + signal.SIGABRT)  # gloo's threads may abort the dying interpreter
    assert "total 2.0" in done.stdout
    assert "--- rank 1, the first to fail:" in done.stderr
    assert "ValueError: planted" in done.stderr
