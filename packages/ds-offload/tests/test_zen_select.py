"""Columns of cut parameters: taken, put, added up, chosen and packed, for every way to cut."""

from __future__ import annotations

import pytest
import torch

from ds_offload.zen_select import Judge, Part, add_energies, choose, columns_of, pack, unpack


@pytest.mark.parametrize("columns", [1, 5, 8])
def test_a_part_is_the_mask_of_its_columns_for_every_range(columns: int) -> None:
    rows = 4
    whole = torch.arange(float(rows * columns))
    chosen = torch.tensor([c for c in range(columns) if c % 2 == 0])
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[:, chosen] = True
    for begin in range(rows * columns):
        for end in range(begin + 1, rows * columns + 1):
            part = Part(begin, end - begin, columns, chosen)
            flat = whole[begin:end].clone()
            taken = part.take(flat)
            inside = mask.view(-1)[begin:end]
            assert part.count == len(taken) == int(inside.sum())
            assert sorted(taken.tolist()) == flat[inside].tolist()
            part.put(flat, -taken - 1)
            assert torch.equal(flat, torch.where(inside, -whole[begin:end] - 1, whole[begin:end]))


def test_no_columns_are_all_elements() -> None:
    part = Part(3, 4, 0, None)
    flat = torch.arange(4.0)
    taken = part.take(flat)
    assert torch.equal(taken, flat)
    assert taken.data_ptr() != flat.data_ptr()
    part.put(flat, taken + 1)
    assert flat.tolist() == [1, 2, 3, 4]


def test_energies_of_ranges_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    grad = torch.randn(7, 5)
    wanted = grad.double().square().sum(0)
    for cut in range(1, 35):
        found = torch.zeros(5, dtype=torch.float64)
        add_energies(found, grad.view(-1)[:cut], 0)
        add_energies(found, grad.view(-1)[cut:], cut)
        torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)


def test_the_choice_is_the_largest_and_of_equals_the_first() -> None:
    assert choose(torch.tensor([1.0, 9, 3, 9]), 0.5).tolist() == [1, 3]  # type: ignore[union-attr]
    assert choose(torch.tensor([2.0, 2, 2]), 0.4).tolist() == [0]  # type: ignore[union-attr]
    assert choose(torch.tensor([0.0, 1]), 0.001).tolist() == [1]  # type: ignore[union-attr]
    assert choose(torch.zeros(3), 0.5) is None


def test_packing_is_undone() -> None:
    for columns in (1, 7, 8, 9, 100):
        chosen = torch.randperm(columns)[: columns // 2 + 1].sort().values
        assert torch.equal(unpack(pack(chosen, columns)), chosen)
    assert [columns_of(shape) for shape in ((4, 3, 2), (4,), ())] == [6, 0, 0]


def test_a_selection_is_renewed_when_it_lost_half_of_its_worth() -> None:
    judge = Judge(auto_ratio=0.99, topk_ratio=0.1)
    for inside, lost in ((0.9, False), (0.6, False), (0.5, False), (0.49, True)):  # worth 0.8: half is 0.4
        judge.of("w").add(inside, 1 - inside, 1, 9)
        assert judge.close() is lost
    assert Judge(0.99, 0.1).close() is False  # no gradients, no verdict
