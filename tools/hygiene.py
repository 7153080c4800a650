"""No committed text names one machine, a registry host or a secret; no code pickles or starts a shell."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator

from repo import Repo, check

# Written with [x] here and there, so that this file does not find itself.
PATTERNS = {
    "a path of one machine": r"(?<![\w.])/(wor[k]|hom[e]|User[s]|roo[t]|opt/whee[l]s|opt/pyp[i])/\w",
    "a registry host": r"pyp[i]\.org|pythonhoste[d]\.org|pytorc[h]\.org/whl",
    "a merge that was not finished": r"^(<{7}|>{7}) ",
    "a secret": r"BEGIN [A-Z ]*PRIVATE KE[Y]|AKI[A][0-9A-Z]{16}|gh[pousr]_\w{36}|hf_[A-Za-z0-9]{34}",
}
BINARY = {".png", ".jpg", ".gif", ".ico", ".safetensors", ".so", ".whl", ".gz", ".npz", ".pdf"}
UNPICKLERS = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
PICKLING_CALLS = {"torch.save", "torch.load"}
SHELL_CALLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}


def find_texts(repo: Repo) -> Iterator[str]:
    """Lines that would be wrong, or unwise, on anybody else's machine."""
    for path in repo.tracked():
        if path.suffix in BINARY:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            for what, pattern in PATTERNS.items():
                if re.search(pattern, line):
                    yield f"{repo.relative(path)}:{number}: names {what}: {line.strip()[:100]}"


def find_dangerous(repo: Repo) -> Iterator[str]:
    """Pickle and shells, in the few files where ruff's list of banned names is switched off too."""
    for path in repo.tracked():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
            if problem := dangerous(node):
                yield f"{repo.relative(path)}:{getattr(node, 'lineno', 1)}: {problem}"


def dangerous(node: ast.AST) -> str:
    """What is wrong with one piece of syntax; empty if nothing is."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        bad = [n for n in names if n.split(".")[0] in UNPICKLERS]
        return f"imports {bad[0]}; data comes from JSON and safetensors" if bad else ""
    if not isinstance(node, ast.Call):
        return ""
    name = ast.unparse(node.func)
    if name in PICKLING_CALLS:
        return f"calls {name}, which pickles; use safetensors"
    if name.endswith("_object_list") or re.search(r"\b(all_)?gather_object$", name):
        return f"calls {name}, which pickles; send a tensor of JSON bytes"
    shell = [k for k in node.keywords if k.arg == "shell" and not is_false(k.value)]
    return (
        f"starts a shell with {name}; pass a list to subprocess.run" if shell or name in SHELL_CALLS else ""
    )


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def find_violations(repo: Repo) -> Iterator[str]:
    """All of the above."""
    yield from find_texts(repo)
    yield from find_dangerous(repo)


if __name__ == "__main__":
    sys.exit(check(find_violations))
