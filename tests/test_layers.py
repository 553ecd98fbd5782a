"""Who may import whom, and that the parts of the method stay usable without the trainer around them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pmoe_lightning"
FOLDERS = {"pmoe_lightning": PACKAGE, "pmoe_lightning.callbacks": ROOT / "callbacks"}

# Each part with the parts of the package it may import; a part may always import itself.
MATHS = {
    "keys",
    "compositions",
    "distributions",
    "networks",
    "actors",
    "options",
    "critics",
    "estimators",
    "hamiltonian",
    "losses",
    "safety",
}
ALLOWED = {
    "errors": set(),
    "lazy": set(),
    "keys": set(),
    "distributions": set(),
    "compositions": set(),
    "networks": set(),
    "normalization": set(),
    "figures": set(),
    "critics": {"networks"},
    "actors": {"compositions", "keys", "networks", "distributions"},
    "options": {"actors", "networks", "distributions"},
    "estimators": {"distributions"},
    "gradient_statistics": {"distributions", "estimators"},
    "hamiltonian": {"distributions", "keys"},
    "losses": {"actors", "distributions", "estimators", "critics", "hamiltonian", "keys", "options", "safety"},
    "safety": {"critics", "distributions", "hamiltonian"},
    "compilation": set(),
    "updates": {"compilation"},
    "stopping": {"updates"},
    "peers": {"errors"},
    "algorithms": MATHS | {"errors", "updates"},
    "envs": {"errors"},
    "data": {"checkpoints", "compilation", "envs", "errors", "lazy", "networks", "normalization"},
    "acting": {"distributions", "normalization", "options"},
    "film": {"figures"},
    "evaluation": {"acting", "envs", "errors", "film"},
    "checkpoints": {
        "acting",
        "hamiltonian",
        "actors",
        "critics",
        "errors",
        "lazy",
        "normalization",
        "options",
        "safety",
        "tracking",
    },  # a reference may name an MLflow run
    "tracking": {"checkpoints", "errors", "lazy"},
    "callbacks": {
        "acting",
        "checkpoints",
        "distributions",
        "envs",
        "errors",
        "estimators",
        "evaluation",
        "figures",
        "gradient_statistics",
        "stopping",
        "tracking",
    },
    "configuration": {"errors", "conf"},
    "evaluate": {"checkpoints", "configuration", "envs", "errors", "evaluation", "tracking"},
}
COMMANDS = {"train", "training", "sweep", "resume"}  # meet everything


def modules() -> list[tuple[str, Path]]:
    found = []
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found.append((name, path))
    return found


def imported_names(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside functions, as a full dotted name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports out in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(name: str) -> str:
    """``pmoe_lightning.losses.sac.PMOESACLoss`` belongs to ``losses``."""
    return name.split(".")[1] if name.count(".") else ""


def test_imports_point_down():
    wrong = []
    for name, path in modules():
        part = part_of(name)
        if part in COMMANDS or name == "pmoe_lightning":
            continue
        assert part in ALLOWED, f"say in this test what {part} may import"
        used = {part_of(target) for target in imported_names(path) if target.startswith("pmoe_lightning.")}
        wrong += [f"{name} imports {other}" for other in used - ALLOWED[part] - {part, "__version__"}]
    assert not wrong


def test_outside_packages_stay_where_they_belong():
    wrong = []
    for name, path in modules():
        part, outside = part_of(name), {target.split(".")[0] for target in imported_names(path)}
        banned = {"callbacks", "conf", "tests"}  # they are pmoe_lightning.callbacks and pmoe_lightning.conf
        if part not in COMMANDS | {"configuration"}:
            banned |= {"hydra", "omegaconf"}  # nothing below the commands takes a configuration
        if part in MATHS | {"normalization", "acting", "envs", "evaluation", "figures", "film"}:
            banned |= {"lightning", "mlflow"}
        wrong += [f"{name} imports {other}" for other in outside & banned]
    assert not wrong


def test_nothing_below_the_commands_takes_a_configuration():
    wrong = []
    for name, path in modules():
        if part_of(name) in COMMANDS | {"configuration"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]}
                wrong += [f"{name}.{node.name}"] * bool(arguments & {"cfg", "config"})
    assert not wrong


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in sys.modules after the statement, in a process of its own."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    assert not loaded_by("import pmoe_lightning") & {"torch", "lightning", "mlflow", "hydra", "gymnasium"}


def test_public_names_load_neither_lightning_nor_mlflow_nor_hydra():
    import pmoe_lightning

    names = ", ".join(pmoe_lightning.__all__)
    loaded = loaded_by(f"from pmoe_lightning import {names}")
    assert "torchrl" in loaded
    assert not loaded & {"lightning", "pytorch_lightning", "mlflow", "hydra"}


def test_the_command_line_loads_no_torch():
    assert not loaded_by("import pmoe_lightning.train") & {"torch", "lightning", "mlflow", "gymnasium"}
