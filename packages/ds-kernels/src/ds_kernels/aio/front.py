"""AsyncIO: tensors to and from files, as futures."""

from __future__ import annotations

import concurrent.futures
import ctypes
import errno
import logging
import os
import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ds_kernels.aio.choice import EngineName, forced, make_engine
from ds_kernels.aio.fallback import ALIGN
from ds_kernels.aio.file import AioError, AioFile, Mode
from ds_kernels.aio.job import AioFuture, Closed, Engine, Job, Op, Settings

Path = str | os.PathLike[str]
_MODES: dict[str, Mode] = {"read": "r", "write": "w", "sync": "r"}
_log = logging.getLogger("ds_kernels")


class AsyncIO:
    """Reads and writes of whole contiguous CPU tensors, many at a time, past the page cache where it can be.

    `queue_depth` blocks of at most `block_size` bytes are with the system at once, shared by `threads`
    threads; a request waits to be accepted while `max_pending_bytes` are. Requests under way may be done in
    any order; leave their tensors alone until they are. What the caller did wrong is raised at once, what the
    system says comes through the future, and from `wait_all` if nobody asked it.
    Leaving the `with` block waits for all; after an exception, only for what had begun.
    Raises: ValueError; KernelUnavailable if `engine` or DS_AIO names one that cannot be had.
    """

    def __init__(
        self,
        *,
        queue_depth: int = 64,
        block_size: int = 1 << 20,
        threads: int | None = None,
        engine: EngineName | None = None,
        direct: bool = True,
        max_pending_bytes: int | None = None,
    ) -> None:
        _check("queue_depth", queue_depth, 1, 4096)
        _check("block_size", block_size, ALIGN, 1 << 30)
        if block_size % ALIGN:
            raise ValueError(f"block_size={block_size}: allowed are multiples of {ALIGN}")
        if threads is not None:
            _check("threads", threads, 1, min(queue_depth, 256))
        if max_pending_bytes is not None:
            _check("max_pending_bytes", max_pending_bytes, 1, 1 << 62)
        settings = Settings(queue_depth, block_size, threads, max_pending_bytes or 1 << 62)
        self.direct = direct
        self._engine, self.why = make_engine(forced(engine), settings)
        self._pid, self._closed = os.getpid(), False
        self._told: set[int] = set()  # devices that do not take O_DIRECT
        # Also at exit, before Python tears its threads down.
        self._end = weakref.finalize(self, _end, self._engine, self._pid)

    @property
    def engine(self) -> str:
        """io_uring, libaio, threads or python."""
        return self._engine.name

    def read(self, file: Path | AioFile, tensor: Tensor, offset: int = 0) -> AioFuture:
        """Fill the tensor with the file's bytes from `offset`; a file that ends too early is an AioError.

        Autograd does not see it: no version counter moves.
        Raises: ValueError for tensors that bytes cannot be read into.
        """
        _check_tensor(tensor, "read into")
        if tensor.nbytes and not _writable(tensor):
            raise ValueError("tensor: its memory is read-only; read into a clone() of it")
        return self._submit("read", file, tensor, offset)

    def write(
        self, file: Path | AioFile, tensor: Tensor, offset: int = 0, *, durable: bool = False
    ) -> AioFuture:
        """Put the tensor's bytes into the file at `offset`; a path is created, and never shortened.

        With `durable`, done means on the device (fdatasync); of a new file, `sync` the folder as well.
        """
        _check_tensor(tensor, "write")
        return self._submit("write", file, tensor, offset, durable=durable)

    def sync(self, file: Path | AioFile) -> AioFuture:
        """fsync a file or a folder: what was done before is then on the device."""
        return self._submit("sync", file, None)

    def wait_all(self, timeout: float | None = None) -> None:
        """Wait for everything submitted so far.

        Raises: TimeoutError; the first failure since the last call whose future nobody has asked.
        """
        self._check_process()
        late = concurrent.futures.wait(self._engine.table.futures(), timeout).not_done
        if late:
            raise TimeoutError(f"{len(late)} requests are not done after {timeout} s")
        failures = self._engine.table.unseen()
        if failures:
            if len(failures) > 1:
                failures[0].add_note(f"and {len(failures) - 1} more requests failed")
            raise failures[0]

    def close(self, *, cancel: bool = False) -> None:
        """Wait for what is under way and let go of everything; again is harmless.

        With `cancel`, requests that have not begun are cancelled, and those that have end with ECANCELED when
        the blocks handed to the system are done.
        """
        if os.getpid() != self._pid:
            return
        self._closed = True
        if cancel:
            for future in self._engine.table.futures():
                future.cancel()
        self._engine.stop(drop=cancel)
        self._engine.join()

    def __enter__(self) -> AsyncIO:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait_all()
        finally:
            self.close(cancel=kind is not None)

    def _submit(
        self, op: Op, file: Path | AioFile, tensor: Tensor | None, offset: int = 0, durable: bool = False
    ) -> AioFuture:
        self._check_process()
        wanted = tensor.nbytes if tensor is not None else 0
        _check("offset", offset, 0, (1 << 63) - 1 - wanted)
        try:
            if self._closed:
                raise Closed
            job = Job(op, self._open(file, op), tensor, offset, durable)
            self._engine.submit(job)
        except Closed:
            said, path = "this AsyncIO is closed", str(file.path if isinstance(file, AioFile) else file)
            raise AioError(errno.EBADF, said, path=path, offset=offset, wanted=wanted, got=0) from None
        except OSError as error:
            future, said = AioFuture(), error.strerror or str(error)
            code, path = error.errno or errno.EIO, str(file.path if isinstance(file, AioFile) else file)
            failed = AioError(code, said, path=path, offset=offset, wanted=wanted, got=0)
            self._engine.table.tell(future, failed)
            return future
        return job.future

    def _open(self, file: Path | AioFile, op: Op) -> AioFile:
        """The file, with a lease for the request."""
        if isinstance(file, AioFile):
            if op != "sync" and _MODES[op] not in file.mode:
                raise ValueError(f"{file.path}: opened with mode {file.mode!r}, which cannot {op}")
            file.acquire()
            return file
        opened = AioFile(file, _MODES[op], direct=self.direct)
        if op == "read" and opened.folder:
            opened.close()
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if self.direct and opened.regular and not opened.direct and opened.device not in self._told:
            self._told.add(opened.device)
            _log.warning("aio: %s goes through the page cache: %s", opened.path, opened.why)
        return opened

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"this AsyncIO belongs to process {self._pid}, from which this one was forked: make one here"
            )


