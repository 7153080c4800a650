"""Who owns which bytes: layouts, shards, stores, owners, checkpoints."""
