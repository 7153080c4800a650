"""When a rank is gone, late or elsewhere: the others say which, nothing hangs, and nothing is left behind."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ds_comm import shm, shm_flow, shm_memory
from ds_comm.shm_memory import PAGE, Block, Segment, process_start
from ds_core.ground.accelerator import Accelerator
from ds_core.ground.collectives import TorchCommunicator
from ds_core.ground.desync import DesyncError
from ds_core.ground.flight import Lane
from ds_core.ground.mesh import Topology, leave_distributed
from ds_core.testing.distributed import RankFailure, distributed, run_ranks


def wire(timeout_s: float = 30.0) -> TorchCommunicator:
    built = Topology().build(Accelerator(torch.device("cpu")), timeout_s=timeout_s)
    comm = built.communicator("dp_shard", "reduce")
    assert isinstance(comm, TorchCommunicator)
    return comm


def alone(comm: TorchCommunicator) -> None:
    """As a user has it who makes a communicator without a watch: errors are those of the fabric itself."""
    fabric = comm._fabric
    assert isinstance(fabric, shm.ShmFabric)
    fabric._flow.lane = Lane("alone", fabric._flow.lane.ranks)
    comm.lane = fabric._flow.lane


def mappings(process: str = "self") -> list[str]:
    """Mappings of shared memory of a process, with the number of each one's file."""
    try:
        lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    except OSError:  # it has gone meanwhile
        return []
    return [line for line in lines if "/dev/shm" in line or "ds-shm" in line]


def dies(rank: int, folder: str) -> None:
    comm = wire()
    alone(comm)
    assert not any("/dev/shm" in line for line in mappings())
    (Path(folder) / f"files-{rank}").write_text("\n".join(line.split()[4] for line in mappings()))
    comm.all_reduce(comm.allocate(1000, torch.float32).zero_()).wait()
    if rank == 1:
        ticket = comm.all_reduce(torch.ones(300_000), about="the bias")  # shown, and never finished
        os.kill(os.getpid(), signal.SIGKILL)
        ticket.wait()
    began = time.monotonic()
    try:
        for _ in range(3):
            comm.all_reduce(torch.ones(300_000), about="the bias").wait()
    except RuntimeError as error:
        (Path(folder) / f"{rank}").write_text(f"{time.monotonic() - began}\n{error}")
        with pytest.raises(RuntimeError, match="rank 1"):  # and for ever
            comm.all_reduce(torch.ones(8)).wait()
        raise


@pytest.mark.parametrize("world", [2, 3])
def test_a_killed_rank_is_named_and_leaves_nothing(tmp_path: Path, world: int) -> None:
    with pytest.raises(RankFailure, match="SIGKILL"):
        run_ranks(dies, world, folder=str(tmp_path))
    for rank in {*range(world)} - {1}:
        took, *said = (tmp_path / str(rank)).read_text().splitlines()
        assert float(took) < 2
        assert "rank 1" in "\n".join(said), said
    files = {file for each in tmp_path.glob("files-*") for file in each.read_text().split()}
    assert len(files) == world
    everywhere = [line for entry in os.listdir("/proc") if entry.isdigit() for line in mappings(entry)]
    assert not [line for line in everywhere if line.split()[4] in files]


@distributed(world_size=2)
def test_a_rank_that_does_not_come_is_named_with_what_travels(rank: int, world: int) -> None:
    comm = wire(timeout_s=1.0)
    alone(comm)
    if rank == 0:
        ticket = comm.all_reduce(torch.ones(8), about="layer.bias")
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"rank 1 did not come to .*all_reduce of layer.bias, 8 x"):
                ticket.wait()
    dist.barrier()


@distributed(world_size=2)
def test_a_rank_that_left_is_named(rank: int, world: int) -> None:
    comm = wire()
    alone(comm)
    if rank == 1:
        comm.close()
        dist.barrier()
        with pytest.raises(RuntimeError, match=r"was closed|have left each other"):
            comm.all_reduce(torch.ones(8)).wait()
        assert comm.allocate(4, torch.float32).numel() == 4
        return
    dist.barrier()
    with pytest.raises(RuntimeError, match="rank 1 has left before it came to"):
        comm.all_reduce(torch.ones(8)).wait()


