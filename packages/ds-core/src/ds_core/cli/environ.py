"""This process's place in a job that srun or mpirun started, read from the environment (pure)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ds_core.cli.hosts import expand_nodelist

# Below the range that Linux hands out for outgoing connections (32768 up), so a chosen port stays free.
FIRST_PORT, NUM_PORTS = 20000, 12000


@dataclass(frozen=True, slots=True)
class Place:
    """One task among those of a job. `master_addr` is None where the environment does not tell."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    node: int
    nodes: int
    master_addr: str | None
    master_port: int | None


def port_for(job: str) -> int:
    """The same port for everyone who knows the job's name."""
    return FIRST_PORT + zlib.crc32(job.encode()) % NUM_PORTS


def _read_slurm(env: Mapping[str, str]) -> Place | None:
    """The place that `srun` gave; None outside a job step."""
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
        return None
    world = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1"))
    node = int(env.get("SLURM_NODEID", "0"))
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", str(world))
    per_node = _tasks_per_node(tasks)
    hosts = expand_nodelist(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
    return Place(
        rank=int(env["SLURM_PROCID"]),
        world=world,
        local_rank=int(env.get("SLURM_LOCALID", "0")),
        local_world=per_node[node] if node < len(per_node) else 1,
        node=node,
        nodes=int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES", str(len(per_node)))),
        master_addr=hosts[0] if hosts else None,
        master_port=port_for(f"slurm {env.get('SLURM_JOB_ID')}.{env['SLURM_STEP_ID']}"),
    )


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's `2(x3),1` as [2, 2, 2, 1]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


_OPEN_MPI = (  # rank, world, local rank, local world, what names the job
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "PMIX_NAMESPACE",
)
_MVAPICH = (
    "MV2_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "MPIRUN_ID",
)
_HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PMI_JOBID")


def find_place(env: Mapping[str, str], parent: int, source: str = "auto") -> Place | None:
    """The place that another launcher gave this process; None if there is no other launcher.

    `parent` is the id of the parent process, which the ranks of one host share under mpirun. `source` is
    "slurm", "mpi", "local" or "auto". mpirun inside a SLURM job leaves both sets of variables, of which
    SLURM's describe mpirun's daemon; srun in turn may set PMI_RANK.
    """
    readers: dict[str, list[Callable[[], Place | None]]] = {
        "mpi": [lambda: _read_mpi(env, parent, _OPEN_MPI), lambda: _read_mpi(env, parent, _MVAPICH)],
        "slurm": [lambda: _read_slurm(env)],
        "hydra": [lambda: _read_mpi(env, parent, _HYDRA)],
    }
    wanted: dict[str, tuple[str, ...]] = {
        "auto": ("mpi", "slurm", "hydra"),
        "mpi": ("mpi", "hydra"),
        "slurm": ("slurm",),
        "local": (),
    }
    for kind in wanted[source]:
        for read in readers[kind]:
            if (place := read()) is not None:
                return place
    return None


def _read_mpi(env: Mapping[str, str], parent: int, keys: tuple[str, str, str, str, str]) -> Place | None:
    rank_key, world_key, local_key, local_world_key, job_key = keys
    if rank_key not in env or world_key not in env:
        return None
    rank, world = int(env[rank_key]), int(env[world_key])
    local_world = int(env.get(local_world_key, world))
    alone = local_world == world  # all on this host
    job = env.get(job_key, f"parent {parent}" if alone else "")
    return Place(
        rank=rank,
        world=world,
        local_rank=int(env.get(local_key, rank)),
        local_world=local_world,
        node=rank // local_world,
        nodes=-(-world // local_world),
        master_addr="127.0.0.1" if alone else None,
        master_port=port_for(f"mpi {job}") if job else None,
    )
