"""Which way imports may point: between packages, between folders of one, and to declared third parties."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from typing import NamedTuple

from repo import Module, Repo, check, from_module, requirement_name

# Where what an extra brings may be imported at the top of a file; elsewhere, inside the function using it.
OPTIONAL_FOLDERS = {"recipes", "bridges"}


class Import(NamedTuple):
    """One imported module, as seen from the file importing it."""

    module: Module
    line: int
    target: str
    lazy: bool

    def where(self, repo: Repo) -> str:
        return f"{repo.relative(self.module.path)}:{self.line}"


def find_imports(repo: Repo, module: Module) -> Iterator[Import]:
    """Every import in the file; names of a package table count as imports of the module defining them."""
    lazy_lines: set[int] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lazy_lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, node.lineno, alias.name, node.lineno in lazy_lines)
        elif isinstance(node, ast.ImportFrom):
            source = from_module(node, module)
            for alias in node.names:
                target = resolve(repo, source, alias.name)
                yield Import(module, node.lineno, target, node.lineno in lazy_lines)


def resolve(repo: Repo, source: str, name: str) -> str:
    """`from source import name`: the module that is really read."""
    if f"{source}.{name}" in repo.modules:
        return f"{source}.{name}"
    return repo.homes(source).get(name, source) if source in repo.projects else source


def find_package_arrows(repo: Repo) -> Iterator[str]:
    """Imports of a sibling package, and declared siblings, that the layer table does not allow."""
    layers: dict[str, list[str]] = repo.settings["layers"]
    for package, project in repo.projects.items():
        if package not in layers:
            yield f"pyproject.toml: {package} is not in [tool.ds.layers]; say what it may import"
            continue
        declared = {requirement_name(text) for text in project["dependencies"]} & repo.projects.keys()
        for other in sorted(declared ^ set(layers[package])):
            yield (
                f"packages/{project['name']}/pyproject.toml: {other} is "
                f"{'declared but not allowed' if other in declared else 'allowed but not declared'}; "
                "make dependencies and [tool.ds.layers] agree"
            )
    for module in repo.modules.values():
        for item in find_imports(repo, module):
            top = item.target.split(".")[0]
            if top in extra_packages(repo, module):
                continue
            if top != module.package and top in repo.projects and top not in layers.get(module.package, []):
                allowed = ", ".join(layers.get(module.package, [])) or "no other package"
                yield f"{item.where(repo)}: {module.package} imports {top}; it may import {allowed}"


def extra_packages(repo: Repo, module: Module) -> set[str]:
    """Sibling packages that a recipe or bridge may import, since an extra of its package brings them."""
    if not OPTIONAL_FOLDERS & set(module.name.split(".")):
        return set()
    extras = repo.projects[module.package].get("optional-dependencies", {})
    return {requirement_name(text) for group in extras.values() for text in group} & repo.projects.keys()


def find_undeclared(repo: Repo) -> Iterator[str]:
    """Third-party imports that the package does not declare, or that only an extra brings."""
    names: dict[str, str] = repo.settings.get("distributions", {})
    for module in repo.modules.values():
        project = repo.projects[module.package]
        base = {requirement_name(text) for text in project["dependencies"]}
        extras = {
            requirement_name(t) for group in project.get("optional-dependencies", {}).values() for t in group
        }
        optional_here = OPTIONAL_FOLDERS & set(module.name.split("."))
        for item in find_imports(repo, module):
            top = item.target.split(".")[0]
            distribution = requirement_name(names.get(top, top))
            if top in sys.stdlib_module_names or top in repo.projects or distribution in base:
                continue
            if distribution not in extras:
                yield f"{item.where(repo)}: {top} is not declared by {project['name']}"
            elif not item.lazy and not optional_here:
                yield f"{item.where(repo)}: {top} comes with an extra; import it inside the function using it"


def find_folder_arrows(repo: Repo) -> Iterator[str]:
    """Imports that climb from a lower folder of a package to a higher one."""
    for package, order in repo.settings.get("folders", {}).items():
        levels = [[level] if isinstance(level, str) else level for level in order]
        rank = {name: index for index, names in enumerate(levels) for name in names}
        ladder = " < ".join(", ".join(names) for names in levels)
        for module in repo.modules.values():
            if module.package != package:
                continue
            own = folder_of(module.name)
            if own and own not in rank:
                where = repo.relative(module.path)
                yield f"{where}:1: {own} has no place in [tool.ds.folders] {package}: {ladder}"
                continue
            for item in find_imports(repo, module):
                other = folder_of(item.target) if item.target.split(".")[0] == package else ""
                if other in rank and rank[other] > rank.get(own, -1):
                    where = item.where(repo)
                    yield f"{where}: {own or package} imports {item.target}; the order is {ladder}"


def folder_of(name: str) -> str:
    """`"ds_core.state.layout"` -> `"state"`; empty for the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def find_cycles(repo: Repo) -> Iterator[str]:
    """Modules of one package that import each other, directly or around a ring, lazy imports included."""
    graph = {
        name: {i.target for i in find_imports(repo, module) if i.target in repo.modules} - {name}
        for name, module in repo.modules.items()
    }
    reported: set[frozenset[str]] = set()
    for start in graph:
        ring = shortest_ring(graph, start)
        if ring and frozenset(ring) not in reported:
            reported.add(frozenset(ring))
            where = repo.relative(repo.modules[start].path)
            yield f"{where}:1: modules import each other: {' -> '.join([*ring, start])}"


def shortest_ring(graph: dict[str, set[str]], start: str) -> list[str]:
    """The shortest way from `start` back to itself; empty if there is none."""
    queue = [[start]]
    seen = {start}
    for path in queue:
        for target in sorted(graph[path[-1]]):
            if target == start:
                return path
            if target not in seen:
                seen.add(target)
                queue.append([*path, target])
    return []


def find_violations(repo: Repo) -> Iterator[str]:
    """All of the above."""
    for find in (find_package_arrows, find_undeclared, find_folder_arrows, find_cycles):
        yield from find(repo)


if __name__ == "__main__":
    sys.exit(check(find_violations))
