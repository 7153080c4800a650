"""`ds report --bundle`: one zip for a bug report, with what helps and without anybody's secrets."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

# The only variables whose values go into a bundle; of all others not even the name does.
KEPT = frozenset(
    (
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_PORT"),
        *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD"),
        *("MALLOC_MMAP_THRESHOLD_", "PYTHONHASHSEED", "PYTHONUNBUFFERED", "PYTHONFAULTHANDLER", "LANG"),
        *("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_HOME"),
        *("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "CUBLAS_WORKSPACE_CONFIG"),
        *("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_IB_HCA"),
        *("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_ALGO", "NCCL_PROTO", "NCCL_NVLS_ENABLE"),
        *("GLOO_SOCKET_IFNAME", "TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
        *("TORCH_NCCL_AVOID_RECORD_STREAMS", "TORCH_DISTRIBUTED_DEBUG", "TORCH_LOGS", "TORCHDYNAMO_DISABLE"),
        *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NVML_BASED_CUDA_CHECK"),
        *("DS_ACCELERATOR", "DS_DEBUG", "DS_LOG_DIR", "DS_KERNELS", "DS_KERNELS_CACHE", "DS_KERNELS_ISA"),
        *("SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_TASKS_PER_NODE", "SLURM_PROCID", "SLURM_NODEID"),
    )
)

_REMOVED = "(removed)"
_SECRET_WORD = r"secret|passw|passphrase|api_?key|access_?key|private_?key|credential|authorization"
_SECRET_NAME = re.compile(rf"{_SECRET_WORD}|token$|(^|_)(key|auth|pwd)$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(rf"{_SECRET_WORD}|token|key|auth|pwd", re.IGNORECASE)
_LEAST_SECRET = 6  # shorter values are words that may stand anywhere
_PATTERNS = (  # what is replaced, and by what
    (re.compile(r"(?<=://)[^/\s:@\"']*:[^/\s@\"']+(?=@)"), _REMOVED),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/._~=-]{8,}"), rf"\1 {_REMOVED}"),
    (
        re.compile(
            rf"(?i)(?<![\w.-])([\w.-]*(?:(?:{_SECRET_WORD})[\w.-]*|token)[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;&)}}]+)"
        ),
        rf"\1{_REMOVED}",
    ),
    (re.compile(r"\b(hf_|gh[opsu]_|github_pat_|glpat-|sk-|xox[abps]-|AKIA)[A-Za-z0-9_-]{8,}"), _REMOVED),
    (
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S),
        _REMOVED,
    ),
)
_TAIL_BYTES = 1 << 20

_README = """What `ds report --bundle` collected for a bug report. Look through it before you send it.

report.txt, report.json   versions, devices, host, and what other packages add
environment.json          variables that change how training runs; no others are read into this file
packages.txt              installed Python packages and their versions
config/...                the configuration file, if one was given
logs/...                  the last lines of the log files that were given

Removed everywhere: values of environment variables whose names sound like secrets, values that follow such
names in files, passwords inside addresses, keys of well-known services. The home directory is written as ~.
"""


def write_bundle(
    path: Path,
    report: Mapping[str, Any],
    rendered: str,
    *,
    config: Path | None = None,
    logs: Sequence[Path] = (),
    lines: int = 200,
    environ: Mapping[str, str] | None = None,
) -> list[str]:
    """Write the zip and return the names of what is in it. `report`: of `doctor.collect`, `rendered` as text.

    Raises FileExistsError rather than replace a file, OSError for a config or log that cannot be read;
    nothing is written then.
    """
    env = os.environ if environ is None else environ
    if path.exists():
        raise FileExistsError(f"{path} exists already and is not replaced; choose another name, or remove it")
    clean = Cleaner(env)
    contents = {
        "README.txt": _README,
        "report.txt": clean(rendered),
        "report.json": clean.json(report),
        "environment.json": clean.json({name: env[name] for name in sorted(KEPT & env.keys())}),
        "packages.txt": _packages(),
    }
    if config is not None:
        contents[f"config/{config.name}"] = clean.config(config.read_text("utf-8", errors="replace"))
    for number, log in enumerate(logs):
        contents[f"logs/{number}-{log.name}"] = clean(read_tail(log, lines))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in contents.items():
            archive.writestr(name, text)
    with path.open("xb") as file:
        file.write(made.getvalue())
    return list(contents)


class Cleaner:
    """Takes secrets out of text: those that the environment holds, and what looks like one."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        secret = {
            value for name, value in environ.items() if _SECRET_VARIABLE.search(name) and name not in KEPT
        }
        found = sorted((v for v in secret if len(v) >= _LEAST_SECRET), key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, found))) if found else None
        home = environ.get("HOME", "").rstrip("/")
        self._home = re.compile(re.escape(home) + r"(?=/|\b)") if len(home) > 1 else None

    def __call__(self, text: str) -> str:
        """The text with every secret replaced."""
        if self._values is not None:
            text = self._values.sub(_REMOVED, text)
        for pattern, instead in _PATTERNS:
            text = pattern.sub(instead, text)
        return self._home.sub("~", text) if self._home is not None else text

    def json(self, value: Any) -> str:
        """A JSON value as text, cleaned leaf by leaf so that it stays JSON."""
        return json.dumps(self._clean(value), indent=2, default=str) + "\n"

    def config(self, text: str) -> str:
        """A configuration file: by its structure if it is JSON, else as text."""
        try:
            return self.json(json.loads(text))
        except ValueError:
            return self(text)

    def _clean(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                self(str(name)): _REMOVED if _SECRET_NAME.search(str(name)) and item else self._clean(item)
                for name, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._clean(item) for item in value]
        return self(value) if isinstance(value, str) else value


def read_tail(path: Path, lines: int) -> str:
    """The last lines of a file, of its last MiB at most."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    return "".join(text.splitlines(keepends=True)[-lines:])


def _packages() -> str:
    """Names and versions only: where a package was installed from may hold a password."""
    found = {(d.metadata["Name"] or "?", d.version) for d in distributions()}
    return "".join(f"{name}=={version}\n" for name, version in sorted(found, key=lambda p: p[0].lower()))
