"""Build hook: with DS_KERNELS_AOT=1 (or =optim,...) the wheel carries compiled libraries; needs no torch."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeHook(BuildHookInterface):
    """Compiles the asked families and turns the wheel into one for this platform."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """What the build environment needs besides hatchling."""
        return ["ninja>=1.11"] if _wanted() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile and add the libraries to the wheel; nothing for an sdist, an editable or a pure wheel."""
        if self.target_name != "wheel" or version == "editable" or not _wanted():
            return
        driver = _driver(Path(self.root))
        families = driver.families() if _wanted() == ["1"] else _wanted()
        self._folder = tempfile.TemporaryDirectory()
        for family in families:
            library = driver.build(family, Path(self._folder.name))
            for made in (library, library.with_name(library.name + ".key")):
                build_data["force_include"][str(made)] = f"ds_kernels/prebuilt/{made.name}"
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled, now that the wheel holds it."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()


def _wanted() -> list[str]:
    return [
        name.strip()
        for name in os.environ.get("DS_KERNELS_AOT", "").split(",")
        if name.strip() not in ("", "0")
    ]


def _driver(root: Path) -> ModuleType:
    """The package's own build driver, loaded by path: the package is not installed here, nor is torch."""
    spec = importlib.util.spec_from_file_location(
        "_ds_kernels_build", root / "src" / "ds_kernels" / "build.py"
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"no build driver in {root}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
