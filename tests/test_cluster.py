"""Collection on a Ray cluster: what is refused, and a run that outlives one of its nodes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from tensordict import assert_close
from test_collector import POLICIES
from test_resume import LAST
from test_workers import FRAMES, alone, change_everything, trained_between
from waiting import HANG_SECONDS, wait_until

from pmoe_lightning.configuration import compose_jobs, normalise_argv, validate
from pmoe_lightning.envs import make_env
from pmoe_lightning.errors import ConfigurationError

WORDS = ["algo=sac", "env=Hopper-v5", "data=ray", "data.num_workers=3", "data.frames_per_batch=48", "callbacks=minimal"]
WORDS += ["algo.hidden_sizes=[16]", "actor.hidden_sizes=[16]", "data.batch_size=16", "data.utd_ratio=0.25"]
WORDS += ["data.init_random_frames=96", "data.frames_per_epoch=480", "total_frames=4800", "hydra.run.dir=run"]


def check(*words: str) -> None:
    (cfg,) = compose_jobs(normalise_argv(words))
    validate(cfg)


def test_a_cluster_without_workers_is_refused():
    with pytest.raises(ConfigurationError, match="^data.backend=ray .* set data.num_workers$"):
        check("algo=ppo", "data=ray")


def test_without_ray_the_extra_is_named(monkeypatch):
    check("data=ray", "data.num_workers=4")
    monkeypatch.setitem(sys.modules, "ray", None)  # how Python itself marks what cannot be imported
    with pytest.raises(ConfigurationError, match=r'needs Ray: pip install "pmoe-lightning\[ray\]"$'):
        check("data=ray", "data.num_workers=4")


@pytest.fixture
def cluster() -> Iterator:
    """Three nodes on this machine, each as if it had one core."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(**node)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def workers_of(node) -> list[int]:
    """The processes on a node that hold a collector."""
    raylet = node.all_processes["raylet"][0].process.pid
    children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
    return [int(pid) for pid in children if Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::_Actor")]


@pytest.mark.slow
def test_a_run_outlives_one_of_three_nodes(cluster, store, tmp_path, clean_environ):
    command = [sys.executable, "-m", "pmoe_lightning.train", *WORDS]
    environ = clean_environ | {"RAY_ADDRESS": cluster.address}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=environ, **pipes)
    wait_until((tmp_path / "run" / LAST).exists, process)
    assert [len(workers_of(node)) for node in cluster.list_all_nodes()] == [1, 1, 1]
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    frames = torch.load(tmp_path / "run" / LAST, weights_only=True)["policy"]["env_frames"]
    assert frames < 4800, "it was over before a node was lost"
    wait_until(lambda: sum(len(workers_of(node)) for node in cluster.list_all_nodes()) == 3, process)
    _, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, errors
    checkpoint = torch.load(tmp_path / "run" / LAST, weights_only=True)
    assert checkpoint["policy"]["env_frames"] == 4800
    (experience,) = checkpoint["experience"]
    transitions = experience["replay"]["transitions"]
    everything = torch.cat([transitions["observation"], transitions["action"]], -1)
    assert len(everything) == len(everything.unique(dim=0)) == 4800
    runs = MlflowClient(f"sqlite:///{store}").search_runs(["1"])
    assert [run.info.status for run in runs] == ["FINISHED"]


@pytest.mark.slow
def test_actors_yield_what_their_collectors_would_here_with_the_live_policy(cluster, monkeypatch):
    from pmoe_lightning.data.cluster import ClusterCollector

    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    torch.manual_seed(0)
    policy = POLICIES["sac-gated-safe"]()
    initial = {key: value.clone() for key, value in policy.state_dict().items()}
    make, train = partial(make_env, "Hopper-v5"), partial(change_everything, policy)
    sizes = {"num_workers": 2, "num_envs": 2, "frames_per_batch": 2 * FRAMES, "init_random_frames": 0, "seed": 7}
    collector = ClusterCollector(make, policy, compile=False, **sizes)
    together = trained_between(collector, train)
    experience, expected = collector.experience(), next(iter(collector))
    collector.load_experience(experience)
    assert_close(next(iter(collector)), expected, rtol=0, atol=0)  # resumed exactly
    collector.shutdown()
    for worker in range(2):
        policy.load_state_dict(initial)
        for actual, alone_here in zip(together, alone(make, policy, worker, train), strict=True):
            assert_close(actual[2 * worker : 2 * worker + 2], alone_here, rtol=0, atol=1e-5)
