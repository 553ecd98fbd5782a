"""A user's own parts, in a package and a ``--config-dir`` of theirs, go through every command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import shapes
import torch
from mlflow.tracking import MlflowClient
from tensordict import TensorDict

from pmoe_lightning import load_policy
from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.configuration import normalise_argv
from pmoe_lightning.errors import RunError
from pmoe_lightning.evaluate import main as evaluate
from pmoe_lightning.export import main as export
from pmoe_lightning.exporting import policy_file

PACKAGE = '''
"""Parts of a user's own."""
import torch
from lightning.pytorch import Callback
from torch import nn
from pmoe_lightning import Marginalized, make_hamiltonian_transform, make_layer_norm_network, make_pmoe_actor
from pmoe_lightning.algorithms import make_sac
from pmoe_lightning.envs import make_env


class Doubling(nn.Module):
    def __init__(self, network, first):
        super().__init__()
        self.network, self.first, self.num_components = network, first, network.num_components

    def forward(self, observation):
        return self.network(self.first(observation).tanh())


def make_doubling_actor(*, observation_dim, action_low, action_high, width, scale_of_first, **arguments):
    actor = make_pmoe_actor(width, action_low, action_high, num_components=2, hidden_sizes=[8], **arguments)
    first = nn.Linear(observation_dim, width)
    first.weight.data *= scale_of_first
    actor[0].module = Doubling(actor[0].module, first)
    return actor


class MyEstimator(Marginalized):
    pass


def make_my_sac(actor, estimator, **arguments):
    return make_sac(actor, estimator, **arguments)


def make_my_critic(observation_dim, action_dim, **arguments):
    critic = make_layer_norm_network(observation_dim, action_dim, **arguments)
    critic.module.norms[0].weight.data *= 2
    return critic


def make_my_transform(*, strength, **arguments):
    return make_hamiltonian_transform(force="normalized", magnitude=strength, **arguments)


def make_short_env(id, steps, **arguments):
    return make_env(id, max_episode_steps=steps, **arguments)


class Counter(Callback):
    def on_train_end(self, trainer, pl_module):
        print("counted", pl_module.updates)
