"""Hook of mkdocs: pages made from the READMEs and the public names, and the order of the menu."""

from __future__ import annotations

import posixpath
import re
import runpy
from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File, Files

from repo import Repo

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
ADOPTED = ("CONTRIBUTING.md", "SECURITY.md")
FENCE = re.compile(r"(```.*?```)", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages to those in docs/."""
    repo = Repo()
    for uri, text in pages(repo):
        files.append(File.generated(config, uri, content=text))
    config["nav"] = menu(repo)
    return files


def pages(repo: Repo) -> Iterator[tuple[str, str]]:
    """Every generated page: its address and its text."""
    yield "index.md", adopt(repo, "README.md", "index.md")
    for name in ADOPTED:
        yield name.lower(), adopt(repo, name, name.lower())
    for package, project in repo.projects.items():
        name = project["name"]
        yield f"packages/{name}.md", adopt(repo, f"packages/{name}/README.md", f"packages/{name}.md")
        yield f"api/{name}.md", api_page(repo, package, name)
    limits = repo.modules.get("ds_core.limits")
    if limits is not None:
        yield "limits.md", runpy.run_path(str(limits.path), run_name=limits.name)["page"]()


def adopt(repo: Repo, source: str, uri: str) -> str:
    """A Markdown file of the repository as a page: links to pages lead there, others become text."""

    def relink(match: re.Match[str]) -> str:
        label, target = match[1], match[2]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        page = page_of(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        if not page:
            return label
        address = posixpath.relpath(page, posixpath.dirname(uri) or ".") + (f"#{anchor}" if anchor else "")
        return f"[{label}]({address})"

    parts = FENCE.split((repo.root / source).read_text())
    return "".join(part if part.startswith("```") else LINK.sub(relink, part) for part in parts)


def page_of(path: str) -> str:
    """The page that shows a file of the repository; empty if there is none."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if match := re.fullmatch(r"packages/([\w-]+)(/README\.md)?", path):
        return f"packages/{match[1]}.md"
    if path in ADOPTED:
        return path.lower()
    return "index.md" if path == "README.md" else ""


def api_page(repo: Repo, package: str, name: str) -> str:
    """The public names of a package, by the module that defines them."""
    by_home: dict[str, list[str]] = {}
    for public, home in repo.homes(package).items():
        by_home.setdefault(home, []).append(public)
    lines = [f"# {name}: public names", ""]
    for home in sorted(by_home):
        lines += [f"## {home}", ""]
        lines += [
            f"::: {home}" if f"{home}.{n}" in repo.modules else f"::: {home}.{n}" for n in by_home[home]
        ]
        lines.append("")
    return "\n".join(lines if by_home else [*lines, "It has none yet.", ""])


def menu(repo: Repo) -> list[Any]:
    """The order of the menu; decisions and packages are found, not listed."""
    names = [project["name"] for project in repo.projects.values()]
    decisions = sorted(p.name for p in (repo.root / "docs" / "decisions").glob("[0-9]*.md"))
    guides = sorted(p.name for p in (repo.root / "docs" / "guides").glob("*.md") if p.stem != "index")
    loose = {p.name for p in (repo.root / "docs").glob("*.md")} - {"rooms.md", "style.md", "glossary.md"}
    return [
        {"Start": "index.md"},
        {"Packages": [{n: f"packages/{n}.md"} for n in names]},
        {"API": [{n: f"api/{n}.md"} for n in names]},
        {"Rooms": "rooms.md"},
        {"Limits": "limits.md"},
        *sorted(loose),
        {"Guides": ["guides/index.md", *(f"guides/{n}" for n in guides)]},
        {"Glossary": "glossary.md"},
        {"Style": "style.md"},
        {"Decisions": ["decisions/index.md", *(f"decisions/{n}" for n in decisions)]},
        {"Contributing": "contributing.md"},
        {"Security": "security.md"},
    ]
