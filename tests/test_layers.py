"""Who may import whom, and that the parts of the method stay usable without the trainer around them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from conftest import syntax_tree

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pmoe_lightning"
FOLDERS = {"pmoe_lightning": PACKAGE, "pmoe_lightning.callbacks": ROOT / "callbacks"}

#: The rooms in the order of their floors, each with those that it may look into; every room may look into itself.
ALLOWED = {
    "errors": set(),
    "lazy": set(),
    "limits": {"errors"},
    "processes": {"errors"},
    "modules": {"errors", "limits"},
    "estimators": {"modules", "limits"},
    "hamiltonian": {"modules", "limits"},
    "safe": {"modules", "hamiltonian", "limits"},
    "losses": {"modules", "estimators", "hamiltonian", "safe", "limits"},
    "updates": {"processes", "modules"},
    "algorithms": {
        "errors",
        "processes",
        "modules",
        "estimators",
        "hamiltonian",
        "safe",
        "losses",
        "updates",
        "limits",
    },
    "envs": {"errors", "limits"},
    "evaluation": {"errors", "processes", "modules", "envs"},
    "checkpoints": {"errors", "lazy", "processes", "modules", "hamiltonian", "safe", "limits"},
    "exporting": {"errors", "processes", "modules", "envs", "evaluation", "checkpoints"},
    "data": {"errors", "lazy", "processes", "modules", "updates", "envs", "checkpoints", "limits"},
    "tracking": {"errors", "lazy", "processes", "evaluation", "checkpoints", "limits"},
    "callbacks": {
        "errors",
        "processes",
        "modules",
        "estimators",
        "algorithms",
        "envs",
        "evaluation",
        "checkpoints",
        "exporting",
        "data",
        "tracking",
        "limits",
    },
    "configuration": {"errors", "limits"},
    "run": {
        "errors",
        "processes",
        "modules",
        "hamiltonian",
        "safe",
        "algorithms",
        "envs",
        "evaluation",
        "checkpoints",
        "data",
        "tracking",
        "configuration",
    },
    "train": {"errors", "processes", "configuration", "tracking", "run"},
    "evaluate": {"errors", "processes", "envs", "evaluation", "checkpoints", "tracking", "configuration"},
    "export": {"errors", "processes", "envs", "checkpoints", "exporting", "tracking", "configuration", "evaluate"},
}
MATHS = {"modules", "estimators", "hamiltonian", "safe", "losses"}
#: Only these take a configuration.
COMMANDS = {"run", "train", "configuration"}


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
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # The callbacks lie beside the package in a checkout, where a type checker finds a neighbour by its place.
            beside = path.parent.name == "callbacks"
            assert node.level == beside * (node.level > 0), f"{path}: write imports out in full"
            module = f"pmoe_lightning.callbacks.{node.module}" if node.level else node.module
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def part_of(name: str) -> str:
    """``pmoe_lightning.losses.sac.PMOESACLoss`` belongs to ``losses``."""
    return name.split(".")[1] if name.count(".") else ""


def test_imports_are_those_of_the_table():
    looks_into: dict[str, set[str]] = {room: set() for room in ALLOWED}
    for name, path in modules():
        if name == "pmoe_lightning":
            continue
        room = part_of(name)
        assert room in ALLOWED, f"say in this test what {room} may look into"
        used = {part_of(target) for target in imported_names(path) if target.startswith("pmoe_lightning.")}
        looks_into[room] |= used - {room, "__version__"}
    assert looks_into == ALLOWED


def drawing() -> str:
    """The table of docs/architecture.md: every room with its first sentence and the rooms that it looks into."""
    rows = ["| room | what it is | looks into |", "|---|---|---|"]
    for room, seen in ALLOWED.items():
        folder = FOLDERS.get(f"pmoe_lightning.{room}", PACKAGE / room)
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        said = ast.get_docstring(syntax_tree(file)).split("\n\n")[0].replace("\n", " ").replace("``", "`")
        rows.append(f"| `{room}` | {said} | {', '.join(other for other in ALLOWED if other in seen)} |")
    return "\n".join(rows)


def test_the_drawing_of_the_page_is_that_of_the_imports():
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert drawing() in page, f"the table of docs/architecture.md is to be:\n{drawing()}"


def test_no_room_looks_up():
    """What a room looks into stands above it in the table: there can be no circle."""
    floors = list(ALLOWED)
    upward = [
        f"{room} -> {other}" for room in floors for other in ALLOWED[room] if other not in floors[: floors.index(room)]
    ]
    assert not upward


def test_outside_packages_stay_where_they_belong():
    wrong = []
    for name, path in modules():
        part, outside = part_of(name), {target.split(".")[0] for target in imported_names(path)}
        banned = {"callbacks", "conf", "tests"}  # they are pmoe_lightning.callbacks and pmoe_lightning.conf
        if part not in COMMANDS:
            banned |= {"hydra", "omegaconf"}  # nothing below the commands takes a configuration
        if part in MATHS | {"envs", "evaluation"}:
            banned |= {"lightning", "mlflow"}
        wrong += [f"{name} imports {other}" for other in outside & banned]
    assert not wrong


def test_nothing_below_the_commands_takes_a_configuration():
    wrong = []
    for name, path in modules():
        if part_of(name) in COMMANDS:
            continue
        for node in ast.walk(syntax_tree(path)):
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
    heavy = {"torch", "lightning", "mlflow", "gymnasium"}
    assert not loaded_by("import pmoe_lightning.train") & heavy
    # Nor does what it says of every key, which stands in modules that do.
    asked = "import pmoe_lightning.configuration as c\n(cfg,) = c.compose_jobs(['algo=sac', 'safe=velocity'])\n"
    assert not loaded_by(asked + "c.validate(cfg)\nc.describe_keys(cfg, 'algo')") & heavy
