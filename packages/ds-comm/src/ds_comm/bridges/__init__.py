"""Codecs for plain PyTorch: its DistributedDataParallel and its FSDP2, with nothing else of the suite."""
