"""Types are checked: the package's own by mypy, and those that a user of the package sees."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import syntax_tree

ROOT = Path(__file__).resolve().parents[1]


def test_mypy_finds_nothing():
    """Nor anything in ``typed_user.py`` that is not as it says there; the settings are those of pyproject.toml."""
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", ["", ".checkpoints", ".data", ".tracking"])
def test_a_name_that_loads_on_first_use_has_its_type(package: str):
    """What the checker reads is what is loaded."""
    module = import_module(f"pmoe_lightning{package}")
    (block,) = [
        node
        for node in syntax_tree(Path(module.__file__)).body
        if isinstance(node, ast.If) and "TYPE" in ast.unparse(node.test)
    ]
    shown = {f"{node.module}.{alias.asname}" for node in block.body for alias in node.names}
    assert shown == {f"{module.__name__}.{home}.{name}" for name, home in module._HOMES.items()}
