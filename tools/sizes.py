"""Nothing grows past a limit: lines of files and functions, methods, constructor arguments; no `global`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from repo import Repo, check

FOLDERS = ("packages", "kernels", "tools", "integration-tests", "noxfile.py")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def find_large(repo: Repo) -> Iterator[str]:
    """Everything over a limit of [tool.ds.sizes], with the limit."""
    limits: dict[str, int] = repo.settings["sizes"]
    for path in repo.tracked():
        name = repo.relative(path)
        if path.suffix == ".py" and name.startswith(FOLDERS):
            yield from find_large_in(path, name, limits)


def find_large_in(path: Path, name: str, limits: dict[str, int]) -> Iterator[str]:
    text = path.read_text()
    lines = text.count("\n")
    if lines > limits["file"]:
        yield f"{name}:1: {lines} lines; the limit is {limits['file']}: find the noun that wants out"
    for node in ast.walk(ast.parse(text, filename=name)):
        where = f"{name}:{getattr(node, 'lineno', 1)}"
        if isinstance(node, ast.Global):
            yield f"{where}: `global {', '.join(node.names)}`; give the state an owner and pass it"
        elif isinstance(node, Function):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > limits["function"]:
                yield f"{where}: {node.name} has {length} lines; the limit is {limits['function']}"
        elif isinstance(node, ast.ClassDef):
            yield from find_large_class(node, where, limits)


def find_large_class(node: ast.ClassDef, where: str, limits: dict[str, int]) -> Iterator[str]:
    methods = {
        child.name: child for child in node.body if isinstance(child, Function)
    }  # overloads count once
    if len(methods) > limits["methods"]:
        yield f"{where}: class {node.name} has {len(methods)} methods; the limit is {limits['methods']}"
    if init := methods.get("__init__"):
        count = len(init.args.posonlyargs) + len(init.args.args) + len(init.args.kwonlyargs) - 1
        if count > limits["init_args"]:
            yield f"{where}: {node.name}.__init__ takes {count} arguments; the limit is {limits['init_args']}"


def print_long(repo: Repo) -> None:
    """Name the files on their way to the limit; they fail nothing."""
    for path in repo.tracked():
        if path.suffix == ".py" and repo.relative(path).startswith(FOLDERS):
            lines = path.read_text().count("\n")
            if repo.settings["sizes"]["file_warn"] < lines <= repo.settings["sizes"]["file"]:
                print(f"note: {repo.relative(path)} has {lines} lines")


if __name__ == "__main__":
    print_long(Repo())
    sys.exit(check(find_large))
