"""The ZeRO paper's table, and what an estimate says when things do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_core.setup.estimate import Count, DoesNotFit, Recipe, check_fits, estimate, estimate_all
from ds_core.state.store import Shares
from ds_core.train.memory import gigabytes


@pytest.mark.parametrize(("stage", "gb"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_papers_example(stage: int, gb: float) -> None:
    # Rajbhandari et al. 2020, figure 1: 7.5B parameters, 64 ranks, Adam with K = 12, 2-byte gradients
    made = estimate(7.5e9, ranks=64, stage=stage)  # type: ignore[arg-type]
    assert round(made.states / 1e9, 1) == gb
    assert made.working == 0


def test_formulas_by_hand() -> None:
    n, ranks = 1_000, 4
    mixed = estimate_all(n, ranks=ranks)
    assert [one.states for one in mixed] == [16 * n, 4 * n + 12 * n / 4, 2 * n + 14 * n / 4, 16 * n / 4]
    fp32 = estimate_all(n, ranks=ranks, recipe=Recipe("float32"))  # no second copy of the weights
    assert [one.states for one in fp32] == [16 * n, 8 * n + 8 * n / 4, 4 * n + 12 * n / 4, 16 * n / 4]
    summed = estimate(n, ranks=ranks, stage=2, recipe=Recipe("bfloat16", "float32", states=1))
    assert (summed.params, summed.grads, summed.optimizer) == (2 * n, 4 * n / 4, 8 * n / 4)


def test_working_bytes_are_those_of_one_unit() -> None:
    assert estimate(100, ranks=4, stage=3, largest_unit=10).working == 10 * (2 * 2 + 2)
    assert estimate(100, ranks=4, stage=2, largest_unit=10).working == 10 * 2
    assert estimate(100, ranks=1, stage=3, largest_unit=10).working == 0


def test_modules_count_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 1000, bias=False))
    model[1].weight = model[0].weight  # tied: once
    model[0].bias.requires_grad_(False)
    assert Count.of(model) == Count(1_000_000, 1_000)
    made = estimate(model, ranks=1, stage=0)
    assert (made.params, made.grads, made.optimizer) == (2 * 1_001_000, 2 * 1_000_000, 12 * 1_000_000)


def test_what_fits_passes() -> None:
    assert check_fits(7.5e9, ranks=64, stage=3, available=2e9).stage == 3


def test_what_does_not_fit_says_what_would() -> None:
    with pytest.raises(DoesNotFit) as caught:
        check_fits(7.5e9, ranks=64, stage=1, available=20e9)
    text = str(caught.value)
    assert text.startswith(
        "7,500,000,000 parameters in bfloat16 at stage 1 on 64 ranks need 31.4 GB per rank without"
        " activations, there are 20.0 GB"
    )
    assert "    1     15.0 GB     15.0 GB      1.4 GB         0 B     31.4 GB   does not fit" in text
    assert text.endswith("change: stage 2 fits")
    with pytest.raises(DoesNotFit, match="change: stage 3 fits from 12 ranks"):
        check_fits(7.5e9, ranks=2, stage=3, available=10e9)
    with pytest.raises(DoesNotFit, match="change: smaller units; one of 1,000 elements"):
        check_fits(10_000, ranks=4, stage=3, available=100, largest_unit=1000)


def test_what_is_on_disk_takes_no_memory() -> None:
    """By hand: 1000 elements in bf16 with fp32 gradients and Adam, parts of it on disk."""
    recipe = Recipe("bfloat16", "float32")
    shares = Shares(params=1.0, grads=0.25, masters=0.0, moments=0.5, buffers=77)
    found = estimate(1000, ranks=2, stage=3, recipe=recipe, largest_unit=10, shares=shares)
    assert (found.params, found.grads, found.optimizer) == (0, 1500, 500 * (4 + 4))
    assert found.working == 77 + 10 * (2 * 2 + 4)
    whole = estimate(1000, ranks=2, stage=2, recipe=recipe, shares=shares)
    assert whole.params == 2000  # below stage 3 parameters stay
    fp32 = estimate(1000, ranks=1, stage=3, recipe=Recipe("float32"), shares=Shares(masters=1.0))
    assert fp32.params == 0  # an fp32 shard is its own master


def test_a_disk_is_named_where_it_would_help() -> None:
    with pytest.raises(DoesNotFit, match="or on a disk, with ds-offload: stage 3") as caught:
        check_fits(1.3e9, ranks=1, stage=3, available=6e9)
    assert "500.0 MB stay in memory, 20.8 GB per rank are on disk" in str(caught.value)
    shares = Shares(1, 1, 1, 1, 400_000_000)
    assert check_fits(1.3e9, ranks=1, stage=3, available=6e9, shares=shares).total == 400_000_000
    with pytest.raises(DoesNotFit) as caught:  # it is there already, or would not help
        check_fits(1.3e9, ranks=1, stage=3, available=1e8, shares=shares)
    assert "or on a disk" not in str(caught.value)


def test_bad_arguments() -> None:
    for options, message in (
        ({"ranks": 0, "stage": 1}, "ranks is 0"),
        ({"ranks": 1, "stage": 4}, "stage is 4; allowed: 0, 1, 2, 3"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate(10, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whole number"):
        estimate(0.5, ranks=1, stage=0)
    with pytest.raises(ValueError, match=r"dtype 'int8'; allowed: float32"):
        Recipe("int8")
    with pytest.raises(ValueError, match="states is -1"):
        Recipe(states=-1)
    assert [gigabytes(size) for size in (5, 5e3, 5e6, 5e9)] == ["5 B", "5.0 kB", "5.0 MB", "5.0 GB"]
