"""Newton-Schulz against its polynomial in fp64 and torch's own; Muon against torch's, heads, checkpoints."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_kernels.muon import Muon
from ds_kernels.ops.muon import COEFFICIENTS, METHODS, newton_schulz


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def polynomial(x: Tensor, steps: int = 5) -> Tensor:
    """The same on singular values, one by one, in fp64."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag_embed(s) @ v


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(64, 64), (40, 200), (200, 40), (3, 140, 300)])
def test_singular_values_follow_the_polynomial(method: Any, shape: tuple[int, ...]) -> None:
    """fp64 to 1e-9. fp32 rounds by 6e-8 a few times a step; what is small grows 3.4445^5 = 485 fold: 1e-3."""
    x = matrix(*shape)
    wanted = polynomial(x)
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        found = newton_schulz(x.double(), method=method, dtype=dtype)
        assert (found - wanted).norm() <= bound * wanted.norm()
    values = torch.linalg.svdvals(newton_schulz(x, method=method).float())
    assert values.max() < 1.25


@pytest.mark.parametrize("method", METHODS)
def test_bf16_is_as_near_as_torchs_own(method: Any) -> None:
    x = matrix(96, 384)
    wanted = polynomial(x)
    theirs = torch.optim._muon._zeropower_via_newtonschulz(x, COEFFICIENTS, 5, 1e-7)
    off = (theirs.double() - wanted).norm() / wanted.norm()
    mine = newton_schulz(x, method=method)
    # The Gram method rounds twice as many matrices.
    assert (mine.double() - wanted).norm() / wanted.norm() <= (2.5 if method == "gram" else 1.2) * off


def test_zeros_stay_zeros_and_bad_calls_are_refused() -> None:
    assert torch.equal(newton_schulz(torch.zeros(3, 4)), torch.zeros(3, 4))
    for words, x, more in (
        ("x is shape \\(3,\\)", torch.zeros(3), {}),
        ("method='svd'", torch.zeros(3, 3), {"method": "svd"}),
        ("steps=-1", torch.zeros(3, 3), {"steps": -1}),
        ("dtype=torch.int32", torch.zeros(3, 3), {"dtype": torch.int32}),
    ):
        with pytest.raises(ValueError, match=f"newton_schulz: {words}"):
            newton_schulz(x, **more)


def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    one = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(3)), nn.Linear(24, 72, bias=False))
    return one, copy.deepcopy(one)


def fill(module: nn.Module, seed: int) -> None:
    for i, p in enumerate(module.parameters()):
        p.grad = matrix(*p.shape, seed=100 * seed + i)


@pytest.mark.parametrize("settings", [{}, {"adjust_lr_fn": "match_rms_adamw"}, {"nesterov": False}])
def test_ten_steps_are_near_torchs(settings: dict[str, Any]) -> None:
    """Each step moves by lr times a bf16 matrix that is 1 % from the polynomial in both: 2 % of the way."""
    mine, theirs = models()
    start = [p.detach().clone() for p in mine.parameters()]
    one, two = Muon(mine.parameters(), **settings), torch.optim.Muon(theirs.parameters(), **settings)
    for step in range(10):
        for module, optimizer in ((mine, one), (theirs, two)):
            fill(module, step)
            optimizer.step()
        if step == 5:  # states go both ways
            states = copy.deepcopy((one.state_dict(), two.state_dict()))
            one.load_state_dict(states[1])
            two.load_state_dict(states[0])
    for a, b, p in zip(mine.parameters(), theirs.parameters(), start, strict=True):
        assert (a - b).norm() <= 0.02 * (b - p).norm()


def test_heads_are_orthogonalised_one_by_one() -> None:
    whole, parts = nn.Parameter(matrix(24, 16)), [nn.Parameter(part) for part in matrix(24, 16).chunk(3)]
    one, many = Muon([{"params": [whole], "heads": 3}], ns_method="gram"), Muon(parts, ns_method="gram")
    whole.grad = matrix(24, 16, seed=1)
    for p, g in zip(parts, whole.grad.chunk(3), strict=True):
        p.grad = g.clone()
    one.step()
    many.step()
    assert torch.equal(whole, torch.cat([*parts]))
    with pytest.raises(ValueError, match=r"\(24, 16\) is not 5 heads"):
        Muon([whole], heads=5)
    with pytest.raises(ValueError, match="ns_method='svd'"):
        Muon([whole], ns_method="svd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2D"):
        Muon([nn.Parameter(torch.zeros(3))])
