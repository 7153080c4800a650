"""One training step: optimizers over shards, clipping, loss scaling, schedules, the engine."""
