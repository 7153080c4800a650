"""Runnable jobs that ship inside the package: `python -m ds_offload.recipes.bigger_than_memory`."""
