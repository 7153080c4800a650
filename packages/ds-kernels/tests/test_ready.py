"""The functions people call get the fast implementation by themselves, at their first call."""

from __future__ import annotations

import subprocess
import sys

import pytest

PACK = "p = d.pack_linear(torch.randn(8, 64), 8)"
CALLS = {
    "activation": "d.swiglu(torch.randn(2, 8), torch.randn(2, 8))",
    "bits": "d.pack_signs_(torch.randn(64))",
    "cross_entropy": "d.cross_entropy(torch.randn(2, 8), torch.tensor([1, 2]))",
    "linear": f"{PACK}; d.quant_linear(torch.randn(2, 64), p)",
    "muon": "d.newton_schulz(torch.randn(4, 8))",
    "norm": "d.rms_norm(torch.randn(2, 8), torch.ones(8))",
    "optim": "t = [torch.ones(8) for _ in range(4)]; "
    "d.optim_step_(d.StepLists([t[0]], [t[1]], [[t[2]], [t[3]]], [1]), d.AdamHyper(lr=0.1))",
    "quant": "d.quantize_blocks(torch.randn(64))",
    "rope": "d.rotary(torch.randn(2, 4, 1, 8), *d.rotary_tables(4, 8))",
    "softmax": "d.softmax(torch.randn(2, 8))",
}


def test_every_family_has_a_call() -> None:
    from ds_kernels.registry import FAMILIES

    assert CALLS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", CALLS)
def test_first_call_loads(family: str) -> None:
    code = f"import torch, ds_kernels as d\n{CALLS[family]}\nfrom ds_kernels.registry import registry\n"
    code += f"rows = registry().chosen[{family!r}, 'cpu']\n"
    code += "print({row.implementation for row in rows} <= {'native', 'torch'})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
