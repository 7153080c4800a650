"""Asynchronous reads and writes of files for NVMe: futures, O_DIRECT, several engines, one behaviour."""

from ds_kernels.aio.choice import EngineRow, describe
from ds_kernels.aio.file import AioError, AioFile
from ds_kernels.aio.front import AsyncIO
from ds_kernels.aio.job import AioFuture
from ds_kernels.aio.pool import AlignedPool

__all__ = ["AioError", "AioFile", "AioFuture", "AlignedPool", "AsyncIO", "EngineRow", "describe"]
