"""`ds launch`: start one process per rank on this host, on the hosts of a hostfile, or under srun and mpirun.

Ranks get what torchrun gives: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_ADDR and
MASTER_PORT; besides, DS_LOG_DIR, with --bind-cores DS_BOUND_CORES, and where they are not set
OMP_NUM_THREADS, OMP_WAIT_POLICY and PYTHONUNBUFFERED.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ds_core.cli.blame import report
from ds_core.cli.environ import Place, find_place
from ds_core.cli.group import Member, run_group
from ds_core.cli.plan import Node, count_ranks, is_here, plan_hosts, plan_node, visible_devices
from ds_core.observe.host import count_accelerators, usable_cores

# What a rank on another host needs of this one's environment besides --export.
_EXPORTED = (
    "NCCL_",
    "GLOO_",
    "UCX_",
    "FI_",
    "TORCH_",
    "PYTORCH_",
    "OMP_",
    "MKL_",
    "DS_",
    "HF_",
    "PYTHONPATH",
)


@dataclass(frozen=True)
class Job:
    """What every host of a job has in common."""

    command: list[str]
    cwd: str
    logs: str
    timeout: float
    bind_cores: bool


def add_parser(subparsers: Any) -> None:
    """Add `launch` to the command."""
    parser = subparsers.add_parser(
        "launch",
        help="start a training script on several processes",
        description="Start one process per rank. Stops all ranks when one fails, and says which and why.",
        usage="ds launch [options] [-m] script-or-module [arguments of the script]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nproc", default="auto", metavar="N", help="ranks per host; auto: all GPUs, or 2 without (default)")
    add("-m", "--module", action="store_true", help="the script is the name of a module")
    add("--no-python", action="store_true", help="the script is a program to run as it is")
    add("--logs", metavar="DIR", help="where rank-N.log files go (default: a new folder under ds-logs)")
    add(
        "--timeout",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds ranks get to stop by themselves (10)",
    )
    add("--bind-cores", action="store_true", help="give each rank cores of its own")
    hosts = parser.add_argument_group("several hosts")
    add = hosts.add_argument
    add("--nnodes", type=int, metavar="N", help="hosts in the job (with a hostfile: its first N)")
    add("--node-rank", type=int, metavar="I", help="this host's number, when every host runs ds launch")
    add("--master-addr", metavar="HOST", help="where rank 0 runs")
    add("--master-port", type=int, metavar="PORT", help="a free port there (default: a free one on one host)")
    add("--hostfile", metavar="FILE", help="lines `host slots=4`; the other hosts are started through ssh")
    add("--include", metavar="SLOTS", help="only these: host@host:0,2")
    add("--exclude", metavar="SLOTS", help="all but these: host@host:0,2")
    add(
        "--rsh",
        default="ssh",
        metavar="PROGRAM",
        help="instead of ssh; called as PROGRAM [args] host command",
    )
    add("--rsh-arg", action="append", default=[], metavar="ARG", help="argument for ssh; may be repeated")
    add("--export", action="append", default=[], metavar="NAME", help="pass this variable on to other hosts")
    choices = ["auto", "local", "slurm", "mpi"]
    add(
        "--under", default="auto", choices=choices, help="which launcher started this one (default: find out)"
    )
    # PARSER: one word and then everything, options and `--` included, as it is.
    parser.add_argument("script", nargs=argparse.PARSER, help=argparse.SUPPRESS)
    parser.set_defaults(func=launch)


def launch(args: argparse.Namespace) -> int:
    """Run `ds launch`; returns the exit code: that of the first rank to fail, 0 if none did."""
    command = _command(args)
    place = None if args.hostfile or args.nnodes else find_place(os.environ, os.getppid(), args.under)
    if place is not None and place.world > 1:
        if place.local_world > 1 or count_ranks(args.nproc, default=max(1, count_accelerators())) == 1:
            return _become_rank(place, command, args)
        args.nnodes, args.node_rank = place.nodes, place.node
        args.master_addr = args.master_addr or place.master_addr
        args.master_port = args.master_port or place.master_port
    plan = plan_hosts(args) if args.hostfile else plan_node(args)
    job = Job(command, os.getcwd(), _log_folder(args.logs), args.timeout, args.bind_cores)
    return run_node(plan, job) if isinstance(plan, Node) else _run_hosts(plan, job, args)


# --- what to run where ---


def _command(args: argparse.Namespace) -> list[str]:
    script, *rest = args.script[1:] if args.script[0] == "--" else args.script
    if args.no_python:
        return [script, *rest]
    if args.module:
        return [sys.executable, "-m", script, *rest]
    if not Path(script).is_file():
        raise FileNotFoundError(f"no script {script!r} in {os.getcwd()}; for a module say -m")
    return [sys.executable, script, *rest]


def _log_folder(wanted: str | None) -> str:
    """Make the folder for the logs: the one asked for, else a new one under ds-logs, else a temporary one."""
    if wanted is not None:
        folder = Path(wanted)
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder.resolve())
    folder = Path("ds-logs", f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    try:
        folder.mkdir(parents=True)
    except OSError:  # a read-only working directory
        return tempfile.mkdtemp(prefix="ds-logs-")
    return str(folder.resolve())


# --- running it ---


def run_node(node: Node, job: Job, *, stop_on_eof: bool = False) -> int:
    """Run one host's ranks to their end and report; returns the exit code."""
    members = _rank_members(node, job)
    result = run_group(members, cwd=Path(job.cwd), timeout=job.timeout, stop_on_eof=stop_on_eof)
    return report(result, sys.stderr)


