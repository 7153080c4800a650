"""Runnable jobs that ship inside the package: `python -m ds_zero.recipes.train_gpt`."""
