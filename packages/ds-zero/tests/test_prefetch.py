"""The order hint predicts, never insists."""

from __future__ import annotations

from ds_zero.prefetch import OrderHint


def test_first_pass_follows_the_definition_order() -> None:
    hint = OrderHint([10, 10, 10, 10], budget=20)
    hint.begin()
    assert hint.use(0) == [1, 2]
    assert hint.use(1) == [2, 3]
    assert hint.use(3) == []


def test_later_passes_follow_the_last_one() -> None:
    hint = OrderHint([10] * 3, budget=1)
    hint.begin()
    for unit in (2, 0, 1):
        hint.use(unit)
    hint.begin()
    assert hint.tail == frozenset()
    assert hint.use(2) == [0]
    assert hint.use(0) == [1]
    assert hint.before(1) == [0]
    assert hint.before(2) == []


def test_a_surprise_predicts_nothing_and_recovers() -> None:
    hint = OrderHint([10] * 4, budget=10)
    hint.begin()
    assert hint.use(3) == []
    assert hint.use(0) == []
    hint.begin()
    assert hint.use(3) == [0]


def test_a_unit_used_twice_is_followed_by_both_successors() -> None:
    hint = OrderHint([10] * 3, budget=10)
    hint.begin()
    for unit in (0, 1, 0, 2):
        hint.use(unit)
    hint.begin()
    assert [hint.use(unit) for unit in (0, 1, 0, 2)] == [[1], [0], [2], []]


def test_one_large_unit_is_fetched_although_it_exceeds_the_budget() -> None:
    hint = OrderHint([1, 100, 1], budget=10)
    hint.begin()
    assert hint.use(0) == [1]


def test_a_unit_with_neighbouring_users_stays_between_them() -> None:
    hint = OrderHint([10, 10], budget=10, order=[0, 0, 1])
    hint.begin()
    assert hint.use(0) == [1]
    assert hint.stays(0)
    assert hint.use(0) == [1]
    assert not hint.stays(0)
    assert hint.use(1) == []
    assert not hint.stays(1)


def test_no_budget_no_prefetch() -> None:
    hint = OrderHint([1, 1], budget=0)
    hint.begin()
    assert hint.use(0) == []
    assert hint.before(1) == []


def test_the_end_of_a_pass_is_kept_for_its_backward() -> None:
    sizes = [10, 10, 10, 50]
    assert OrderHint(sizes, budget=10, keep=1).tail == {3}  # the last one always, whatever its size
    assert OrderHint(sizes, budget=10, keep=70).tail == {3, 2, 1}
    assert OrderHint(sizes, budget=10, keep=0).tail == frozenset()
    hint = OrderHint(sizes, budget=10, keep=20)
    for _ in range(2):
        hint.begin()
        for unit in (3, 0, 1, 2):
            hint.use(unit)
    assert hint.tail == {2, 1}
