"""Shares of state per tier: read, printed, refused; which units stay; how much of a tensor is on disk."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from ds_core.setup.estimate import Count, Recipe, estimate
from ds_core.state.store import Shares
from ds_offload.policy import PAGE_NUMEL, Rounding, Split, Tiered, file_numel
from ds_offload.store import TieredStore
from ds_offload.zenflow import ZenFlow


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("device", Split(device=1.0)),
        ("host", Split(host=1.0)),
        (" nvme ", Split(nvme=1.0)),
        ("0.3 device / 0.5 host / 0.2 nvme", Split(0.3, 0.5, 0.2)),
        ("0.5 nvme/0.5 host", Split(host=0.5, nvme=0.5)),
        (".25 device / .75 nvme", Split(device=0.25, nvme=0.75)),
        ("1 host", Split(host=1.0)),
    ],
)
def test_a_split_is_read_and_printed(text: str, split: Split) -> None:
    assert Split.parse(text) == split
    assert Split.parse(str(split)) == split
    assert split.away == pytest.approx(split.host + split.nvme)


def test_every_split_in_tenths_survives_its_text() -> None:
    for device, host in itertools.product(range(11), repeat=2):
        if device + host <= 10:
            split = Split(device / 10, host / 10, (10 - device - host) / 10)
            assert Split.parse(str(split)) == split


@pytest.mark.parametrize(
    "text",
    ["", "disk", "0.5 disk / 0.5 host", "host / host", "0.5 host / 0.5 host", "-1 host / 2 nvme", "nan host",
     "0.5host / 0.5 nvme", "0.5 host 0.5 nvme", "0.5 host / ", "1e0 host", "host nvme"],
)  # fmt: skip
def test_what_is_no_split_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no split: give a tier \(device, host, nvme\)"):
        Split.parse(text)


@pytest.mark.parametrize(
    ("text", "total"), [("0.5 host", "0.5"), ("0.7 host / 0.7 nvme", "1.4"), ("host / nvme", "2")]
)
def test_shares_sum_to_one(text: str, total: str) -> None:
    with pytest.raises(ValueError, match=rf"the shares sum to {total}; they must sum to 1"):
        Split.parse(text)


@pytest.mark.parametrize("numel", [0, 1, 100, PAGE_NUMEL, PAGE_NUMEL + 1, 10 * PAGE_NUMEL + 7, 1_000_003])
def test_the_part_in_memory_is_whole_pages_and_the_nearest_to_the_share(numel: int) -> None:
    assert file_numel(numel, Split(device=1.0)) == 0
    assert file_numel(numel, Split(host=1.0)) == 0
    assert file_numel(numel, Split(nvme=1.0)) == numel
    for tenth in range(1, 10):
        on_disk = file_numel(numel, Split(host=1 - tenth / 10, nvme=tenth / 10))
        in_memory = numel - on_disk
        assert 0 <= on_disk <= numel
        assert in_memory % PAGE_NUMEL == 0 or in_memory == numel
        assert abs(in_memory - (1 - tenth / 10) * numel) <= PAGE_NUMEL / 2


def test_a_share_is_of_what_left_the_device() -> None:
    numel = 100 * PAGE_NUMEL
    assert file_numel(numel, Split(device=0.5, host=0.25, nvme=0.25)) == numel // 2


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_rounding_never_errs_by_more_than_half_the_largest_unit(share: float, seed: int) -> None:
    rng, rounding, largest = random.Random(seed), Rounding(share), 0
    for _ in range(200):
        numel = rng.choice([1, 10, rng.randint(1, 10_000)])
        largest = max(largest, numel)
        before = rounding.stayed
        assert rounding.stays(numel) == (rounding.stayed > before)
        assert abs(rounding.stayed - share * rounding.seen) <= largest / 2 + 1e-6
    if share in (0.0, 1.0):
        assert rounding.stayed == share * rounding.seen


def test_a_policy_keeps_shares_as_text() -> None:
    policy = Tiered(nvme="/x", masters="0.30 device/0.70 nvme", moments="0.3 device / 0.7 host")
    assert policy.masters == "0.3 device / 0.7 nvme"
    assert policy.splits()["moments"] == Split(device=0.3, host=0.7)
    assert policy.splits()["params"] == Split(device=1.0)
    assert Tiered(**policy.model_dump()) == policy


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"masters": "nvme"}, "masters are to live on nvme, and no folder is given: set nvme=<folder>"),
        ({"grads": "nvme", "params": "nvme"}, "params, grads are to live on nvme"),
        ({"masters": "device"}, "leave different shares on the device"),
        ({"masters": "0.5 device / 0.5 host", "moments": "0.4 device / 0.6 host"}, "the same device share"),
        (
            {"grads": "host", "masters": "device", "moments": "device"},
            "updated there, which needs them there",
        ),
        ({"moments": "ram"}, "is no split"),
        ({"chunk_numel": 100}, "chunk_numel"),
        ({"depth": 0}, "depth"),
        ({"depth": 17}, "depth"),
        ({"tier": "nvme"}, "tier"),
        ({"update": "delayed", "zenflow": ZenFlow()}, 'update = "delayed" with zenflow'),
        ({"update": "speculative", "zenflow": ZenFlow()}, 'set update="step", or leave zenflow out'),
        ({"update": "sooner"}, "update"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Tiered(**settings)  # type: ignore[arg-type]


def test_the_estimate_knows_what_an_update_holds_beside() -> None:
    """A delayed update has masters and gradients twice, speculation its buffers; both only on a CPU."""
    tiers = {"masters": "host", "grads": "0.5 device / 0.5 host", "moments": "host"}
    plain, late, early = (
        TieredStore(**tiers, update=update, speculate_bytes=1 << 20)
        for update in ("step", "delayed", "speculative")
    )
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert plain.shares(cpu) == Shares(buffers=plain.shares(cpu).buffers)
    assert late.shares(cpu) == Shares(0, -0.5, -1, 0, 0)
    assert early.shares(cpu) == Shares(0, 0, 0, 0, 1 << 20)
    assert late.shares(gpu) == plain.shares(gpu) == early.shares(gpu)
    recipe = Recipe("bfloat16", "float32")
    one, two = (
        estimate(Count(1000), ranks=1, stage=3, recipe=recipe, shares=store.shares(cpu))
        for store in (plain, late)
    )
    assert two.states - one.states == 1000 * (4 + 0.5 * 4)
