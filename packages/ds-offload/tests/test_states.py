"""Where the optimizer's states live and how they show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ds_core import ReplicatedOwner, ShardedOptimizer
from ds_offload import TieredStore
from ds_offload.states import UnitStates, is_cut
from ds_offload.work import IN_HOME


def test_what_has_a_number_for_every_element_is_cut() -> None:
    param = nn.Parameter(torch.zeros(3, 4))
    assert is_cut(torch.zeros(3, 4), param)
    assert not is_cut(torch.zeros(12), param)
    assert not is_cut(torch.tensor(1.0), param)
    assert not is_cut(1.0, param)
    assert not is_cut(None, param)
    assert not is_cut(torch.tensor(1.0), nn.Parameter(torch.tensor(2.0)))  # a number goes with its piece


def setup(folder: Path) -> tuple[TieredStore, ShardedOptimizer, UnitStates]:
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    store = TieredStore(nvme=str(folder), masters="nvme", moments="nvme", grads="nvme")
    sharded = ShardedOptimizer(torch.optim.AdamW(model.parameters()), ReplicatedOwner(model, store=store))
    return store, sharded, UnitStates(store, sharded)


def test_pieces_share_the_home_of_their_unit(tmp_path: Path) -> None:
    store, sharded, states = setup(tmp_path)
    unit = sharded.pieces[0].unit
    for number, piece in enumerate(sharded.pieces):
        room = states.room(piece, "exp_avg", torch.float32)
        assert room.shape == piece.param.shape
        room.fill_(float(number))
    home = states.home(unit, "exp_avg", torch.float32)
    assert home.tensor.numel() == unit.layout.shard_numel
    for number, piece in enumerate(sharded.pieces):
        assert bool((home.tensor[slice(*piece.overlap.local)] == number).all())
    with pytest.raises(
        ValueError, match=r"exp_avg of .* lives in torch.float32 and another .* torch.bfloat16"
    ):
        states.home(unit, "exp_avg", torch.bfloat16)
    store.close()


def test_states_in_memory_move_home_and_numbers_stay(tmp_path: Path) -> None:
    store, sharded, states = setup(tmp_path)
    piece = sharded.pieces[0]
    step, moment = torch.tensor(3.0), torch.full_like(piece.param.detach(), 2.0)
    sharded.optimizer.state[piece.param] = {"step": step, "exp_avg": moment}
    states.bring_home([piece])
    held = sharded.optimizer.state[piece.param]
    assert held["step"] is step
    assert held["exp_avg"] is not moment
    assert torch.equal(held["exp_avg"], moment)
    at = states.room(piece, "exp_avg", torch.float32)
    assert held["exp_avg"].data_ptr() == at.data_ptr()
    again = held["exp_avg"]
    states.bring_home([piece])
    assert held["exp_avg"] is again
    piece.unit.gradient = torch.zeros(piece.unit.layout.shard_numel)
    work = states.work(piece.unit, [piece])
    home = store.home_of(f"{piece.unit.key}/exp_avg")
    assert {name: flat.home for name, flat in work.states.items()} == {"exp_avg": home}
    assert work.numbers == {id(piece.param): {"step": step, "exp_avg": IN_HOME}}
    assert (work.master.home is None, work.gradient.home) == (False, None)  # the latter put there by hand
    assert work.cuts is None  # AdamW may be cut anywhere
    states.show(piece, {"step": torch.tensor(4.0), "exp_avg": None, "fresh": None})
    assert float(held["step"]) == 4.0
    assert held["exp_avg"] is again
    store.close()


def test_nothing_left_leaves_no_state(tmp_path: Path) -> None:
    store, sharded, states = setup(tmp_path)
    states.show(sharded.pieces[0], {})
    assert len(sharded.optimizer.state) == 0
    store.close()