def _end(engine: Engine, pid: int) -> None:
    if os.getpid() == pid:
        engine.stop(drop=False)
        engine.join()


def _check(name: str, value: int, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name}={value!r}: allowed are whole numbers from {least} to {most}")


def _check_tensor(tensor: Tensor, what: str) -> None:
    """Is it nothing but bytes in a row in this process's memory?"""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise ValueError(
            f"cannot {what} a {type(tensor).__name__}; allowed are plain tensors (of a DTensor: .to_local())"
        )
    if tensor.device.type != "cpu":
        raise ValueError(f"tensor: cannot {what} memory of {tensor.device}; go through a CPU tensor")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"tensor: cannot {what} layout {tensor.layout}; {what} its parts, or a dense one")
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        raise ValueError(
            f"tensor: cannot {what} a non-contiguous view (shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride()}); use tensor.contiguous() and copy back what was read"
        )


class _Span(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@cache
def _copier() -> Any:
    """process_vm_readv, or None."""
    return getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)


def _writable(tensor: Tensor) -> bool:
    """May the first and the last byte be written? Files mapped read-only may not, and torch does not know.

    The kernel copies each byte onto itself, and answers EFAULT where a store here would end the process.
    """
    copy, first = _copier(), tensor.data_ptr()
    for address in {first, first + tensor.nbytes - 1} if copy else ():
        span = ctypes.byref(_Span(address, 1))
        one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
        if copy(os.getpid(), span, one, span, one, none) < 0 and ctypes.get_errno() == errno.EFAULT:
            return False
    return True
