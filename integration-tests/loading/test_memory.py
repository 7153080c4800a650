"""Host memory while files are loaded in shards: at most 1.2 times their bytes, for any number of ranks."""

from __future__ import annotations

import gc
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_core.ground.accelerator import Accelerator, return_freed_memory
from ds_core.testing.distributed import run_ranks
from ds_zero import Zero, from_pretrained, full_tensor, load_pretrained, materialize

transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to load")

RANKS_IMPORT = ("transformers.modeling_utils",)
BOUND = 1.2
DENSE: dict[str, Any] = {
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
EXPERTS = DENSE | {
    "intermediate_size": 512,
    "num_hidden_layers": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
KINDS = {"dense": ("LlamaForCausalLM", DENSE), "experts": ("MixtralForCausalLM", EXPERTS)}


def anonymous() -> int:
    """Bytes of this process that no file is behind; the page cache is not in it."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    assert found is not None
    return int(found[1]) * 1024


class Peak(threading.Thread):
    """The most anonymous memory above what there was, looked at every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        gc.collect()
        return_freed_memory(Accelerator.current())  # or what was freed before would count for us
        self.before = anonymous()
        self.bytes = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.001):
            self.bytes = max(self.bytes, anonymous() - self.before)

    def end(self) -> int:
        self.ended.set()
        self.join()
        return max(self.bytes, anonymous() - self.before)


def write(kind: str, directory: Path, **other: Any) -> None:
    name, options = KINDS[kind]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model_class(model_class.config_class(**options | other)).save_pretrained(directory, max_shard_size="60MB")


def load(directory: str, warm_up: str, by: str) -> list[int]:
    """The peak of this rank, and what is left of it afterwards."""
    for path in (warm_up, directory):  # the first brings the modules that are imported on the way
        peak = Peak()
        peak.start()
        if by == "from_pretrained":
            model = from_pretrained(transformers.AutoModelForCausalLM, path)
            owner = Zero(stage=3).shard(model)
        else:
            config = transformers.AutoConfig.from_pretrained(path)
            with materialize():
                model = transformers.AutoModelForCausalLM.from_config(config)
            load_pretrained(model, path)
            owner = Zero(stage=3).shard(model)
        found = [peak.end(), sum(unit.values().nbytes for unit in owner.units)]
        assert full_tensor(model.model.norm.weight).sum() == model.config.hidden_size
    return found


@pytest.mark.parametrize(
    ("kind", "by", "ranks"),
    [
        ("dense", "from_pretrained", 1),
        ("dense", "from_pretrained", 2),
        ("dense", "from_pretrained", 4),
        ("dense", "load_pretrained", 4),
        ("experts", "from_pretrained", 4),
    ],
)
def test_all_ranks_together_hold_little_more_than_the_file(
    tmp_path: Path, kind: str, by: str, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write(kind, tmp_path / "tiny", hidden_size=64, num_hidden_layers=1)
    write(kind, tmp_path / "big")
    size = sum(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors"))
    found = run_ranks(
        load, ranks, timeout=120.0, directory=str(tmp_path / "big"), warm_up=str(tmp_path / "tiny"), by=by
    )
    peak, held = (sum(rank[column] for rank in found) for column in (0, 1))
    with capsys.disabled():
        print(
            f"\n{kind}, {by}, {ranks} ranks: files {size / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB = "
            f"{peak / size:.3f} x, shards {held / 1e6:.0f} MB"
        )
    assert peak <= BOUND * size
