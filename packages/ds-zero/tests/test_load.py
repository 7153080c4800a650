"""Weights of a directory: into meta, sharded and ordinary models; what does not fit is said beforehand."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ds_core.ground.mesh import Topology
from ds_core.state.checkpoint_index import DamagedCheckpoint
from ds_core.testing.distributed import distributed, run_ranks
from ds_zero import Zero, full_tensor, load_pretrained, materialize, shard
from ds_zero.load_files import open_directory
from ds_zero.load_sources import read_whole


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.embed.weight


def stored(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """What the file holds: the tied weight once, under its first name."""
    generator = torch.Generator().manual_seed(seed)
    state = Tied().state_dict()
    del state["head.weight"]
    return {
        name: torch.randn(tensor.shape, generator=generator).to(dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in state.items()
    }


def write(directory: Path, tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    return directory


def build(on: str) -> Tied:
    if on == "materialize":
        with materialize():
            return Tied()
    if on == "meta":
        with torch.device("meta"):
            return Tied()
    return Tied()


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("on", ["materialize", "meta", "real"])
@distributed(2)
def test_every_part_is_where_it_belongs(tmp_path: Path, rank: int, stage: int, on: str) -> None:
    """The two ranks have different files, so a value shows who read it: its owner, and nobody else."""
    directory = write(tmp_path / str(rank), {k: v + rank for k, v in stored().items()})
    model = build(on)
    if on == "real":
        Zero(stage=stage, bucket_numel=50).shard(model)
    load_pretrained(model, directory)
    if on != "real":
        Zero(stage=stage, bucket_numel=50).shard(model)
    assert model.head.weight is model.embed.weight
    off = set()
    for name, wanted in stored().items():
        if name.startswith("norm.") and name not in ("norm.weight", "norm.bias"):
            continue
        found = full_tensor(model.get_parameter(name))
        from_first = torch.isclose(found, wanted)
        assert (from_first | torch.isclose(found, wanted + 1)).all()
        off |= set(from_first.view(-1).tolist())
    assert off == {True, False}  # each rank read some of it


@pytest.mark.parametrize("stage", [1, 3])
@distributed(2)
def test_a_part_that_is_added_later_is_loaded_too(tmp_path: Path, stage: int) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    shard(model, optimizer, stage=stage)
    torch.manual_seed(torch.distributed.get_rank())
    with materialize():
        head, other = nn.Linear(6, 3), nn.Linear(3, 3)
        nn.init.constant_(other.weight, 0.5)
    wanted = {"weight": torch.arange(18.0).view(3, 6), "bias": torch.ones(3)}
    load_pretrained(head, write(tmp_path / "weights", wanted))
    model.append(head).append(other)
    optimizer.add_param_group({"params": [*head.parameters(), *other.parameters()]})
    model(torch.ones(2, 4)).sum().backward()
    for name, tensor in wanted.items():
        assert torch.equal(full_tensor(model[2].get_parameter(name)), tensor)
    assert torch.equal(full_tensor(model[3].weight), torch.full((3, 3), 0.5))
    optimizer.step()
    assert not torch.equal(full_tensor(model[2].bias), wanted["bias"])


@pytest.mark.parametrize("secondary_shard", [False, True])
@distributed(4)
def test_shards_inside_nodes(tmp_path: Path, secondary_shard: bool) -> None:
    mesh = Topology(dp_replicate=2, dp_shard=2).build()
    directory, other = write(tmp_path / "weights", stored()), write(tmp_path / "other", stored(seed=1))
    model = build("materialize")
    load_pretrained(model, directory)
    Zero(stage=3, bucket_numel=50, secondary_shard=secondary_shard).shard(model, mesh)
    for seed in (0, 1):
        if seed:
            load_pretrained(model, other)
        wanted = stored(seed=seed)
        for name, param in model.named_parameters():
            assert torch.equal(full_tensor(param), wanted[name]), name
            assert torch.equal(full_tensor(param), wanted[name]), (
                name
            )  # from the second shard, if there is one


@distributed(1)
def test_stage_0_wants_a_model_with_bytes() -> None:
    model = build("materialize")
    with pytest.raises(
        ValueError, match=r"embed\.weight is on the meta device, and stage=0 keeps everything"
    ):
        shard(model, torch.optim.SGD(model.parameters(), 0.1), stage=0)


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("late", [False, True])
@distributed(2)
def test_masters_have_the_file_s_precision(tmp_path: Path, file_dtype: torch.dtype, late: bool) -> None:
    wanted = stored(file_dtype)
    directory = write(tmp_path / "weights", wanted)
    model = build("materialize")
    if not late:
        load_pretrained(model, directory)
    shard(model, torch.optim.SGD(model.parameters(), 0.1), stage=3, dtype=torch.bfloat16)
    if late:
        load_pretrained(model, directory)
    for name, param in model.named_parameters():
        assert torch.equal(full_tensor(param, master=True), wanted[name].float()), name
        assert torch.equal(full_tensor(param), wanted[name].bfloat16()), name
    assert torch.equal(model.norm.running_mean, wanted["norm.running_mean"].float())


@pytest.mark.parametrize("on", ["materialize", "meta"])
@distributed(2)
def test_missing_and_unexpected_names_are_listed(tmp_path: Path, on: str) -> None:
    tensors = stored()
    bias = tensors.pop("blocks.1.bias")
    directory = write(tmp_path / "weights", tensors | {"old.gain": bias})
    model = build(on)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = load_pretrained(model, directory)
    texts = " ".join(str(warning.message) for warning in said)
    assert "lacks 1 tensors of the model" in texts
    assert "blocks.1.bias" in texts
    assert "has 1 tensors that are not in the model: old.gain" in texts
    assert (loaded.missing, loaded.unexpected) == (("blocks.1.bias",), ("old.gain",))
    Zero(stage=3).shard(model)  # the missing one is initialised by its module, as rank 0 does
    found = full_tensor(model.blocks[1].bias)
    assert 0 < float(found.abs().max()) <= 6**-0.5
    assert torch.equal(full_tensor(model.blocks[1].weight), tensors["blocks.1.weight"])


@distributed(1)
def test_values_that_were_forgotten_are_not_made_up(tmp_path: Path) -> None:
    """What adapters do: made with values, then moved to the device of the layer that they are put beside."""
    model = build("materialize")
    load_pretrained(model, write(tmp_path / "weights", stored()))
    model.adapter = nn.Linear(6, 6)
    nn.init.zeros_(model.adapter.weight)
    model.adapter.to(model.embed.weight.device)
    with pytest.raises(
        ValueError, match=r"'weight' of module adapter \(Linear\) was put on the meta .*forgot"
    ):
        Zero(stage=3).shard(model)


@distributed(2)
def test_nothing_changes_when_shapes_differ(tmp_path: Path) -> None:
    tensors = stored()
    tensors["embed.weight"] = torch.zeros(21, 6)
    tensors["blocks.2.bias"] = torch.zeros(7)
    directory = write(tmp_path / "weights", tensors)
    model = build("real")
    Zero(stage=3).shard(model)
    before = {name: full_tensor(param) for name, param in model.named_parameters()}
    with pytest.raises(ValueError, match=r"2 tensors .*blocks\.2\.bias is \[7\].*embed\.weight is \[21, 6\]"):
        load_pretrained(model, directory)
    with pytest.raises(LookupError, match=r"no tensor of .* has a name of the model: it holds strange"):
        load_pretrained(model, write(tmp_path / "other", {"strange": torch.ones(2)}))
    assert all(torch.equal(full_tensor(param), before[name]) for name, param in model.named_parameters())


def test_damaged_files_are_named_with_what_was_wanted_and_found(tmp_path: Path) -> None:
    directory = write(tmp_path / "weights", stored())
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    sizes = rf"its header wants {len(whole)} bytes, the file has {len(whole) - 100}"
    with pytest.raises(DamagedCheckpoint, match=rf"model\.safetensors is damaged: {sizes}"):
        load_pretrained(Tied(), directory)
    path.write_bytes(whole[:30])
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors is not a whole safetensors file"):
        load_pretrained(Tied(), directory)
    path.write_bytes(whole.replace(b'"shape":[20,6]', b'"shape":[21,6]'))
    with pytest.raises(
        DamagedCheckpoint, match=r"embed\.weight F32 \[21, 6\] wants 504 bytes, its place has 480"
    ):
        load_pretrained(Tied(), directory)
    path.write_bytes(whole)
    tensors = open_directory(directory)
    path.write_bytes(whole[:-100])  # after it was checked
    with pytest.raises(DamagedCheckpoint, match=r"cut short while it was read: wanted \d+ bytes, found"):
        [read_whole(tensor) for tensor in tensors.values()]


def test_directories_that_are_not_whole(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a directory"):
        open_directory(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor .*it holds nothing"):
        open_directory(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    with pytest.raises(DamagedCheckpoint, match=r"two\.safetensors is missing"):
        open_directory(tmp_path)
    save_file({"c": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(DamagedCheckpoint, match=r"says b is in two\.safetensors, and it is not"):
        open_directory(tmp_path)
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    assert {name: tensor.shape for name, tensor in open_directory(tmp_path).items()} == {"a": (2,), "b": (3,)}
    index.write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    with pytest.raises(DamagedCheckpoint, match=r"names '\.\./one\.safetensors', which is no file beside it"):
        open_directory(tmp_path)


def values(directory: str, stage: int) -> list[float]:
    """A model with a part that the file lacks, from different seeds on every rank."""
    torch.manual_seed(100 + stage)
    model = build("materialize")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_pretrained(model, directory)
    Zero(stage=stage).shard(model)
    return [float(x) for param in model.parameters() for x in full_tensor(param).view(-1)]


def test_ranks_agree_on_what_the_file_lacks(tmp_path: Path) -> None:
    tensors = stored()
    del tensors["blocks.0.weight"]
    write(tmp_path / "weights", tensors)
    for stage in (1, 3):
        alone = run_ranks(values, 1, directory=str(tmp_path / "weights"), stage=stage)[0]
        assert all(
            found == alone for found in run_ranks(values, 3, directory=str(tmp_path / "weights"), stage=stage)
        )