def _run_hosts(plan: Mapping[str, Node], job: Job, args: argparse.Namespace) -> int:
    members: list[Member] = []
    for host, node in plan.items():
        if is_here(host):
            members += _rank_members(node, job)
        else:
            members.append(_host_member(host, node, job, args))
    return report(run_group(members, cwd=Path(job.cwd), timeout=job.timeout), sys.stderr)


def _host_member(host: str, node: Node, job: Job, args: argparse.Namespace) -> Member:
    """Start another host's share. Only fixed words and this Python's path pass through its login shell."""
    agent = [sys.executable, "-P", "-m", "ds_core.cli.agent"]
    if "PYTHONPATH" in os.environ:
        agent = ["env", f"PYTHONPATH={os.environ['PYTHONPATH']}", *agent]
    exported = {k: v for k, v in os.environ.items() if k.startswith(_EXPORTED) or k in args.export}
    if missing := [name for name in args.export if name not in os.environ]:
        raise LookupError(f"--export {missing[0]}: no such variable here; set it first")
    message = {"node": asdict(node), "job": asdict(job), "environ": exported}
    return Member(
        name=f"host {host}",
        argv=[args.rsh, *args.rsh_arg, host, shlex.join(agent)],
        environ=os.environ,
        log=Path(job.logs, f"node-{node.index}.log"),
        echo=node.index == 0,
        message=json.dumps(message).encode() + b"\n",
    )


def _rank_members(node: Node, job: Job) -> list[Member]:
    shares = _share_cores(node.nproc) if job.bind_cores else [()] * node.nproc
    bound = {"DS_BOUND_CORES": "1"} if job.bind_cores else {}
    members = []
    for local in range(node.nproc):
        rank = node.first_rank + local
        members.append(
            Member(
                name=f"rank {rank}",
                argv=job.command,
                environ={**os.environ, **_rank_environ(node, local, job.logs), **bound},
                log=Path(job.logs, f"rank-{rank}.log"),
                echo=rank == 0,
                cores=shares[local],
            )
        )
    return members


def _share_cores(ranks: int) -> Sequence[Sequence[int]]:
    """Cores for each rank: by NUMA node and whole ones where a package knows how, else by number."""
    for entry in entry_points(group="ds.binding"):
        shares: Sequence[Sequence[int]] = entry.load()(ranks)
        return shares
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // ranks
    return [cores[r * each : (r + 1) * each] if each else [cores[r % len(cores)]] for r in range(ranks)]


def _rank_environ(node: Node, local: int, logs: str | None) -> dict[str, str]:
    """What one rank's environment gets on top of this one's."""
    environ = {
        "RANK": str(node.first_rank + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(node.world),
        "LOCAL_WORLD_SIZE": str(node.nproc),
        "GROUP_RANK": str(node.index),
        "MASTER_ADDR": node.master_addr,
        "MASTER_PORT": str(node.master_port),
    }
    if logs is not None:
        environ["DS_LOG_DIR"] = logs
    if node.slots is not None:
        environ["CUDA_VISIBLE_DEVICES"] = visible_devices(node.slots, os.environ.get("CUDA_VISIBLE_DEVICES"))
    defaults = {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // node.nproc)),
        # Threads that wait by spinning slow a rank tenfold as soon as anything else wants their core.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a crash in native code then shows the Python line it came from
    }
    return environ | {name: value for name, value in defaults.items() if name not in os.environ}


def _become_rank(place: Place, command: list[str], args: argparse.Namespace) -> int:
    """Under srun or mpirun every process is a rank already: set the environment and turn into the script."""
    addr = args.master_addr or os.environ.get("MASTER_ADDR") or place.master_addr
    port = args.master_port or int(os.environ.get("MASTER_PORT", "0")) or place.master_port
    if not addr or not port:
        raise ValueError(
            "the ranks are on several hosts and mpirun does not say where rank 0 is: give --master-addr and "
            "--master-port, or set MASTER_ADDR and MASTER_PORT"
        )
    first = place.rank - place.local_rank
    node = Node(place.node, place.nodes, first, place.local_world, place.world, addr, port)
    logs = _log_folder(args.logs) if args.logs else None
    environ = {**os.environ, **_rank_environ(node, place.local_rank, logs), "RANK": str(place.rank)}
    sys.stdout.flush()
    os.execvpe(command[0], command, environ)
