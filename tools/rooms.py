"""The map: writes docs/rooms.md from every file's first docstring line; `--check` says when it is stale."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from layers import find_imports
from repo import Module, Repo, first_line

PAGE = Path("docs/rooms.md")
HEAD = """# Rooms

Every source file and what it is for: the first line of each file, collected by `tools/rooms.py`. Do not edit.

"""


def find_unnamed(repo: Repo) -> Iterator[str]:
    """Files that do not say what they are for."""
    for module in all_modules(repo):
        if not first_line(module) and not (module.is_init and not module.path.read_text().strip()):
            yield f"{repo.relative(module.path)}:1: start the file with a docstring saying what it is for"


def all_modules(repo: Repo) -> list[Module]:
    """The modules of all packages, then the kernels and tools, which belong to none."""
    loose = sorted([*repo.root.glob("kernels/*/*.py"), *repo.root.glob("tools/*.py")])
    return [*repo.modules.values(), *(Module(p.stem, p, "") for p in loose if not p.is_symlink())]


def render(repo: Repo) -> str:
    """The whole page."""
    lines = [HEAD]
    for package, project in repo.projects.items():
        lines += [f"## {project['name']}\n", f"{first_line(repo.modules[package])}\n", *TABLE]
        base = repo.folder(package) / "src" / package
        for module in repo.modules.values():
            text = first_line(module)
            if module.package == package and text and module.name != package:
                name = module.path.relative_to(base).as_posix().removesuffix("__init__.py")
                lines.append(row(name, module))
        lines.append("")
    for folder in ("kernels", "tools"):
        base = repo.root / folder
        rows = [m for m in all_modules(repo) if not m.package and m.path.is_relative_to(base)]
        if rows:
            lines += [f"## {folder}\n", *TABLE]
            lines += [row(m.path.relative_to(base).as_posix(), m) for m in rows]
            lines.append("")
    return "\n".join(lines)


def row(name: str, module: Module) -> str:
    text = first_line(module).replace("|", "\\|")
    return f"| `{name}` | {text} |"


TABLE = ("| file | what for |", "| --- | --- |")


def find_untested(repo: Repo) -> Iterator[str]:
    """Modules that no test names: by import, through a package table, as text, or as test_<file>.py."""
    tests = [*repo.root.glob("packages/*/tests/**/*.py"), *repo.root.glob("integration-tests/**/*.py")]
    public = {f"{p}.{name}": home for p in repo.projects for name, home in repo.homes(p).items()}
    files = {path.stem.removeprefix("test_") for path in tests}
    seen: set[str] = set()
    for path in tests:
        seen.update(i.target for i in find_imports(repo, Module(path.stem, path, "")))
        words = re.findall(r"\bds_\w+(?:\.\w+)+", path.read_text())
        seen.update(public.get(word, word) for word in words)
    for name, module in repo.modules.items():
        named = name in seen or module.path.stem in files or any(s.startswith(f"{name}.") for s in seen)
        if not module.is_init and not named:
            yield name


def main(argv: list[str]) -> int:
    """Write the page, or with `--check` compare it; then name the files no test imports."""
    repo = Repo()
    findings = list(find_unnamed(repo))
    text = render(repo)
    page = repo.root / PAGE
    if "--check" not in argv:
        page.write_text(text)
    elif not page.exists() or page.read_text() != text:
        findings.append(f"{PAGE}: stale; run `nox -s lint -- --fix`")
    for finding in findings:
        print(finding)
    if untested := list(find_untested(repo)):
        print(f"note: no test names these: {', '.join(untested)}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
