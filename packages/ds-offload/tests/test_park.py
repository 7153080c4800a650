"""Parking at stage 0: what leaves, what refuses meanwhile, and that training goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_core import Engine
from ds_core.state.owner import ReplicatedOwner
from ds_core.state.parked import ParkedStateError
from ds_core.train.optim import ShardedOptimizer
from ds_kernels import FusedAdamW
from ds_offload import TieredStore, Volume, park, unpark
from ds_offload.home import Home
from ds_offload.parking import StateLot

KINDS = ("params", "grads", "masters", "moments")
DTYPES = [None, torch.bfloat16]


def build(
    dtype: torch.dtype | None = None, rule: Any = torch.optim.AdamW, **store: Any
) -> tuple[nn.Module, ReplicatedOwner, Engine]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.LayerNorm(32))
    model[3].weight.requires_grad_(False)
    optimizer = rule([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    owner = ReplicatedOwner(model, dtype=dtype, store=TieredStore(**store) if store else None)
    return model, owner, Engine(model, owner, ShardedOptimizer(optimizer, owner), accumulate=2)


def micro(engine: Engine, seed: int) -> None:
    dtype = engine.owner.precision.param or torch.float32
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
    engine.backward(engine(x).float().square().mean())
    engine.step()


def state(engine: Engine) -> list[Tensor]:
    found = [unit.values().detach().clone() for unit in engine.owner.units]
    found += [param.detach().clone() for param in engine.model.parameters()]
    for values in engine.optimizer.optimizer.state.values():
        found += [value.clone() for value in values.values() if isinstance(value, Tensor)]
    return found


def held(owner: ReplicatedOwner) -> int:
    """Bytes of the distinct storages of the state on the device."""
    return sum(parcel.nbytes for parcel in StateLot(owner)._find())


def places(to: str, folder: Path) -> str:
    return f"nvme:{folder}" if to == "nvme" else to


@pytest.mark.parametrize("to", ["host", "nvme"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", [torch.optim.AdamW, FusedAdamW])
def test_parks_in_the_middle_of_a_step_and_goes_on_bit_for_bit(
    to: str, dtype: torch.dtype | None, rule: Any, tmp_path: Path
) -> None:
    _, _, plain = build(dtype, rule)
    _, owner, parked = build(dtype, rule)
    for seed in range(7):
        micro(plain, seed)
        micro(parked, seed)
        before = held(owner)
        there = state(parked)
        left = parked.offload_states(to=places(to, tmp_path))
        assert before == left > 0
        assert held(owner) == 0
        assert parked.reload_states() == left
        assert held(owner) == before
        assert all(map(torch.equal, there, state(parked)))
    assert all(map(torch.equal, state(plain), state(parked)))
    assert list(tmp_path.iterdir()) == []


def test_every_tensor_is_the_same_object_afterwards() -> None:
    model, owner, engine = build(torch.bfloat16)
    micro(engine, 0)
    micro(engine, 1)
    micro(engine, 2)
    moments = [v for s in engine.optimizer.optimizer.state.values() for v in s.values()]
    pieces = [piece.param for piece in engine.optimizer.pieces]
    tensors = [*model.parameters(), *pieces, *moments, *(u.whole for u in owner.units)]
    tensors += [u.gradient for u in owner.trainable if u.gradient is not None]
    view = owner.units[0].values()[3:7]
    copies = [tensor.detach().clone() for tensor in tensors]
    kept = view.clone()
    classes, versions = list(map(type, tensors)), [t._version for t in tensors]
    engine.offload_states()
    engine.reload_states()
    assert list(map(type, tensors)) == classes
    assert [t._version for t in tensors] == versions
    assert all(map(torch.equal, copies, tensors))
    assert torch.equal(view, kept)
    now = [v for s in engine.optimizer.optimizer.state.values() for v in s.values()]
    assert all(a is b for a, b in zip(moments, now, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_whatever_needs_what_is_parked_says_what_to_do(dtype: torch.dtype | None) -> None:
    model, owner, engine = build(dtype)
    micro(engine, 0)
    micro(engine, 1)
    micro(engine, 2)
    x = torch.zeros(4, 32, dtype=dtype)
    loss = engine(x).float().sum()
    engine.offload_states()
    [first, *_] = engine.optimizer.optimizer.state.values()
    piece, unit = engine.optimizer.pieces[0].param, owner.trainable[0]
    calls = {
        "forward": lambda: model(x),
        "part": lambda: model[0](x),
        "engine's backward": lambda: engine.backward(loss),
        "step": engine.step,
        "optimizer": engine.optimizer.optimizer.step,
        "state_dict": model.state_dict,
        "load_state_dict": lambda: model.load_state_dict({}),
        "checkpoint": owner.state_dict,
        "of the optimizer": engine.optimizer.state_dict,
        "loading": lambda: owner.load_targets({}),
        "loading the optimizer": lambda: engine.optimizer.load_targets({}),
        "moment": lambda: first["exp_avg"].sum(),
        "moments": lambda: torch._foreach_norm([first["exp_avg"]]),
        "a part of a moment": lambda: first["exp_avg"][0],
        "writing": lambda: first["exp_avg"].zero_(),
        "data": lambda: setattr(first["exp_avg"], "data", torch.zeros(1)),
        "address": lambda: first["exp_avg"].data_ptr(),
        "numpy": lambda: first["exp_avg"].numpy(),
        "master": lambda: piece.detach(),
        "parameter": lambda: model[0].weight + 1,
        "values": lambda: unit.values().clone(),
        "gradient": lambda: owner.reducer.live()[0].norm(),
    }
    for name, call in calls.items():
        with pytest.raises(ParkedStateError, match=r"reload_states\(\)"):
            pytest.fail(f"{name} gave {call()}")
    assert "parked" in repr(first["exp_avg"])
    assert first["exp_avg"].shape == piece.shape
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # torch's own, as for any write: the graph has no way to ask
    engine.reload_states()
    engine.backward(engine(x).float().sum())
    engine.step()


def test_a_graph_lives_through_parking() -> None:
    _, _, plain = build()
    _, _, parked = build()
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    losses = [engine(x).square().mean() for engine in (plain, parked)]
    parked.offload_states()
    parked.reload_states()
    for engine, loss in zip((plain, parked), losses, strict=True):
        engine.backward(loss)
        engine.step()
        micro(engine, 3)
    assert all(map(torch.equal, state(plain), state(parked)))


def test_masters_and_moments_away_still_generate() -> None:
    model, owner, engine = build(torch.bfloat16)
    micro(engine, 0)
    micro(engine, 1)
    x = torch.ones(4, 32, dtype=torch.bfloat16)
    before = model(x)
    numel = sum(unit.layout.numel for unit in owner.trainable)
    state_bytes = sum(
        v.nbytes for s in engine.optimizer.optimizer.state.values() for v in s.values() if v.dim()
    )
    assert engine.offload_states("masters", "moments") == 4 * numel + state_bytes
    assert torch.equal(model(x), before)
    with pytest.raises(ParkedStateError, match=r"a step needs masters \(host\), moments \(host\)"):
        engine.optimizer.step()
    engine.reload_states("masters")
    with pytest.raises(ParkedStateError, match=r"a step needs moments \(host\), which"):
        engine.optimizer.step()
    engine.reload_states()
    micro(engine, 2)
    micro(engine, 3)


def test_fp32_parameters_are_their_masters_and_go_with_params() -> None:
    model, owner, engine = build()
    assert engine.offload_states("masters") == 0
    model(torch.ones(4, 32))
    with pytest.raises(ParkedStateError, match="a step needs masters"):
        engine.optimizer.step()
    assert engine.offload_states("params") == sum(unit.whole.nbytes for unit in owner.units)
    engine.reload_states()


def test_a_backward_does_not_add_to_a_gradient_that_is_away() -> None:
    _, _, engine = build()
    micro(engine, 0)
    loss = engine(torch.ones(4, 32)).sum()
    engine.offload_states("grads")
    with pytest.raises(ParkedStateError, match="a backward needs grads"):
        loss.backward()
    engine.zero_grad()  # drops those that are parked too
    engine.reload_states()
    assert engine.optimizer.gradients() == []
    micro(engine, 0)
    micro(engine, 1)


def test_parking_again_and_reloading_what_is_not_there(tmp_path: Path) -> None:
    _, _, engine = build(torch.bfloat16)
    assert engine.reload_states() == 0
    with pytest.raises(ValueError, match="grads are not parked; parked: nothing"):
        engine.reload_states("grads")
    left = engine.offload_states("masters")
    assert left > 0
    assert engine.offload_states("masters") == 0
    with pytest.raises(ValueError, match="masters are parked at 'host'"):
        engine.offload_states("masters", to=f"nvme:{tmp_path}")
    with pytest.raises(ValueError, match="moments are not parked; parked: masters"):
        engine.reload_states("masters", "moments")
    assert engine.reload_states("masters") == left
    with pytest.raises(ValueError, match="no state 'weights'; allowed: params, grads"):
        engine.offload_states("weights")
    with pytest.raises(ValueError, match=r"to='disk'; allowed: \"host\", \"nvme:<folder>\""):
        engine.offload_states(to="disk")


def test_not_in_the_middle_of_a_pass() -> None:
    model, _, engine = build()
    said: list[str] = []

    def attempt(*_: Any) -> None:
        for call in (engine.offload_states, engine.reload_states):
            with pytest.raises(RuntimeError, match="in the middle of a forward or backward") as found:
                call()
            said.append(str(found.value))

    handle = model[1].register_forward_hook(attempt)
    out = model(torch.ones(4, 32, requires_grad=True))
    handle.remove()
    out.register_hook(attempt)
    engine.backward(out.sum())
    assert len(said) == 4
    engine.step()


def test_a_full_disk_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, owner, engine = build(torch.bfloat16)
    _, _, plain = build(torch.bfloat16)
    micro(engine, 0)
    micro(plain, 0)
    real, calls = Volume.allocate, []

    def allocate(volume: Volume, nbytes: int) -> Any:
        calls.append(nbytes)
        if len(calls) == 4:
            raise OSError(28, "No space left on device", volume.path)
        return real(volume, nbytes)

    before = held(owner)
    with monkeypatch.context() as patch:
        patch.setattr(Volume, "allocate", allocate)
        with pytest.raises(OSError, match="No space left"):
            engine.offload_states(to=f"nvme:{tmp_path}")
    assert held(owner) == before
    micro(engine, 1)
    micro(plain, 1)
    assert all(map(torch.equal, state(plain), state(engine)))


def test_a_file_that_cannot_be_read_leaves_everything_parked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, owner, engine = build(torch.bfloat16)
    micro(engine, 0)
    there = state(engine)
    engine.offload_states(to=f"nvme:{tmp_path}")
    real, calls = Home.read, []

    def read(home: Home, begin: int, out: Tensor) -> Any:
        calls.append(begin)
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        return real(home, begin, out)

    with monkeypatch.context() as patch:
        patch.setattr(Home, "read", read)
        with pytest.raises(OSError, match="Input/output"):
            engine.reload_states()
    with pytest.raises(ParkedStateError):
        owner.state_dict()
    assert held(owner) == 0
    engine.reload_states()
    assert all(map(torch.equal, there, state(engine)))


def test_a_volume_of_ones_own_is_left_open(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    _, _, engine = build()
    micro(engine, 0)
    left = engine.offload_states(to=volume)
    assert volume.used >= left
    engine.reload_states()
    assert volume.used == 0
    volume.allocate(10)
    volume.close()


def test_functions_for_plain_loops(tmp_path: Path) -> None:
    model, owner, engine = build(torch.bfloat16)
    micro(engine, 0)
    optimizer = engine.optimizer.optimizer
    there = state(engine)
    left = park(optimizer, "moments", "masters", to=f"nvme:{tmp_path}")
    more = park(model, "params") + park(owner, "grads") + park(engine, *KINDS[:2])
    assert unpark(model) == left + more
    assert all(map(torch.equal, there, state(engine)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_beside_a_store_only_what_is_on_the_device_moves(dtype: torch.dtype | None, tmp_path: Path) -> None:
    settings = {"nvme": str(tmp_path), "masters": "nvme", "moments": "0.5 host / 0.5 nvme", "grads": "host"}
    _, _, plain = build(dtype)
    _, owner, engine = build(dtype, **settings)
    for seed in range(4):
        micro(plain, seed)
        micro(engine, seed)
        on_device = [unit.whole for unit in owner.units]
        on_device += [t for t in owner.reducer.live() if t.untyped_storage().resizable()]  # not reduced yet
        wanted = sum(tensor.nbytes for tensor in on_device)
        assert engine.offload_states(to="nvme") == wanted
        with pytest.raises(ParkedStateError):
            engine.step()
        engine.reload_states()
    assert all(map(torch.equal, state(plain), state(engine)))
    with pytest.raises(ValueError, match="where the model's store has a folder"):
        build(dtype)[2].offload_states(to="nvme")
