"""The device this process drives: a thin face on `torch.accelerator`, passed in and never looked up."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

_KEPT_BYTES = 256 << 20  # freed host memory that stays with the process, and the largest block that may
_FREED_BYTES = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h

_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl", "hpu": "hccl", "npu": "hccl"}


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One device. On CPU everything that concerns streams is a no-op."""

    device: torch.device

    @classmethod
    def current(cls) -> Accelerator:
        """This rank's device: LOCAL_RANK picks the accelerator; `DS_ACCELERATOR=cpu` forces the CPU."""
        wanted = os.environ.get("DS_ACCELERATOR")
        if wanted == "cpu" or (wanted is None and not torch.accelerator.is_available()):
            return cls(torch.device("cpu"))
        kind = wanted or str(torch.accelerator.current_accelerator())
        module = torch.get_device_module(kind)
        if not module.is_available():
            raise ValueError(f"DS_ACCELERATOR={wanted!r}: torch sees no such device; unset it or use cpu")
        index = int(os.environ.get("LOCAL_RANK", "0")) % max(1, module.device_count())
        return cls(torch.device(kind, index))

    @property
    def comm_backend(self) -> str:
        """The torch.distributed backend for this kind of device: "nccl", "gloo", "xccl"."""
        return _BACKENDS.get(self.device.type, "gloo")

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    def activate(self) -> None:
        """Make this the current device of its kind."""
        if not self.is_cpu:
            torch.get_device_module(self.device).set_device(self.device)

    def synchronize(self) -> None:
        if not self.is_cpu:
            torch.accelerator.synchronize(self.device)

    def pinned(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Host memory from which copies to the device are asynchronous (plain memory on CPU)."""
        return torch.empty(numel, dtype=dtype, pin_memory=not self.is_cpu)

    def total_bytes(self) -> int:
        """Memory of the device; on CPU, of the host."""
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def free_bytes(self) -> int:
        """Memory that can still be had on the device; on CPU, what the kernel calls available."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        try:
            with open("/proc/meminfo") as lines:
                for line in lines:
                    if line.startswith("MemAvailable:"):
                        return int(line.split()[1]) * 1024
        except OSError:
            return self.total_bytes()
        return self.total_bytes()


def keep_freed_memory(accelerator: Accelerator) -> bool:
    """Let this process keep up to 256 MiB of freed host memory instead of handing it back at once.

    Buckets and gradients come and go many times in a step; by default glibc returns them to the kernel,
    which then clears every page again: a tenth of a step's CPU time for a 30M model. On CPU with glibc only,
    and not when MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ says otherwise. True when it took effect.
    """
    return _set_thresholds(accelerator, _KEPT_BYTES)


def free_at_once(accelerator: Accelerator) -> bool:
    """Let freed host memory of a MiB and more go back to the kernel at once: for whoever keeps weights
    elsewhere. By default glibc learns to keep it, in holes that add up. Conditions as above.
    """
    return _set_thresholds(accelerator, _FREED_BYTES)


def _set_thresholds(accelerator: Accelerator, num_bytes: int) -> bool:
    chosen = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys()
    if sys.platform != "linux" or not accelerator.is_cpu or chosen:
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # An older glibc refuses so large a threshold; then its own, which adapts, is better than half of this.
    if not libc.mallopt(_M_MMAP_THRESHOLD, num_bytes):
        return False
    return bool(libc.mallopt(_M_TRIM_THRESHOLD, num_bytes))


def return_freed_memory(accelerator: Accelerator) -> None:
    """Hand freed host memory back to the kernel now, holes between what is in use included (glibc, on CPU).

    Filling a model unit by unit leaves a hole for each, which kept memory would add up to a second model.
    """
    if sys.platform == "linux" and accelerator.is_cpu:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
