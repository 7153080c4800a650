"""Profiles of sharded models say what they say of plain ones."""

from __future__ import annotations

from ds_core import profile_model
from ds_core.testing.distributed import distributed
from ds_core.testing.models import CASES
from ds_zero import Zero


@distributed(world_size=2)
def test_flops_of_a_sharded_model_are_those_of_the_plain_one(rank: int) -> None:
    for case in ("mlp", "tied", "twice", "frozen", "checkpoint_reentrant", "checkpoint_non_reentrant"):
        batch = CASES[case].rank_batch(0, rank, 2)
        x = batch["tokens"][:, :-1] if "tokens" in batch else batch["x"]
        plain = profile_model(CASES[case].build(), x)
        for stage in (1, 2, 3):
            model = CASES[case].build()
            config = Zero(stage=stage, bucket_numel=64, persist_numel=0)  # type: ignore[arg-type]
            owner = config.shard(model)
            for _ in range(2):  # in the second pass units are fetched ahead in the order of the first
                report = profile_model(model, x)
                for mine, other in zip(report.modules, plain.modules, strict=True):
                    assert (mine.params, mine.runs) == (other.params, other.runs)
                    for phase in ("forward", "backward", "recompute"):
                        a, b = getattr(mine, phase), getattr(other, phase)
                        where = (case, stage, mine.name, phase)
                        assert (a.flops, a.elementwise) == (b.flops, b.elementwise), where
            del owner
