"""What the benchmarks take from the package exists: those for a card run rarely, and a name that has moved would show there only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for folder in ("benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_name_of_the_package_is_there(script):
    tree = ast.parse((ROOT / script).read_text())
    bound = []  # names, and what they stand for; a name may stand for several things in several functions
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "autoaccum":
            found: dict = {}
            exec(ast.unparse(node), found)
            bound += [(alias.asname or alias.name, found[alias.asname or alias.name]) for alias in node.names]
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    used = {(node.value.id, node.attr) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    assert not [
        f"{name}.{attribute}" for name, attribute in used for known, value in bound if known == name and name not in stored and not hasattr(value, attribute)
    ]