'''
FILES = {
    "actor/mine": "_target_: own_package.make_doubling_actor\nwidth: 5\nscale_of_first: 0.5\n",
    "env/other": "_target_: own_package.make_short_env\n_partial_: true\nid: Pendulum-v1\nsteps: 20\n",
    "estimator/mine": "_target_: own_package.MyEstimator\n",
    "algo/mine": "defaults: [sac, _self_]\n_target_: own_package.make_my_sac\nhidden_sizes: [8]\n",
    "critic/mine": "defaults: [plain, _self_]\n_target_: own_package.make_my_critic\nhidden_sizes: [6]\n",
    "action_transform/mine": "_target_: own_package.make_my_transform\nstrength: 2.0\nused_in: [acting, actor_loss]\n",
    "callbacks/counter": "counter:\n  _target_: own_package.Counter\n",
    "actor/seven": "defaults: [pmoe, _self_]\nnum_components: 7\n",
}
SHORT = ["total_frames=96", "data.init_random_frames=32", "data.batch_size=8", "data.frames_per_epoch=48"]
SHORT += ["callbacks.evaluation.episodes=1", "hydra.run.dir=run"]
LAST = Path("run", "checkpoints", "last.ckpt")


@pytest.fixture
def mine(tmp_path, monkeypatch) -> str:
    """The ``--config-dir`` of a user whose package can be imported."""
    for name, text in FILES.items():
        file = tmp_path / "my conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "own_package.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_package", raising=False)
    return str(tmp_path / "my conf")


def acts(policy) -> torch.Tensor:
    return policy(TensorDict(observation=torch.tensor([[0.1, 0.2, 0.3]]), batch_size=1))["action"].detach()


def test_parts_of_ones_own_go_through_every_command(mine, train, tmp_path, store, capfd, monkeypatch):
    monkeypatch.setattr(policy_file, "OBSERVATIONS", 320)
    chosen = ["algo=mine", "actor=mine", "estimator=mine", "critic=mine", "env=other"]
    callbacks = ["callbacks=[evaluation,checkpoint_last,final_policy,counter]", "callbacks.final_policy.video=false"]
    words = ["--config-dir", mine, *chosen, *callbacks, *SHORT]
    said = train(*words)
    assert "counted 64" in said and "was not packaged" not in said
    assert said.count(f"--config-dir '{mine}'") == 2, "in the lines that resume and evaluate"

    with pytest.raises(RunError, match="unknown actor 'mine'.*--config-dir that holds actor/mine.yaml, or load_policy"):
        load_policy(LAST)
    own = sys.modules["own_package"]
    policy = load_policy(LAST, parts={"actor/mine": own.make_doubling_actor, "critic/mine": own.make_my_critic})
    client = MlflowClient(f"sqlite:///{store}")
    mlflow.set_tracking_uri(f"sqlite:///{store}")
    (model,) = client.search_logged_models(["1"])
    packaged = mlflow.pyfunc.load_model(f"models:/{model.model_id}").predict(np.array([[0.1, 0.2, 0.3]], np.float32))
    torch.testing.assert_close(torch.as_tensor(packaged), acts(policy))

    capfd.readouterr()
    assert evaluate(["--config-dir", mine, f"checkpoint={LAST}", "episodes=2", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["env"], result["lengths"]) == ("Pendulum-v1", [20, 20])
    assert evaluate([f"checkpoint={LAST}", "episodes=1"]) == 1
    line = capfd.readouterr().err
    assert line.count("\n") == 1 and "unknown actor 'mine'" in line

    with shapes.unchecked():  # which torch.export traces
        assert export(["--config-dir", mine, f"checkpoint={LAST}", "format=pt2", "rule=max_weight"]) == 0
    exported = torch.export.load("policy.pt2").module()({"observation": torch.tensor([[0.1, 0.2, 0.3]])})["action"]
    both = {"actor/mine": own.make_doubling_actor, "critic/mine": own.make_my_critic}
    torch.testing.assert_close(exported, acts(load_policy(LAST, parts=both, rule="max_weight")), atol=2e-5, rtol=0)
    assert "its episodes in Pendulum-v1" in capfd.readouterr().out

    train(*words[:-1], "total_frames=144", "resume=run")
    assert read_checkpoint(LAST)["policy"]["env_frames"] == 144


def test_a_force_of_ones_own_is_acted_with_again(mine, train, tmp_path, capfd):
    chosen = ["algo=sac", "algo.hidden_sizes=[8]", "env=other", "action_transform=mine", "logger=none"]
    train("--config-dir", mine, *chosen, "callbacks=[evaluation,checkpoint_last]", *SHORT)
    with pytest.raises(RunError, match="unknown action_transform 'mine'"):
        load_policy(LAST)
    assert evaluate(["--config-dir", mine, f"checkpoint={LAST}", "episodes=1"]) == 0
    assert evaluate([f"--config-dir={tmp_path / 'nowhere'}", f"checkpoint={LAST}"]) == 2
    assert "is not a folder" in capfd.readouterr().err


def test_options_that_only_set_values_need_no_folder_later(mine, train, capfd):
    chosen = ["algo=mine", "actor=seven", "env=Pendulum-v1", "logger=none"]
    train("--config-dir", mine, *chosen, "callbacks=[checkpoint_last]", *SHORT[:-2], "hydra.run.dir=run")
    assert load_policy(LAST, rule="max_weight").actor[0].module.num_components == 7
    capfd.readouterr()
    assert evaluate([f"checkpoint={LAST}", "episodes=2", "--json", "env=other", "--config-dir", mine]) == 0
    assert json.loads(capfd.readouterr().out)["lengths"] == [20, 20]


def test_an_environment_of_the_users_folder_is_an_option_and_others_are_ids(mine):
    for flags in (["--config-dir", mine], [f"--config-dir={mine}"], ["-cd", mine]):
        assert normalise_argv([*flags, "env=other"])[-1] == "env=other"
        assert normalise_argv(["env=other", *flags])[-1] == "env=other"
        assert normalise_argv([*flags, "env=Hopper-v5"])[-1] == "env.id=Hopper-v5"
    assert normalise_argv(["env=other"]) == ["env.id=other"]
