"""The configuration: every choice composes, every mistake is one line that names the key and what to write instead."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf

from pmoe_lightning.configuration import (
    chosen_groups,
    compose_jobs,
    describe_groups,
    describe_keys,
    normalise_argv,
    register,
    validate,
)
from pmoe_lightning.configuration.groups import group_choices
from pmoe_lightning.configuration.schemas import parameters_of, schemas
from pmoe_lightning.configuration.signatures import read_parameters
from pmoe_lightning.errors import ConfigurationError
from pmoe_lightning.hamiltonian.forces import Gated, Normalized, Raw
from pmoe_lightning.limits import stated_parameters

register()
CONF = Path(__file__).resolve().parents[1] / "conf"
SAFE = ("algo=sac", "safe=velocity")
HAMILTONIAN = ("algo=sac", "action_transform=hamiltonian_raw")


def configure(*words: str):
    """The validated configuration of a command line."""
    (cfg,) = compose_jobs(normalise_argv(words))
    validate(cfg)
    return cfg


def refusal(*words: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        configure(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- words -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["algo=sac", "seed=3"], ["algo=sac", "seed=3"]),
        (["algo=ppo", "env=", "total_frames=", "seed=", "overrides="], ["algo=ppo"]),
        (["", " ", "algo=sac"], ["algo=sac"]),
        (["overrides=actor=gaussian seed=3"], ["actor=gaussian", "seed=3"]),
        (["overrides=algo.hidden_sizes='[64, 64]' -m"], ["-m", "algo.hidden_sizes=[64, 64]"]),
        (
            ["algo=sac", "--config-dir", "mine", "~callbacks.mixture"],
            ["--config-dir", "mine", "algo=sac", "~callbacks.mixture"],
        ),
        (["--trainer.devices", "2", "--seed=4"], ["trainer.devices=2", "seed=4"]),
        (["--algo.lr", "-1"], ["algo.lr=-1"]),
        (
            ["--cfg", "job", "--multirun", "-m", "--config-dir=x"],
            ["--cfg", "job", "--multirun", "-m", "--config-dir=x"],
        ),
        (["env=Hopper-v5"], ["env.id=Hopper-v5"]),
        (["env=dm_control/cheetah-run-v0"], ["env.id=dm_control/cheetah-run-v0"]),
        (["env=gymnasium"], ["env=gymnasium"]),
        (["data=ray", "data.num_workers=2"], ["data.backend=ray", "data.num_workers=2"]),
        (["--cfg", "job", "--package", "env"], ["--cfg", "job", "--package", "env"]),
        (["env=Hopper-v5,Ant-v5"], ["env.id=Hopper-v5,Ant-v5"]),
        (["overrides=env=Hopper-v5"], ["env.id=Hopper-v5"]),
        (["algo.hidden_sizes=[64, 64]"], ["algo.hidden_sizes=[64, 64]"]),
        (["env.id="], ["env.id="]),
    ],
)
def test_command_lines_become_overrides(words, expected):
    assert normalise_argv(words) == expected


@pytest.mark.parametrize("words", [["--seed"], ["overrides=algo.lr='3"]])
def test_unreadable_command_lines_are_refused(words):
    with pytest.raises(ConfigurationError):
        normalise_argv(words)


# -- what composes -----------------------------------------------------------------------------------------------------
def test_every_option_of_every_group_composes_and_gives_each_key_of_its_schema_a_value():
    for group, options in group_choices().items():
        assert set(schemas().get(group, {})) <= set(options)
        for option in options:
            if (group, option) == ("estimator", "none"):
                continue  # for an algorithm of one's own; those of the program refuse it
            needs = {"pathwise": ["actor=gaussian"], "off_policy": ["algo=sac"], "options": ["algo=dac"]}
            needs |= dict.fromkeys(["velocity", "crossq", "layer_norm"], ["algo=sac"])
            needs["drq"] = ["algo=sac", "env.pixels.size=84"]
            words = ["algo=sac"] if option.startswith("hamiltonian") else needs.get(option, [])
            cfg = configure(f"{group}={option}", *words)
            schema = schemas().get(group, {}).get(option)
            if schema is not None:
                node = cfg[group][option] if group == "callbacks" else cfg[group]
                assert set(node) == {field.name for field in dataclasses.fields(schema)}
                assert not any(OmegaConf.is_missing(node, key) for key in node)


def test_every_combination_of_algorithm_actor_and_estimator_composes():
    for algo in group_choices()["algo"]:
        for actor in ["options"] if algo == "dac" else set(group_choices()["actor"]) - {"options"}:
            for estimator in set(group_choices()["estimator"]) - {"pathwise", "none"}:
                configure(f"algo={algo}", f"actor={actor}", f"estimator={estimator}", "debug=default")


def test_the_algorithm_brings_its_data_its_frames_and_its_networks():
    ppo, sac = configure("algo=ppo"), configure("algo=sac")
    assert ppo.data._target_.endswith("OnPolicyData") and sac.data._target_.endswith("OffPolicyData")
    assert ppo.total_frames == ppo.algo.suggests.total_frames != sac.total_frames
    assert list(ppo.actor.hidden_sizes) == [64, 64] and list(sac.actor.hidden_sizes) == [256, 256]
    assert (ppo.actor.activation, sac.actor.activation) == ("tanh", "relu")
    assert (ppo.actor.scale, sac.actor.scale) == ("state_independent", "state_dependent")
    assert configure("algo=sac", "data.batch_size=64").data.batch_size == 64
    assert configure("algo=dac").actor._target_.endswith("make_option_actor")


def test_a_value_of_the_actor_alone_leaves_the_critics():
    cfg = configure("actor.hidden_sizes=[32]")
    assert list(cfg.actor.hidden_sizes) == [32] and list(cfg.algo.hidden_sizes) == [64, 64]


def test_one_learning_rate_or_three():
    assert configure("algo=sac", "algo.lr=1e-3").algo.lr_alpha == 1e-3
    cfg = configure("algo=sac", "algo.lr_qvalue=1e-3")
    assert (cfg.algo.lr_actor, cfg.algo.lr_qvalue) == (3e-4, 1e-3)


def test_the_critic_brings_what_goes_with_it_and_a_word_wins():
    plain, crossq = configure("algo=sac"), configure("algo=sac", "critic=crossq")
    for cfg, expected in ((plain, (3e-4, [0.9, 0.999], 1)), (crossq, (1e-3, [0.5, 0.999], 3))):
        assert (cfg.algo.lr_alpha, list(cfg.algo.betas), cfg.algo.policy_delay) == expected
    own = configure("algo=sac", "critic=crossq", "algo.lr=2e-4", "algo.policy_delay=2", "critic.hidden_sizes=[512]")
    assert (own.algo.lr_qvalue, list(own.algo.betas), own.algo.policy_delay) == (2e-4, [0.5, 0.999], 2)
    assert list(own.critic.hidden_sizes) == [512] and list(own.actor.hidden_sizes) == [256, 256]
    assert configure("experiment=sac_2018").critic == plain.critic == configure("experiment=paper").critic
    assert not configure("algo=ppo").critic and configure("algo=ppo", "critic=plain")


@pytest.mark.parametrize("words", [["env=Walker2d-v5"], ["env.id=Walker2d-v5"], ["--env", "Walker2d-v5"]])
def test_any_environment_id_is_accepted_without_a_file(words):
    assert configure(*words).env.id == "Walker2d-v5"


def test_arguments_of_the_environment_can_be_added():
    assert configure("+env.forward_reward_weight=2.0").env.forward_reward_weight == 2.0


def test_callbacks_can_be_dropped():
    assert "mixture" not in configure("~callbacks.mixture").callbacks
    assert set(configure("debug=default", "callbacks=minimal").callbacks) == {
        "nonfinite",
        "metrics",
        "progress",
        "checkpoint_last",
    }


def test_the_paper_preset():
    cfg = configure("experiment=paper")
    assert (cfg.actor.num_components, cfg.actor.router, cfg.actor.deterministic) == (4, "detached", "sample_component")
    estimator = cfg.estimator
    switches = (estimator.backpropagate, estimator.log_prob, estimator.reduction, estimator.rank_by)
    assert switches == ("max", "component", "mean", "q")
    assert (list(cfg.actor.hidden_sizes), cfg.actor.activation) == ([256, 256], "relu")
    assert (cfg.algo.lr, cfg.algo.gamma, cfg.algo.tau) == (3e-4, 0.99, 5e-3)
    assert (cfg.data.batch_size, cfg.data.buffer_size, cfg.data.init_random_frames) == (256, 1_000_000, 1000)


@pytest.mark.parametrize("algo", ["sac", "ppo"])
def test_the_peer_settings_only_train(algo):
    cfg = configure(f"experiment=peers_{algo}", "actor=gaussian", "total_frames=50000")
    assert cfg.algo._target_.endswith(algo)
    assert set(cfg.callbacks) == {"nonfinite", "metrics", "progress", "checkpoint_last"}


def test_a_sweep_is_one_configuration_per_combination():
    jobs = compose_jobs(["algo=ppo,sac", "seed=1,2,3", "env.id=Pendulum-v1"], multirun=True)
    assert sorted((cfg.algo._target_[-3:], cfg.seed) for cfg in jobs) == [
        (algo, seed) for algo in ("ppo", "sac") for seed in (1, 2, 3)
    ]
    assert {cfg.env.id for cfg in jobs} == {"Pendulum-v1"}


def test_groups_of_the_user_are_found(tmp_path):
    (tmp_path / "actor").mkdir()
    (tmp_path / "actor" / "mine.yaml").write_text("defaults: [pmoe, _self_]\nnum_components: 7\n")
    (cfg,) = compose_jobs(["actor=mine"], config_dir=str(tmp_path))
    assert cfg.actor.num_components == 7


def test_help_lists_every_option():
    text = describe_groups()
    assert all(option in text for options in group_choices().values() for option in options)


def test_the_help_of_a_choice_says_what_each_of_its_keys_is_and_may_be():
    (cfg,) = compose_jobs(["algo=sac", "estimator=frequency", "estimator.weight=0.5", "logger=none"])
    said = describe_keys(cfg, "estimator").splitlines()
    assert said[0] == "estimator: pmoe_lightning.estimators.Frequency"
    assert said[-2:] == ["  estimator.weight=0.5", "      a finite number >= 0: factor of the frequency loss."]
    assert "algo.lr_actor=0.0003\n      a finite number > 0 or null: that of one group" in describe_keys(cfg, "algo")
    assert "  callbacks.metrics.every_frames=" in describe_keys(cfg, "callbacks")
    assert describe_keys(cfg, "logger") == "logger: nothing can be set"
    assert chosen_groups(["algo=sac", "debug=default", "algo.lr=1", "algo=ppo"]) == ["algo"]


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "message"),
    [
        # unknown keys and options
        (["algo.gama=0.9"], "unknown key algo.gama; did you mean algo.gamma?"),
        (["gamma=0.9"], "unknown key gamma; did you mean algo.gamma?"),
        (["totl_frames=3"], "unknown key totl_frames; did you mean total_frames?"),
        (["algorithm=sac"], "unknown key algorithm; did you mean algo?"),
        (["callbacks.evaluation.episods=3"], "did you mean callbacks.evaluation.episodes?"),
        (["+algo.gama=0.9"], "unknown key algo.gama; did you mean algo.gamma?"),
        (["env.forward=3"], "+env.forward=..."),
        (["xyz=1"], "unknown key xyz"),
        (["actor=gaussian", "actor.num_components=4"], "actor=gaussian has no num_components, actor=pmoe has"),
        (["data.batch_size=64"], "the chosen data has no batch_size, data=off_policy has"),
        (["algo=sca"], "algo=sca is not one of dac, ppo, sac; did you mean sac?"),
        (["critic=crossq"], "critic=... chooses the critics of sac; those of ppo are plain"),
        (["algo=dac", "critic=layer_norm"], "those of dac are plain, of the sizes algo.hidden_sizes: use algo=sac"),
        (["critic=plain", "critic.hidden_sizes=[8]"], "those of ppo are plain"),
        (["algo=sac", "critic=none"], "algo=sac learns from critics: use critic=plain"),
        (["algo=sac", "algo.betas=[0.9]"], "algo.betas=[0.9] must be two numbers"),
        (
            ["algo=sac", "algo.betas=[0.9,1]"],
            "algo.betas=[0.9,1.0] must be a list, each element a finite number >= 0 and < 1",
        ),
        (["algo=sac", "critic=crossq", "critic.momentum=1"], "critic.momentum=1"),
        (["estimator=frequenzy"], "did you mean frequency?"),
        (["experiment=papr"], "did you mean paper?"),
        # wrong types
        (["seed=abc"], "seed: Value 'abc'"),
        (["algo.lr=abc"], "algo.lr: Value 'abc'"),
        (["algo.lr="], "algo.lr"),
        (["total_frames=1e5"], "write 100000"),
        (["total_frames=1.5"], "total_frames"),
        (["data.normalize_reward=maybe"], "data.normalize_reward"),
        (["algo.hidden_sizes=64"], "algo.hidden_sizes"),
        (["env.id=3"], "env.id=3"),
        (["seed"], "write key=value"),
        (["seed=1,2"], "--multirun"),
        (["resume=run,other"], "resume=run,other has several values: resume continues one run"),
        (["~seed"], "~seed leaves out what every run needs: choose a value, seed=..."),
        (["~algo"], "~algo leaves out"),
        (["~env"], "~env leaves out"),
        (["~algo.lr=1e-3"], "~algo.lr=1e-3 leaves out"),
        (["hydra.run.dir=it's here"], r"quotes of its own, hydra.run.dir='it\'s here'"),
        (["debug=null"], "NoneType"),
        # values out of range
        (["algo.lr=-1"], "algo.lr=-1.0 must be a finite number > 0"),
        (["algo.lr=0"], "algo.lr=0.0"),
        (["algo.lr=nan"], "algo.lr=nan must be a finite number > 0"),
        (["algo.target_kl=inf"], "algo.target_kl=inf"),
        (["algo.gamma=1.01"], "algo.gamma=1.01 must be a finite number >= 0 and <= 1"),
        (["seed=-1"], "seed=-1"),
        (["total_frames=0"], "total_frames=0"),
        (["actor.num_components=0"], "actor.num_components=0"),
        (["algo.hidden_sizes=[]"], "algo.hidden_sizes=[] must be a list"),
        (["algo.hidden_sizes=[64,-1]"], "algo.hidden_sizes=[64,-1]"),
        (["estimator=frequency", "estimator.weight=-0.5"], "estimator.weight=-0.5"),
        (["trainer.devices=0"], "trainer.devices=0"),
        (["trainer.strategy=fsdp"], "trainer.strategy=fsdp must be one of auto, ddp"),
        (["compile=yes"], "compile=yes must be true, false or 'auto'"),
        (["matmul_precision=bf16"], "matmul_precision=bf16 must be one of float32, float32-onednn, bf16-hidden, tf32"),
        (["+env.reset_noise_scale=nan"], "env.reset_noise_scale=nan"),
        (["actor.router=detatched"], "must be one of detached, attached"),
        # pairs
        (["callbacks=minimal", "+callbacks.evaluation.episodes=3"], "callbacks.evaluation has no _target_"),
        (["estimator=score_function", "estimator.num_samples=1"], "baseline=leave_one_out needs estimator.num_samples"),
        (["estimator=half_reparameterized", "estimator.baseline=median"], "must be one of none, mean, leave_one_out"),
        (["estimator=gumbel_softmax", "estimator.temperature=0"], "estimator.temperature=0"),
        (["estimator=pathwise"], "actor.num_components=4: use actor=gaussian"),
        (["algo.minibatch_size=4096"], "must not exceed data.frames_per_batch=2048"),
        (["data.num_envs=3"], "must be a multiple of data.num_envs=3"),
        (["data.frames_per_epoch=100"], "data.frames_per_epoch=100"),
        (["algo=sac", "data=on_policy"], "use data=off_policy"),
        (["algo=ppo", "data=off_policy"], "use data=on_policy"),
        (["algo=dac", "data=off_policy"], "algo=dac learns from fresh rollouts: use data=on_policy"),
        (["algo=dac", "algo.minibatch_size=4096"], "must not exceed data.frames_per_batch=2048"),
        (["algo=dac", "actor=pmoe"], "algo=dac learns options: use actor=options"),
        (["algo=ppo", "actor=options"], "actor=options is learnt by algo=dac alone: use algo=dac or another actor"),
        (["algo=sac", "actor=options"], "actor=options is learnt by algo=dac alone"),
        (["algo=dac", "actor.num_options=1"], "actor.num_options=1"),
        (["algo=ppo", "action_transform=hamiltonian_raw"], "use algo=sac or action_transform=none"),
        (["algo=dac", "action_transform=hamiltonian_gated"], "use algo=sac or action_transform=none"),
        (
            ["algo=sac", "action_transform=hamiltonian_raw", "action_transform.magnitude=2"],
            "action_transform.magnitude",
        ),
        (
            ["algo=sac", "action_transform=hamiltonian_raw", "action_transform.step_size=0"],
            "action_transform.step_size=0",
        ),
        (["algo=sac", "action_transform=hamiltonian_raw", "action_transform.used_in=[eval]"], "must be a list"),
        (
            ["algo=sac", "action_transform=hamiltonian_gated", "action_transform.used_in=[acting]"],
            "add actor_loss to its used_in",
        ),
        (
            ["algo=sac", "action_transform=hamiltonian_raw", "action_transform.learn_step_size=true"],
            "needs action_transform=hamiltonian_normalized or hamiltonian_gated",
        ),
        (
            [*HAMILTONIAN, "action_transform.metropolis=true", "action_transform.temperature=2"],
            "needs action_transform.temperature=1, not 2.0",
        ),
        (["algo=ppo", "safe=velocity"], "use algo=sac or safe=none"),
        (["algo=dac", "safe=velocity"], "use algo=sac or safe=none"),
        ([*SAFE, "env.velocity_limit=null"], "safe=velocity needs env.velocity_limit: a number in m/s, or published"),
        ([*SAFE, "safe.gamma=1"], "safe.gamma=1.0 must be a finite number >= 0 and < 1"),
        ([*SAFE, "safe.cost_limit=-1"], "safe.cost_limit=-1.0 must be a finite number >= 0"),
        ([*SAFE, "safe.num_candidates=0"], "safe.num_candidates=0"),
        ([*SAFE, "safe.candidates=4"], "safe.num_candidates"),
        (["algo=sac", "total_frames=500"], "data.init_random_frames=1000"),
        (["algo=sac", "data.buffer_size=500"], "data.buffer_size=500"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_named(words, message):
    assert message in refusal(*words)


def test_a_mistake_in_one_job_of_a_sweep_is_found():
    jobs = compose_jobs(["algo.lr=1e-3,nan"], multirun=True)
    validate(jobs[0])
    with pytest.raises(ConfigurationError, match="algo.lr=nan"):
        validate(jobs[1])


def test_a_mistake_in_a_file_of_the_user_is_named(tmp_path):
    (tmp_path / "algo").mkdir()
    for line, message in [("gama: 0.9", "gama"), ("gamma: high", "gamma")]:
        (tmp_path / "algo" / "mine.yaml").write_text(f"defaults: [ppo, _self_]\n{line}\n")
        with pytest.raises(ConfigurationError, match=message):
            validate(*compose_jobs(["algo=mine"], config_dir=str(tmp_path)))


# -- defaults ----------------------------------------------------------------------------------------------------------
def files() -> Iterator[tuple[str, str, dict[str, Any], type]]:
    """Name, text, the part with ``_target_`` and the schema of every file of ``conf/`` that has one."""
    for group, choices in schemas().items():
        for choice, schema in choices.items():
            text = (CONF / group / f"{choice}.yaml").read_text()
            written = yaml.safe_load(text)
            yield f"{group}/{choice}", text, next(p for p in (written, *written.values()) if "_target_" in p), schema


def test_a_signature_read_from_its_source_is_the_one_that_python_sees():
    compared = 0
    for name, _, written, _ in files():
        target = written["_target_"]
        if target.startswith("pmoe_lightning."):
            read = {key: stated._replace(meaning="") for key, stated in read_parameters(target).items()}
            assert read == stated_parameters(get_object(target)), name
            compared += len(read)
    assert compared > 130


def test_a_file_repeats_no_default_and_names_every_key():
    for name, text, written, schema in files():
        for field in dataclasses.fields(schema):
            assert re.search(rf"\b{field.name}\b", text), f"conf/{name}.yaml does not name {field.name}"
            if field.name in written and field.name != "force":  # which tells the files of its group apart
                assert written[field.name] != field.default, f"conf/{name}.yaml repeats the default of {field.name}"


def test_every_key_has_a_meaning_for_the_help():
    for name, _, written, schema in files():
        for key, parameter in parameters_of(schema).items():
            assert written["_target_"].startswith("lightning.") or parameter.meaning, f"{name}: {key}"


def test_the_step_size_of_each_force_is_its_own():
    for force in (Raw, Normalized, Gated):
        choice = f"action_transform=hamiltonian_{force.__name__.lower()}"
        assert configure("algo=sac", choice).action_transform.step_size == force.step_size


@pytest.mark.parametrize("former", ["actors.make_pmoe_actor", "options.make_option_actor", "safety.CostConstraint"])
def test_a_target_written_before_the_modules_had_rooms_is_found(former):
    public = get_object(f"pmoe_lightning.{former.split('.')[1]}")
    assert get_object(f"pmoe_lightning.{former}") is public


@pytest.mark.parametrize(
    ("words", "estimator"),
    [
        ([], "Marginalized"),
        (["algo=ppo"], "Marginalized"),
        (["estimator=frequency"], "Frequency"),
        (["algo=sac"], "Frequency"),
        (["experiment=paper"], "Frequency"),
        (["experiment=pendulum_ppo"], "Marginalized"),
        (["experiment=pendulum_ppo", "estimator=implicit"], "Implicit"),
    ],
)
def test_an_algorithm_brings_its_estimator_and_whoever_names_one_wins(words, estimator):
    (cfg,) = compose_jobs(words)
    assert cfg.estimator._target_ == f"pmoe_lightning.estimators.{estimator}"


def test_an_experiment_of_ones_own_chooses_the_estimator_of_ppo(tmp_path):
    (tmp_path / "experiment").mkdir()
    chosen = "# @package _global_\ndefaults:\n  - override /algo: ppo\n  - override /estimator: frequency\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(chosen)
    (cfg,) = compose_jobs(["experiment=mine"], config_dir=str(tmp_path))
    assert cfg.estimator._target_ == "pmoe_lightning.estimators.Frequency"
