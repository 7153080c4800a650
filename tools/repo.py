"""What every tool needs to know: where the repository is, its settings, packages and source files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Module:
    """One Python source file of a package, by its dotted name."""

    name: str
    path: Path
    package: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(), filename=str(self.path))

    @property
    def is_init(self) -> bool:
        return self.path.name == "__init__.py"


@dataclass(frozen=True)
class Repo:
    """A checkout; tests make small ones of their own."""

    root: Path = ROOT

    def toml(self, path: str) -> dict[str, Any]:
        return tomllib.loads((self.root / path).read_text())

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The [tool.ds] table of the root pyproject.toml."""
        settings: dict[str, Any] = self.toml("pyproject.toml")["tool"]["ds"]
        return settings

    @cached_property
    def projects(self) -> dict[str, dict[str, Any]]:
        """Import name -> [project] table, for every package."""
        found = {}
        for path in sorted(self.root.glob("packages/*/pyproject.toml")):
            project = tomllib.loads(path.read_text())["project"]
            found[import_name(project["name"])] = project
        return found

    def folder(self, package: str) -> Path:
        return self.root / "packages" / package.replace("_", "-")

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Dotted name -> module, for the sources of all packages (links to kernels/ are not followed)."""
        found = {}
        for package in self.projects:
            src = self.folder(package) / "src"
            for path in sorted(src.rglob("*.py")):
                if any(parent.is_symlink() for parent in path.parents):
                    continue
                parts = path.relative_to(src).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                found[name] = Module(name, path, package)
        return found

    def homes(self, package: str) -> dict[str, str]:
        """Public name -> module defining it: the package's literal `_HOME` table, or its `from` imports."""
        found: dict[str, str] = {}
        for node in self.modules[package].tree.body:
            if (
                isinstance(node, ast.Assign | ast.AnnAssign)
                and node.value
                and "_HOME" in assigned_names(node)
            ):
                found |= ast.literal_eval(node.value)
            if isinstance(node, ast.ImportFrom) and (source := from_module(node, self.modules[package])):
                names = {a.asname or a.name: source for a in node.names}
                found |= {n: m for n, m in names.items() if not n.startswith("_") and m.startswith(package)}
        return dict(sorted(found.items()))

    def relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def tracked(self) -> list[Path]:
        """The files git knows, or every file where there is no git."""
        if not (self.root / ".git").exists():
            return sorted(p for p in self.root.rglob("*") if p.is_file())
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        out = subprocess.run(command, cwd=self.root, capture_output=True, check=True, text=True).stdout
        paths = (self.root / name for name in out.split("\0") if name)
        return [p for p in paths if p.is_file() and not p.is_symlink()]


def import_name(distribution: str) -> str:
    return distribution.lower().replace("-", "_")


def requirement_name(text: str) -> str:
    """`"ds-core>=0.1,<0.2"` -> `"ds_core"`."""
    match = re.match(r"[\w.-]+", text)
    if match is None:
        raise ValueError(f"{text!r} is not a requirement; write a name and a range, such as 'numpy>=1.26'")
    return import_name(match[0])


def from_module(node: ast.ImportFrom, module: Module) -> str:
    """The absolute name of the module a `from` statement reads."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    base = parts[: len(parts) - node.level + (1 if module.is_init else 0)]
    return ".".join([*base, node.module] if node.module else base)


def assigned_names(node: ast.stmt) -> set[str]:
    """The plain names a statement assigns to."""
    targets: list[ast.expr] = [node.target] if isinstance(node, ast.AnnAssign) else []
    if isinstance(node, ast.Assign):
        targets = node.targets
    return {target.id for target in targets if isinstance(target, ast.Name)}


def first_line(module: Module) -> str:
    """The first line of a module's docstring; empty if it has none."""
    return (ast.get_docstring(module.tree) or "").split("\n")[0].strip()


def check(find: Callable[[Repo], Iterator[str]], argv: Sequence[str] | None = None) -> int:
    """Print every finding; the exit status of a tool that only looks. Takes no argument but a folder."""
    args = list(sys.argv[1:] if argv is None else argv)
    findings = dict.fromkeys(find(Repo(Path(args[0]).resolve()) if args else Repo()))
    for text in findings:
        print(text)
    return 1 if findings else 0
