"""Units of a variance's root: exact both ways, near it, nothing where there is none."""

from __future__ import annotations

import torch

from ds_comm.preconditioner import Exponents


def test_units_are_near_the_root_and_multiply_back_exactly() -> None:
    variance = torch.logspace(-30, 20, 64) * torch.rand(64).add(0.5)
    units = Exponents.gather([(slice(0, 64), variance)], 64, None, "all")
    roots = units.divide_(variance.sqrt())
    assert float(roots.min()) >= 0.7
    assert float(roots.max()) < 2.0
    value = torch.randn(64) * variance.sqrt()
    assert torch.equal(units.multiply_(units.divide_(value.clone())), value)
    assert not torch.equal(units.divide_(value.clone()), value)


def test_a_part_is_that_of_the_whole() -> None:
    variance = torch.logspace(-8, 2, 32)
    units = Exponents.gather([(slice(0, 16), variance[:16]), (slice(16, 32), variance[16:])], 40, None, "all")
    value = torch.randn(40)
    whole = units.divide_(value.clone())
    assert torch.equal(units.divide_(value[10:30].clone(), 10), whole[10:30])
    assert not whole[32:].any()  # padding


def test_without_a_variance_both_ways_give_zero() -> None:
    units = Exponents.gather([(slice(0, 4), torch.tensor([0.0, 1.0, 0.0, 4.0]))], 4, None, "all")
    assert units.divide_(torch.ones(4)).tolist() == [0.0, 1.0, 0.0, 0.5]
    assert units.multiply_(torch.ones(4)).tolist() == [0.0, 1.0, 0.0, 2.0]


def test_a_gradient_that_comes_back_does_not_set_the_size_of_its_block() -> None:
    """Elements whose variance was taken when they had next to no gradients: a seldom token's embedding."""
    units = Exponents.gather([(slice(0, 4), torch.tensor([1.0, 1.0, 1e-12, 1.0]))], 4, None, "all")
    sent = units.shrink_(torch.tensor([0.5, -3.0, 1e-2, float("inf")]))
    assert sent[:3].tolist() == [0.5, -3.0, 8.0]
    assert torch.isnan(sent[3])  # and is noticed as before
