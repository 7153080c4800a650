"""Versions agree: `__version__`, the newest changelog heading, and the ranges siblings ask for."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement

from repo import Repo, check, import_name


def version_of(repo: Repo, package: str) -> str:
    """The literal `__version__` of a package; empty if it has none."""
    for node in repo.modules[package].tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    return ""


def find_disagreements(repo: Repo) -> Iterator[str]:
    """Whatever would make a release wrong."""
    versions = {package: version_of(repo, package) for package in repo.projects}
    for package, project in repo.projects.items():
        folder = repo.relative(repo.folder(package))
        headings = re.findall(r"^## (\S+)", (repo.folder(package) / "CHANGELOG.md").read_text(), re.MULTILINE)
        newest = headings[0] if headings else "no heading"
        if newest != versions[package]:
            version = versions[package] or "missing"
            yield f"{folder}/CHANGELOG.md: the newest heading is {newest}, __version__ is {version}"
        extras = project.get("optional-dependencies", {}).values()
        for text in [*project["dependencies"], *(t for group in extras for t in group)]:
            wanted = Requirement(text)
            current = versions.get(import_name(wanted.name))
            if current and current not in wanted.specifier:
                yield f"{folder}/pyproject.toml: asks for {text}, but {wanted.name} is {current}"
        if (repo.folder(package) / "LICENSE").read_text() != (repo.root / "LICENSE").read_text():
            yield f"{folder}/LICENSE: differs from LICENSE; copy it (a link would dangle in the sdist)"


if __name__ == "__main__":
    sys.exit(check(find_disagreements))
