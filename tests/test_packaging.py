"""What is shipped: the wheel holds everything, declared dependencies cover the imports, and the project files agree."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, packages_distributions
from pathlib import Path

import pytest
import yaml
from conftest import syntax_tree

import pmoe_lightning

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", name)[0]).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True, text=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_and_every_configuration_file(wheel):
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "pmoe_lightning").rglob("*.py")}
    for folder in ("callbacks", "conf"):
        paths = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml")]
        expected |= {f"pmoe_lightning/{path.relative_to(ROOT)}" for path in paths}
    assert shipped == expected - {"pmoe_lightning/conf/python_env.yaml"} | {"pmoe_lightning/py.typed"}


def test_the_license_is_shipped_and_named_alike_everywhere(wheel):
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    archive = zipfile.ZipFile(wheel)
    (shipped,) = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    assert archive.read(shipped).decode() == text
    (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    assert "License-Expression: Apache-2.0\n" in archive.read(metadata).decode()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["license"], citation["version"]) == (PROJECT["license"], pmoe_lightning.__version__)
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_the_commands_say_their_version(monkeypatch, capsys):
    scripts = {script.name: script for script in entry_points(group="console_scripts")}
    for name in PROJECT["scripts"]:
        monkeypatch.setattr(sys, "argv", [name, "--version"])
        with pytest.raises(SystemExit) as ended:
            scripts[name].load()()
        assert ended.value.code is None
        assert capsys.readouterr().out == f"pmoe_lightning {pmoe_lightning.__version__}\n"


def test_bash_completes_what_is_typed_to_the_train_command(clean_environ):
    command = Path(sys.executable).with_name("pmoe-train")
    environ = clean_environ | {"COMP_LINE": "pmoe-train algo=", "COMP_POINT": "16"}
    done = subprocess.run([command, "-sc", "query=bash"], env=environ, capture_output=True, text=True)
    assert done.stdout.split() == ["algo=dac", "algo=ppo", "algo=sac"], done.stderr
    done = subprocess.run([command, "--shell-completion", "install=bash"], env=environ, capture_output=True, text=True)
    assert done.stdout.endswith("hydra_bash_completion pmoe-train\n")


def test_the_installed_wheel_prints_its_configuration_from_another_folder(wheel, tmp_path, clean_environ):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    command = [sys.executable, "-m", "pmoe_lightning.train", "algo=sac", "--cfg", "job"]
    environ = clean_environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, cwd=folder, env=environ, check=True, capture_output=True, text=True)
    assert yaml.safe_load(done.stdout)["data"]["_target_"] == "pmoe_lightning.data.OffPolicyData"
    code = "import importlib.util; print(importlib.util.find_spec('pmoe_lightning.callbacks').origin)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environ, capture_output=True, text=True)
    assert done.stdout.startswith(str(tmp_path / "site"))


def test_every_package_that_is_imported_is_declared():
    def imported(folder: str) -> set[str]:
        names = set()
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(syntax_tree(path)):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:  # a callback names its neighbours by place
                    names.add(node.module.split(".")[0])
        return names - set(sys.stdlib_module_names) - {"pmoe_lightning"}

    distributions = packages_distributions()
    extras = PROJECT["optional-dependencies"]
    of_extras = [requirement for name in ("dm_control", "flow", "onnx", "ray") for requirement in extras[name]]
    declared = {canonical(requirement) for requirement in [*PROJECT["dependencies"], *of_extras]}
    # Brought by a declared one, which could not work without it.
    declared |= {"sqlalchemy", "pyyaml"}
    for folder in ("pmoe_lightning", "callbacks", "conf"):
        undeclared = {
            name for name in imported(folder) if not {canonical(dist) for dist in distributions[name]} & declared
        }
        assert not undeclared, f"{folder} imports {undeclared}: declare them in pyproject.toml"


def test_constraints_pin_what_is_declared_and_name_no_place_to_download_from():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = dict(line.split("==") for line in lines)
    assert pins["torch"] == "2.13.0" and pins["mujoco"] == "3.11.0" and pins["torchrl"] == "0.14.1"
    extras = PROJECT["optional-dependencies"]
    wanted = {canonical(name) for name in [*PROJECT["dependencies"], *extras["test"], *extras["benchmarks"]]}
    assert wanted <= {canonical(name) for name in pins}
    files = ["constraints.txt", "pyproject.toml", "Makefile", "MLproject", "conf/python_env.yaml", ".ci/run"]
    assert not [name for name in files if re.search(r"index-url|find-links|https?://", (ROOT / name).read_text())]


def commands_of(entry_point: str, **parameters: str) -> list[str]:
    """The words that ``mlflow run -P`` gives to the command."""
    from mlflow.projects._project_spec import load_project

    project = load_project(str(ROOT))
    command = project.get_entry_point(entry_point).compute_command(parameters, storage_dir=None)
    python, flag, module, *words = shlex.split(command)
    assert (python, flag) == ("python", "-m")
    return [module, *words]


def test_mlflow_run_gives_the_train_command_what_was_asked_for():
    from pmoe_lightning.configuration import normalise_argv

    def overrides(**parameters: str) -> list[str]:
        module, *words = commands_of("main", **parameters)
        assert module == "pmoe_lightning.train"
        return sorted(normalise_argv(words))

    assert overrides() == ["algo=ppo"]
    asked = {"algo": "sac", "env": "Hopper-v5", "total_frames": "5000", "seed": "3"}
    asked["overrides"] = "actor=gaussian algo.hidden_sizes='[32, 32]' trainer.devices=2"
    expected = ["algo=sac", "env.id=Hopper-v5", "total_frames=5000", "seed=3", "actor=gaussian"]
    assert overrides(**asked) == sorted([*expected, "algo.hidden_sizes=[32, 32]", "trainer.devices=2"])


def test_mlflow_run_gives_the_evaluate_command_what_was_asked_for():
    from pmoe_lightning.evaluate import parse

    module, *words = commands_of("evaluate", checkpoint="a b.ckpt", episodes="3", seed="7")
    request = parse(words)
    assert module == "pmoe_lightning.evaluate"
    assert (request.checkpoint, request.episodes, request.seed, request.video) == ("a b.ckpt", 3, 7, True)
    assert parse(commands_of("evaluate", checkpoint="x", json="true", video="false")[1:]).json


@pytest.mark.slow
def test_the_installed_wheel_trains_from_another_folder(wheel, tmp_path, clean_environ):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    environ = clean_environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "pmoe_lightning.train", "debug=default"]
    subprocess.run(command, cwd=folder, env=environ, check=True, capture_output=True, text=True)
    (checkpoint,) = folder.glob("outputs/*/*/checkpoints/best.ckpt")
    words = [f"checkpoint={checkpoint}", "episodes=2", "--json"]
    command = [sys.executable, "-m", "pmoe_lightning.evaluate", *words]
    done = subprocess.run(command, cwd=folder, env=environ, check=True, capture_output=True, text=True)
    assert len(json.loads(done.stdout)["returns"]) == 2
