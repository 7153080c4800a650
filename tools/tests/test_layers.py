"""layers.py: every kind of wrong arrow is planted and found; a right tree has no finding."""

import pytest

import layers
from repo import Repo

CORE = "packages/ds-core/src/ds_core"
ZERO = "packages/ds-zero/src/ds_zero"

GOOD = {
    f"{CORE}/__init__.py": '"""A room."""\n_HOME: dict[str, str] = {"Engine": "ds_core.train.engine"}\n',
    f"{CORE}/ground/mesh.py": "import numpy\nimport json\n",
    f"{CORE}/protocols.py": "from ds_core.state import layout\n",
    f"{CORE}/state/layout.py": "import ds_core.ground.mesh\n",
    f"{CORE}/state/owner.py": "import ds_core.protocols\n",
    f"{CORE}/train/engine.py": "from ds_core.ground import mesh\nfrom ..ground.mesh import x\n",
    f"{ZERO}/owner.py": "from ds_core import Engine\n\ndef plot():\n    import matplotlib\n",
    f"{ZERO}/recipes/train.py": "import matplotlib\n",
}

BAD = {
    "sibling not allowed": (
        {f"{CORE}/ground/x.py": "import ds_zero.owner\n"},
        "ds_core imports ds_zero; it may import no",
    ),
    "lazy sibling": (
        {f"{CORE}/ground/x.py": "def f():\n    from ds_zero import owner\n"},
        "ds_core imports ds_zero",
    ),
    "undeclared": ({f"{ZERO}/x.py": "import requests.api\n"}, "requests is not declared by ds-zero"),
    "undeclared, of a dependency": ({f"{ZERO}/x.py": "import numpy\n"}, "numpy is not declared by ds-zero"),
    "undeclared, renamed": ({f"{ZERO}/x.py": "import yaml\n"}, "yaml is not declared by ds-zero"),
    "extra at the top": ({f"{ZERO}/x.py": "import matplotlib\n"}, "matplotlib comes with an extra"),
    "upwards": (
        {f"{CORE}/ground/x.py": "from ds_core.train import engine\n"},
        "ground imports ds_core.train.engine",
    ),
    "upwards, relative": (
        {f"{CORE}/ground/x.py": "from ..train.engine import a\n"},
        "ground imports ds_core.train",
    ),
    "upwards, through the table": (
        {f"{CORE}/ground/x.py": "from ds_core import Engine\n"},
        "ground imports ds_core.train",
    ),
    "upwards, from a file": (
        {f"{CORE}/protocols.py": "import ds_core.train\n"},
        "protocols imports ds_core.train",
    ),
    "upwards, for types": (
        {f"{CORE}/ground/x.py": "if TYPE_CHECKING:\n    from ds_core.protocols import Store\n"},
        "ground imports ds_core.protocols; the order is ground < state, protocols < train",
    ),
    "a folder without a place": ({f"{CORE}/misc/x.py": ""}, "misc has no place in"),
    "two-way": (
        {f"{ZERO}/a.py": "import ds_zero.b\n", f"{ZERO}/b.py": "from ds_zero.a import x\n"},
        "ds_zero.a -> ds_zero.b",
    ),
    "two-way, lazily": (
        {f"{ZERO}/a.py": "from . import b\n", f"{ZERO}/b.py": "def f():\n    from . import a\n"},
        "ds_zero.a -> ds_zero.b -> ds_zero.a",
    ),
    "ring of three": (
        {f"{ZERO}/{x}.py": f"from .{y} import z\n" for x, y in ("ab", "bc", "ca")},
        "ds_zero.a -> ds_zero.b -> ds_zero.c -> ds_zero.a",
    ),
    "declared, not in the table": (
        {"packages/ds-core/pyproject.toml": '[project]\nname = "ds-core"\ndependencies = ["ds-zero"]\n'},
        "ds_zero is declared but not allowed",
    ),
    "in the table, not declared": (
        {"packages/ds-zero/pyproject.toml": '[project]\nname = "ds-zero"\ndependencies = []\n'},
        "ds_core is allowed but not declared",
    ),
    "a package without a line": (
        {
            "packages/ds-new/pyproject.toml": '[project]\nname = "ds-new"\ndependencies = []\n',
            "packages/ds-new/src/ds_new/__init__.py": "",
        },
        "ds_new is not in [tool.ds.layers]",
    ),
}


def test_good_tree_has_no_finding(tree):
    assert list(layers.find_violations(Repo(tree(GOOD)))) == []


@pytest.mark.parametrize("case", BAD)
def test_planted_fault_is_found(tree, case):
    files, expected = BAD[case]
    findings = list(layers.find_violations(Repo(tree(GOOD | files))))
    assert any(expected in text for text in findings), findings


def test_a_recipe_may_import_what_an_extra_brings(tree):
    pyproject = '[project]\nname = "ds-core"\ndependencies = ["numpy"]\n'
    extra = f'{pyproject}[project.optional-dependencies]\nrecipes = ["ds-zero"]\n'
    recipe = {f"{CORE}/recipes/job.py": "import ds_zero.owner\n"}
    where = "packages/ds-core/pyproject.toml"

    def sibling(files):
        found = layers.find_package_arrows(Repo(tree(GOOD | files)))
        return [text for text in found if "ds_core imports ds_zero" in text]

    assert sibling(recipe | {where: extra}) == []
    assert sibling(recipe | {where: pyproject})
    assert sibling({f"{CORE}/ground/job.py": "import ds_zero.owner\n", where: extra})


def test_ring_is_reported_once(tree):
    files = {f"{ZERO}/{x}.py": f"from .{y} import z\n" for x, y in ("ab", "bc", "ca")}
    assert len(list(layers.find_cycles(Repo(tree(files))))) == 1


def test_links_are_not_followed(tree):
    root = tree(GOOD | {"kernels/adam.py": "import requests\n"})
    (root / ZERO / "sources").symlink_to(root / "kernels", target_is_directory=True)
    assert list(layers.find_violations(Repo(root))) == []
