"""The public surface: writes packages/*/api.txt, a name and signature per line; `--check` compares."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Iterator

from repo import Module, Repo, assigned_names, from_module

Function = ast.FunctionDef | ast.AsyncFunctionDef
SPOKEN = {"__call__", "__enter__", "__getitem__", "__iter__", "__len__"}


def render(repo: Repo, package: str) -> str:
    """The package's api.txt, from its sources alone: nothing is imported."""
    lines: list[str] = []
    for name, home in repo.homes(package).items():
        lines += describe(repo, f"{package}.{name}", name, home)
    return "".join(f"{line}\n" for line in lines)


def describe(repo: Repo, label: str, name: str, home: str) -> Iterator[str]:
    """The lines of one public name, wherever it is defined."""
    if f"{home}.{name}" in repo.modules:
        yield f"{label}: module"
        return
    node, module = find_definition(repo, name, home)
    if isinstance(node, Function):
        yield f"{label}{signature(node)}"
    elif isinstance(node, ast.ClassDef):
        yield from describe_class(label, node)
    elif isinstance(node, ast.AnnAssign):
        yield f"{label}: {ast.unparse(node.annotation)}"
    elif isinstance(node, ast.Assign):
        yield f"{label} = {ast.unparse(node.value)[:80]}"
    else:
        raise LookupError(f"{label}: {module.name} does not define {name}; correct the table of public names")


def find_definition(repo: Repo, name: str, home: str) -> tuple[ast.stmt | None, Module]:
    """The statement that defines a name, following re-exports inside the repository."""
    if home not in repo.modules:
        raise LookupError(f"public name {name}: there is no module {home}; correct the table of public names")
    module = repo.modules[home]
    for node in flat(module.tree.body):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find_definition(repo, alias.name, from_module(node, module))
        if getattr(node, "name", None) == name or name in assigned_names(node):
            return node, module
    return None, module


def flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those under `if` and `try` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from flat([*node.body, *node.orelse])


def describe_class(label: str, node: ast.ClassDef) -> Iterator[str]:
    """Constructor and bases, then fields, then public methods and properties."""
    methods = [child for child in node.body if isinstance(child, Function)]
    init = next((m for m in methods if m.name == "__init__"), None)
    bases = ", ".join(ast.unparse(b) for b in node.bases)
    yield f"{label}{signature(init) if init else ''}" + (f": {bases}" if bases else "")
    for child in node.body:
        if isinstance(child, ast.AnnAssign) and not ast.unparse(child.target).startswith("_"):
            default = f" = {ast.unparse(child.value)}" if child.value else ""
            yield f"{label}.{ast.unparse(child.target)}: {ast.unparse(child.annotation)}{default}"
    for method in methods:
        if method.name.startswith("_") and method.name not in SPOKEN:
            continue
        marks = {ast.unparse(d).split(".")[-1] for d in method.decorator_list}
        if marks & {"property", "cached_property"}:
            returns = ast.unparse(method.returns) if method.returns else "?"
            yield f"{label}.{method.name}: {returns}"
        elif not marks & {"setter", "overload"}:
            yield f"{label}.{method.name}{signature(method)}"


def signature(node: Function) -> str:
    """`(model: Module, *, stage: int = 3) -> Module`, without self."""
    arguments = ast.unparse(node.args).removeprefix("self").removeprefix("cls").removeprefix(", ")
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    return f"({arguments}){returns}"


def main(argv: list[str]) -> int:
    """Write every api.txt, or with `--check` print how they differ from the sources."""
    repo = Repo()
    stale = 0
    for package in repo.projects:
        path = repo.folder(package) / "api.txt"
        old, new = path.read_text() if path.exists() else "", render(repo, package)
        if "--check" not in argv:
            path.write_text(new)
        elif old != new:
            stale += 1
            name = repo.relative(path)
            print(
                "\n".join(
                    difflib.unified_diff(old.splitlines(), new.splitlines(), name, "the sources", lineterm="")
                )
            )
            print(f"{name}: the public surface changed; look at it, then run `nox -s lint -- --fix`")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
