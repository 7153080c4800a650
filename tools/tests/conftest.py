"""Makes the tools importable by their names, and small repositories to plant faults in."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))

SETTINGS = """
[tool.ds.layers]
ds_core = []
ds_zero = ["ds_core"]
[tool.ds.folders]
ds_core = ["ground", ["state", "protocols"], "train"]
[tool.ds.distributions]
yaml = "pyyaml"
[tool.ds.sizes]
file = 30
file_warn = 20
function = 6
methods = 2
init_args = 3
"""

PROJECT = """
[project]
name = "{name}"
dependencies = {dependencies}
[project.optional-dependencies]
plots = ["matplotlib>=3"]
"""


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """`tree(**files)` writes a two-package repository without faults, then `files` (path: text) over it."""

    def write(files: dict[str, str]) -> Path:
        base = {"pyproject.toml": SETTINGS, "LICENSE": "free\n"}
        for name, needs in (("ds-core", '["numpy>=1"]'), ("ds-zero", '["ds-core>=0.1,<0.2"]')):
            package = name.replace("-", "_")
            base |= {
                f"packages/{name}/pyproject.toml": PROJECT.format(name=name, dependencies=needs),
                f"packages/{name}/CHANGELOG.md": "# Changelog\n\n## 0.1.0\n",
                f"packages/{name}/LICENSE": "free\n",
                f"packages/{name}/src/{package}/__init__.py": '"""A room."""\n\n__version__ = "0.1.0"\n',
            }
        for path, text in (base | files).items():
            target = tmp_path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        return tmp_path

    return write
