"""Tensors that are still in files: what is done to them is noted, and any range can be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ds_zero.load_files import Stored, open_directory
from ds_zero.load_tensor import FileTensor

Op = Callable[[Tensor, Tensor], Tensor]
OPS: dict[str, Op] = {
    "cut": lambda a, b: a[1:, 2:5],
    "row": lambda a, b: a[2],
    "column": lambda a, b: a[:, -1],
    "joined": lambda a, b: torch.cat([a, b], dim=1),
    "stacked and joined": lambda a, b: torch.cat([torch.stack([a, a]), torch.stack([b, b])], dim=1),
    "chunk": lambda a, b: torch.chunk(a, 3, dim=1)[2].contiguous(),
    "unbound": lambda a, b: torch.stack(a.unbind(1), 1)[:, 3],
    "turned": lambda a, b: a.t().contiguous()[1:5],
    "fused and turned": lambda a, b: torch.cat([a, b]).view(2, 4, 6).transpose(1, 2).reshape(2, 24)[1],
    "rope": lambda a, b: a.view(2, 1, 2, 6).transpose(1, 2).reshape(4, 6),
    "shapes": lambda a, b: a.unsqueeze(1).squeeze().reshape(3, -1)[..., 1:],
    "cast": lambda a, b: a.to(torch.bfloat16)[1:3],
    "permuted": lambda a, b: a.view(2, 2, 6).permute(2, 0, 1).flatten(1)[2:],
}


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, Tensor]:
    found = {"a": torch.randn(4, 6), "b": torch.randn(4, 6)}
    save_file(found, tmp_path / "model.safetensors")
    return found


@pytest.mark.parametrize("name", list(OPS))
def test_any_range_of_any_combination(tmp_path: Path, tensors: dict[str, Tensor], name: str) -> None:
    lazy = {key: FileTensor(stored) for key, stored in open_directory(tmp_path).items()}
    wanted, noted = OPS[name](**tensors), OPS[name](**lazy)
    assert isinstance(noted, FileTensor)
    assert (noted.shape, noted.dtype) == (wanted.shape, wanted.dtype)
    flat = wanted.reshape(-1)
    for start in range(flat.numel()):
        for end in (start + 1, start + 3, flat.numel()):
            out = torch.empty(min(end, flat.numel()) - start)
            noted.source.read(start, out)
            assert torch.equal(out.to(wanted.dtype), flat[start:end])


def test_what_is_not_noted_is_read_and_writes_are_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    a = FileTensor(open_directory(tmp_path)["a"])
    assert torch.equal(a + 1, tensors["a"] + 1)
    assert torch.equal(torch.cat([a, tensors["b"]])[3:5] * 1, torch.cat([tensors["a"], tensors["b"]])[3:5])
    assert torch.equal(a, tensors["a"])
    assert not torch.equal(a, tensors["b"])
    with pytest.raises(RuntimeError, match=r"mul_.* would write to a tensor that is still in its file"):
        a.mul_(2)


def test_only_what_is_wanted_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.arange(1000.0)}, tmp_path / "model.safetensors")
    read: list[int] = []
    inner = Stored.read

    def counting(self: Stored, start: int, out: Tensor) -> None:
        read.append(out.numel())
        inner(self, start, out)

    monkeypatch.setattr(Stored, "read", counting)
    noted = FileTensor(open_directory(tmp_path)["w"]).view(10, 100).t().reshape(4, 250)
    out = torch.empty(30)
    noted.source.read(250, out)
    assert sum(read) == 30
    assert torch.equal(out, torch.arange(1000.0).view(10, 100).t().reshape(-1)[250:280])
