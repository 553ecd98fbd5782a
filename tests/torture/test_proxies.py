"""A hundred random proxies between a run and its server: every point once, every file, the right status, one model.

Each case is a whole training run whose requests meet errors of every kind, other programs' pages, hangs, resets and
answers that are cut or lost, each for a random span and with peace between. Where it cannot start it is started again,
as a batch system would; what it could not deliver is sent by ``resend``. Compared with a run without a proxy.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import pytest
from cells import cell
from forked import SMALL, TINY, fork, run, wait, warm_up
from mlflow import MlflowClient
from proxies import Proxy
from test_outage import Server

pytestmark = pytest.mark.torture

CASES, GROUP = 100, 10
LONGEST_SPANS = (0.3, 1.0, 3.0)  # seconds, chosen by case
STARTS = 60
# A hang lasts as long as its span; the program's patience with one request is made short, so that many are met.
ENVIRON = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}
CALLBACKS = "callbacks=[nonfinite,metrics,evaluation,checkpoint_last,checkpoint_best,learning_curve,final_policy]"
WORDS = [
    "env=Pendulum-v1",
    *SMALL,
    CALLBACKS,
    "callbacks.final_policy.video=false",
    "callbacks.metrics.every_frames=32",
]
WORDS += ["callbacks.evaluation.episodes=1", "logger.flush_seconds=0.2", "data.frames_per_epoch=512"]


def words(algo: str, uri: str, folder: str) -> list[str]:
    return [*TINY[algo], *WORDS, "total_frames=2048", f"logger.tracking_uri={uri}", f"hydra.run.dir={folder}"]


def stand_between(proxy: Proxy, seed: int, longest: float, shared: Any) -> None:
    """In a child: trouble until the parent says peace, then pass everything on until killed."""
    with proxy:
        end = proxy.troubled(random.Random(seed), longest)
        while not shared[0]:
            shared[1] = proxy.met
            time.sleep(0.02)
        end()
        shared[0] = 2
        signal.pause()


def arrived(server: Server, run_id: str) -> dict[str, Any]:
    """What the server has of a run, but for what differs from run to run."""
    client = MlflowClient(server.uri)
    found = client.get_run(run_id)
    points = [(name, point.step) for name in found.data.metrics for point in client.get_metric_history(run_id, name)]
    assert len(points) == len(set(points)), "a point was sent twice"
    folders = ("", "checkpoints", "figures")
    models = client.search_logged_models([found.info.experiment_id], f"source_run_id = '{run_id}'")
    return {
        "status": found.info.status,
        "points": sorted(points),
        "files": sorted(file.path for folder in folders for file in client.list_artifacts(run_id, folder)),
        "params": sorted(found.data.params.keys()),
        "tags": sorted(tag for tag in found.data.tags if not tag.startswith("mlflow.")),
        "models": [(model.name, str(model.status)) for model in models],
    }


def run_behind_a_proxy(server: Server, folder: Path, algo: str, seed: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Train behind the proxy of this seed; what has arrived, and what it took."""
    proxy, shared, folder = Proxy(server.port), RawArray("l", 2), folder / str(seed)
    folder.mkdir()
    longest = LONGEST_SPANS[seed % len(LONGEST_SPANS)]
    between = fork(lambda: stand_between(proxy, seed, longest, shared), folder / "proxy.txt")
    try:
        starts = 1
        while run([*words(algo, proxy.uri, "run"), "resume=auto"], folder, environ=ENVIRON) != 0:
            starts += 1
            assert starts < STARTS, (folder / "log.txt").read_text()[-3000:]
        log = (folder / "log.txt").read_text()
        assert "Traceback" not in log, log[-3000:]
        met, shared[0] = shared[1], 1
        while shared[0] != 2:
            time.sleep(0.02)
        left = list(folder.rglob("*.entry"))
        assert bool(left) == ("pmoe_lightning.tracking.resend" in log[-1000:]), log[-3000:]
        resend = subprocess.run(
            [sys.executable, "-m", "pmoe_lightning.tracking.resend", str(folder)], capture_output=True, text=True
        )
        assert resend.returncode == 0, f"seed {seed}: {resend.stderr}{resend.stdout}"
        assert not list(folder.rglob("mlflow-spool*")), "something is set aside or left"
    finally:
        os.kill(between, signal.SIGKILL)
        wait(between)
        proxy.__exit__(None, None, None)
    started = MlflowClient(server.uri).search_runs(["1"], f"tags.output_dir LIKE '%{folder}/run'")
    finished = [found for found in started if found.info.status == "FINISHED"]
    assert len(finished) == 1, [found.info.status for found in started]
    return arrived(server, finished[0].info.run_id), {"starts": starts, "met": met, "sent_later": len(left)}


def measure(folder: Path, store: Path, group: int) -> dict[str, Any]:
    warm_up()
    server, figures = Server(folder, store), {"cases": 0, "requests_met": 0, "starts": 0, "entries_sent_later": 0}
    try:
        expected = {}
        for algo in TINY:
            starts = iter(range(STARTS))  # a server that has hardly a processor may not answer the first
            while run(words(algo, server.uri, f"plain-{algo}"), folder) != 0:
                said = (folder / "log.txt").read_text()
                assert "does not answer" in said and next(starts, None) is not None, said[-3000:]
            (plain,) = MlflowClient(server.uri).search_runs(["1"], f"tags.output_dir LIKE '%plain-{algo}'")
            expected[algo] = arrived(server, plain.info.run_id)
            assert expected[algo]["models"] and len(expected[algo]["points"]) > 200
        for seed in range(group * GROUP, (group + 1) * GROUP):
            algo = list(TINY)[seed % len(TINY)]
            found, taken = run_behind_a_proxy(server, folder, algo, seed)
            differing = [key for key in found if found[key] != expected[algo][key]]
            assert not differing, f"seed {seed}: {[(key, found[key], expected[algo][key]) for key in differing]}"
            figures["cases"] += 1
            figures["requests_met"] += taken["met"]
            figures["starts"] += taken["starts"]
            figures["entries_sent_later"] += taken["sent_later"]
        statuses = [found.info.status for found in MlflowClient(server.uri).search_runs(["1"])]
    finally:
        server.kill()
    return figures | {"points_per_run": len(expected["ppo"]["points"]), "runs_left_running": statuses.count("RUNNING")}


@pytest.mark.parametrize("group", range(CASES // GROUP))
def test_random_proxies_cost_nothing(group, tmp_path, empty_store):
    figures = cell(f"proxies-{group}", partial(measure, tmp_path, empty_store, group))
    assert figures["cases"] == GROUP and figures["runs_left_running"] == 0
    assert figures["requests_met"] > 10 * GROUP
