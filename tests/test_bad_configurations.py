"""Whatever is wrong with a configuration: exit code 2, one line that names the key, and nothing left behind."""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Callable, Iterator

import pytest

from pmoe_lightning.configuration.groups import group_choices
from pmoe_lightning.configuration.schemas import parameters_of, root_schema, schemas
from pmoe_lightning.limits import Limit
from pmoe_lightning.train import main

NUMBERS = ("-1", "0", "-1e-9", "1.5", "1e400", "nan", "inf", "-inf", "3000000000", "2", "1e-400")
WORDS = ("maybe", "[]", "[0]", "[a]", "{a: 1}", "'1 2'", "truee")
CHOICES = {
    "algo": ["sac", "ppo"],
    "actor": ["pmoe", "gaussian", "additive_moe", "mcp"],
    "estimator": ["frequency", "gumbel_softmax", "score_function", "half_reparameterized"],
    "data": ["off_policy", "on_policy"],
    "trainer": ["default"],
}


def limits() -> Iterator[tuple[list[str], str, Limit]]:
    """(choice that has the key, dotted key, what it may be) for every key with a declared limit."""
    for group, options in CHOICES.items():
        for option in options:
            for key, parameter in parameters_of(schemas()[group][option]).items():
                algo = {"off_policy": ["algo=sac"], "on_policy": ["algo=ppo"]}.get(option, [])
                yield algo or [f"{group}={option}"], f"{group}.{key}", parameter.limit
    for key, parameter in parameters_of(root_schema()).items():
        yield [], key, parameter.limit


def out_of_range() -> Iterator[list[str]]:
    for choice, key, limit in limits():
        for text in NUMBERS:
            number = int(text) if text.lstrip("-").isdigit() else float(text)
            if limit.numeric and not limit.accepts(number):
                yield [*choice, f"{key}={text}"]
        if not limit.text:
            yield from ([*choice, f"{key}={word}"] for word in WORDS if word not in limit.words)


def misspelt() -> Iterator[list[str]]:
    rng = random.Random(0)
    for choice, key, _ in limits():
        name = key.split(".")[-1]
        at = rng.randrange(len(name))
        wrong = rng.choice([name[:at] + "q" + name[at:], name[:at] + name[at + 1 :] + "z", name.upper()])
        yield [*choice, f"{key.removesuffix(name)}{wrong}=1"]


def unknown_options() -> Iterator[list[str]]:
    for group, options in group_choices().items():
        if group != "env":  # there any word is the id of an environment
            for option in options:
                yield from ([f"{group}={wrong}"] for wrong in (f"{option}x", option[1:], f"../{option}"))


INCOMPATIBLE = [
    ["algo=sac", "data=on_policy"],
    ["algo=ppo", "data=off_policy"],
    ["algo=dac", "data=off_policy"],
    ["algo=dac", "actor=pmoe"],
    ["algo=ppo", "actor=options"],
    ["algo=sac", "actor=options"],
    ["critic=crossq"],
    ["algo=dac", "critic=layer_norm"],
    ["algo=sac", "critic=none"],
    ["estimator=none"],
    ["algo=sac", "estimator=none"],
    ["estimator=pathwise"],
    ["estimator=pathwise", "actor.num_components=2"],
    ["estimator=score_function", "estimator.num_samples=1"],
    ["algo.minibatch_size=5000"],
    ["data.num_envs=3"],
    ["data.frames_per_epoch=100"],
    ["algo=sac", "total_frames=500"],
    ["algo=sac", "data.buffer_size=100"],
    ["algo=ppo", "safe=velocity"],
    ["algo=sac", "safe=velocity", "env.id=Pendulum-v1"],
    ["algo=sac", "env.id=Pendulum-v1", "env.velocity_limit=1"],
    ["seed=1,2"],
    ["algo.lr"],
    ["=3"],
    ["algo.lr=(1"],
    ["overrides='a"],
    ["--seed"],
    ["~callbacks.nothing"],
    ["env.id=Nothing-v0"],
    ["env.id=CartPole-v1"],
    ["env.id="],
    ["env.id=no_such_module:Env-v0"],
    ["+env.no_such_argument=1"],
]


def drawn(count: int) -> list[list[str]]:
    """``count`` of them: all incompatible ones, and the others evenly."""
    rng = random.Random(1)
    kinds = [list(kind()) for kind in (out_of_range, misspelt, unknown_options)]
    share = (count - len(INCOMPATIBLE)) // len(kinds)
    found = INCOMPATIBLE + [words for kind in kinds for words in rng.sample(kind, min(share, len(kind)))]
    rest = [words for kind in kinds for words in kind if words not in found]
    return found + rng.sample(rest, count - len(found))


@pytest.fixture
def refuse(monkeypatch, tmp_path, capfd) -> Callable[[list[str]], str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def refuse(words: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["train", *words])
        with pytest.raises(SystemExit) as ending:
            main()
        out, err = capfd.readouterr()
        assert ending.value.code == 2, (words, ending.value.code, err)
        assert not out and err.count("\n") == 1 and "Traceback" not in err, (words, out, err)
        assert os.listdir(tmp_path) == [], words
        return err

    return refuse


def check_all(refuse: Callable[[list[str]], str], cases: list[list[str]]) -> None:
    for words in cases:
        said = refuse(words)
        key = words[-1].partition("=")[0].lstrip("+~-")
        assert key.split(".")[-1].split("/")[-1] in said or words in INCOMPATIBLE, (words, said)


def test_bad_configurations_are_refused_in_one_line(refuse):
    check_all(refuse, drawn(50))


def test_a_refusal_is_one_line_where_mlflow_has_imported_lightning_under_its_other_name(refuse, caplog):
    for module in ("lightning.pytorch", "mlflow.pytorch"):  # the second imports pytorch_lightning, which then prints
        importlib.import_module(module)
    assert "Nothing-v0" in refuse(["env.id=Nothing-v0"])
    assert not caplog.messages


@pytest.mark.slow
@pytest.mark.torture
def test_five_hundred_bad_configurations_are_refused_in_one_line(refuse):
    check_all(refuse, drawn(500))


@pytest.mark.parametrize(
    "words",
    [["hydra.run.dir='two\nlines'"], ["-m", "seed=1,2", "hydra.sweep.dir='two\nlines'"]],
    ids=["run", "sweep"],
)
def test_a_folder_that_no_line_could_name_is_refused(words, train, tmp_path):
    """The lines at the end of a run are for copying: one that breaks off is another command."""
    said = train(*words, code=2)
    assert said.count("\n") == 1 and "'two\\nlines' has several lines: give the folder a name of one" in said
    assert list(tmp_path.iterdir()) == []