@distributed(world_size=3)
def test_a_rank_that_has_done_its_part_may_be_gone(rank: int, world: int) -> None:
    comm = wire()
    alone(comm)
    total = torch.ones(8)
    ticket = None if rank == 1 else comm.all_reduce(total)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            gone = {peer.pid for _, peer in comm._fabric._flow.others if peer.rank == 2}
            patch.setattr(
                shm_flow, "process_start", lambda pid: "" if pid in gone else shm_memory.process_start(pid)
            )
        if rank == 1:
            time.sleep(0.3)
            ticket = comm.all_reduce(total)
        ticket.wait()
        assert total.tolist() == [3.0] * 8
        dist.barrier()
        if rank == 0:  # and one that has not is missed
            with pytest.raises(RuntimeError, match=r"rank 2 .* died during"):
                comm.all_reduce(total).wait()
    dist.barrier()


def parts(rank: int, how: str) -> None:
    comm = wire(timeout_s=4.0)
    comm.all_reduce(torch.ones(8)).wait()
    numel, about = (9, "a") if how == "size" and rank else (8, "b" if how == "about" and rank else "a")
    out = torch.empty(2 * numel)

    def go_on() -> None:
        if how == "op" and rank:
            comm.broadcast(out, about=about).wait()
        for _ in range(2):
            comm.all_gather(out, torch.ones(numel), about=about).wait()

    with pytest.raises(DesyncError) as caught:
        go_on()
    said = str(caught.value)
    assert "ranks no longer do the same" in said, said
    assert "rank 0" in said, said
    assert "rank 1" in said, said
    leave_distributed()  # the groups are broken


@pytest.mark.parametrize("how", ["size", "about", "op"])
def test_ranks_that_part_all_raise_the_same(how: str) -> None:
    run_ranks(parts, 2, how=how)


@distributed(world_size=2)
def test_a_forked_child_is_refused_and_harms_nobody(rank: int, world: int) -> None:
    comm = wire()
    kept = comm.allocate(4, torch.float32).fill_(float(rank))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert comm.allocate(4, torch.float32).numel() == 4
            comm.all_reduce(torch.ones(4)).wait()
        except RuntimeError as error:
            code = 0 if "forked from the rank" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    comm.all_reduce(kept).wait()
    assert kept.tolist() == [1.0] * 4


