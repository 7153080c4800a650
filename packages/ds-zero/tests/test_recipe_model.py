"""The recipe's transformer: causal, tied where asked, the sizes it claims, sampling."""

import math

import pytest
import torch

from ds_zero.recipes.model import (
    GPT,
    IGNORE,
    SIZES,
    GPTConfig,
    count_parameters,
    gpt_config,
    rotary_table,
    rotate,
    sample,
)

TINY = GPTConfig(vocab=37, dim=16, layers=2, heads=2, hidden=24, seq=8)


def tiny(**changes: object) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**{f: getattr(TINY, f) for f in TINY.__slots__}, **changes}))


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model = tiny()
    ids = torch.randint(37, (1, 8))
    changed = ids.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 37
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[0, :5], after[0, :5])
    assert not torch.allclose(before[0, 5], after[0, 5])


def test_untrained_model_knows_nothing() -> None:
    ids = torch.randint(37, (4, 9))
    loss = tiny()(ids[:, :-1], ids[:, 1:])
    assert abs(loss.item() - math.log(37)) < 0.05


def test_sum_and_mean_agree_and_ignored_targets_cost_nothing() -> None:
    model = tiny()
    ids = torch.randint(37, (2, 9))
    targets = ids[:, 1:].clone()
    targets[1] = IGNORE
    mean, total = model(ids[:, :-1], targets), model(ids[:, :-1], targets, reduction="sum")
    torch.testing.assert_close(mean * 8, total)
    assert float(model(ids[:, :-1], torch.full_like(targets, IGNORE), reduction="sum").detach()) == 0.0


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    table = rotary_table(6, TINY, torch.zeros(1))
    q, k = torch.randn(8), torch.randn(8)
    turned_q, turned_k = rotate(q.expand(1, 1, 6, 8), table)[0, 0], rotate(k.expand(1, 1, 6, 8), table)[0, 0]
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(6))
    torch.testing.assert_close(turned_q[1] @ turned_k[3], turned_q[3] @ turned_k[5])


@pytest.mark.parametrize("tied", [True, False])
def test_head_is_tied_where_asked(tied: bool) -> None:
    model = tiny(tied=tied)
    assert (model.head.weight is model.embed.weight) is tied
    expected = 37 * 16 * (1 if tied else 2) + 2 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 16
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(("size", "millions"), [("2m", 2), ("10m", 10), ("30m", 30), ("125m", 125)])
def test_sizes_are_what_their_names_say(size: str, millions: int) -> None:
    assert count_parameters(gpt_config(size, 4096)) / 1e6 == pytest.approx(millions, rel=0.05)


def test_unknown_size_names_the_sizes() -> None:
    with pytest.raises(ValueError, match=r"no model size '11m'; sizes: 100k, 2m, 10m"):
        gpt_config("11m", 4096)
    assert all(dim % heads == 0 for dim, _, heads, _ in SIZES.values())


def test_activation_checkpointing_changes_no_gradient() -> None:
    ids = torch.randint(37, (2, 9))
    grads = []
    for again in (False, True):
        model = tiny(checkpoint_activations=again)
        model(ids[:, :-1], ids[:, 1:]).backward()
        grads.append([p.grad for p in model.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_meta_model_takes_no_memory_and_becomes_the_same_model() -> None:
    with torch.device("meta"):
        model = GPT(TINY)
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.buffers())


def test_samples_repeat_with_the_seed_and_keep_the_mode() -> None:
    model = tiny()
    first = sample(model, [1, 2, 3], 12, context=8, seed=1)
    assert first == sample(model, [1, 2, 3], 12, context=8, seed=1)
    assert first != sample(model, [1, 2, 3], 12, context=8, seed=2)
    assert len(first) == 12
    assert all(0 <= token < 37 for token in first)
    assert model.training