@pytest.mark.parametrize("how", ["off", "elsewhere", "no memory", "no map", "no compiler", "another version"])
@distributed(world_size=2)
def test_one_rank_that_cannot_takes_all_to_the_plain_routes(rank: int, world: int, how: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            break_(patch, how)
        comm = wire()
    assert comm.route == "gloo"
    total = comm.allocate(6, torch.float32).fill_(1.0)
    comm.all_reduce(total).wait()
    assert total.tolist() == [2.0] * 6


def break_(patch: pytest.MonkeyPatch, how: str) -> None:
    def refuse(*args: object) -> None:
        raise OSError("planted")

    def unbuilt() -> None:
        raise shm.BuildError("shm", "planted")

    if how == "off":
        patch.setenv("DS_SHM", "0")
    elif how == "elsewhere":
        patch.setattr(shm, "host_name", lambda: "another host")
    elif how == "no memory":
        patch.setattr(shm, "Segment", refuse)
    elif how == "no map":
        patch.setattr(shm, "PeerSegment", refuse)
    elif how == "another version":
        patch.setattr(shm, "source_key", lambda family: "older")
    else:
        patch.setattr(shm, "load_shm", unbuilt)


@distributed(world_size=2)
def test_a_word_that_is_no_choice_is_refused(rank: int, world: int) -> None:
    os.environ["DS_SHM"] = "maybe"
    with pytest.raises(ValueError, match=r"DS_SHM='maybe': allowed are 0 .* and 1"):
        wire()


@distributed(world_size=2)
def test_a_process_that_is_another_one_is_not_mapped(rank: int, world: int) -> None:
    segment = Segment(PAGE)
    with pytest.raises(OSError, match="is not the rank that it should be"):
        shm.PeerSegment(os.getpid(), segment.file, segment.nbytes, b"x" * 16)
    assert shm.PeerSegment(os.getpid(), segment.file, segment.nbytes, segment.name).address
    assert process_start(os.getpid())
    assert not process_start(2**22 + 1)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@distributed(world_size=2)
def test_a_thousand_collectives_leave_nothing(rank: int, world: int) -> None:
    comm = wire()

    def some(count: int) -> None:
        for number in range(count):
            n = 1000 * (1 + number % 50)
            full = comm.allocate(2 * n, torch.float32) if number % 2 else torch.empty(2 * n)
            comm.reduce_scatter(torch.empty(n), full.fill_(1.0)).wait()
            comm.all_gather(full, full[:n].clone()).wait()

    some(100)
    gc.collect()
    files, memory = len(os.listdir("/proc/self/fd")), resident()
    some(450)
    assert len(os.listdir("/proc/self/fd")) == files
    assert resident() - memory < 4 << 20
    assert len(mappings()) == world
    ours = sum("ds-shm" in os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink())
    assert ours > 0
    for _ in range(5):
        comm.close()
        del comm
        gc.collect()
        comm = wire()
    left = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    assert sum("ds-shm" in file for file in left) == ours  # gloo keeps its own


@distributed(world_size=2)
def test_tensors_outlive_the_group(rank: int, world: int) -> None:
    comm = wire()
    kept = comm.allocate(1000, torch.float32).fill_(7.0)
    comm.all_reduce(torch.ones(4)).wait()
    leave_distributed()
    del comm
    gc.collect()
    assert kept.sum() == 7000
    kept += 1


def test_blocks_are_used_again_and_join() -> None:
    segment = Segment(PAGE)
    first, second, third = (segment.take(3 * PAGE, 0) for _ in range(3))
    assert [block.start for block in (first, second, third)] == [PAGE, 4 * PAGE, 7 * PAGE]
    first.last_use, second.last_use = 5, 3
    segment.give(first)
    segment.give(second)
    assert segment.take(PAGE, 2).start == 10 * PAGE  # both are still read
    assert segment.take(2 * PAGE, 3).start == 4 * PAGE
    assert segment.take(4 * PAGE, 5).start == 11 * PAGE  # what is left of the two does not hold it
    assert segment.take(3 * PAGE, 5).start == PAGE
    assert segment.take(PAGE, 5).start == 6 * PAGE


def test_a_tensor_keeps_its_block_as_long_as_a_view_lives() -> None:
    segment = Segment(PAGE)
    whole = segment.tensor(1000, torch.float32, 0)
    block = segment.find(whole.data_ptr() + 100)
    assert isinstance(block, Block)
    assert block.nbytes == 4000
    assert segment.find(whole.data_ptr() + 4096) is None
    view = whole[10:]
    del whole
    assert block.held
    assert segment.take(PAGE, 0).start != block.start
    del view
    assert not block.held
    assert segment.take(PAGE, 0).start == block.start


def test_memory_that_nobody_uses_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_memory, "_KEPT_BYTES", 2 * PAGE)
    segment = Segment(PAGE)
    for _ in range(2):
        block = segment.take(64 * PAGE, 0)
        assert os.fstat(segment.file).st_blocks * 512 >= 64 * PAGE
        segment.give(block)
        segment.take(PAGE, 0)
        assert os.fstat(segment.file).st_blocks * 512 <= 8 * PAGE


def test_more_than_there_is_is_refused() -> None:
    segment = Segment(PAGE)
    with pytest.raises(OSError, match="bytes of shared memory are wanted"):
        segment.take(segment.nbytes, 0)
    assert segment.take(PAGE, 0).start == PAGE
