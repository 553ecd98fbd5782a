"""A packaged policy behind ``mlflow models serve``: right answers for what is right, 4xx for what is not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import requests
import shapes
import torch
import uvicorn
from mlflow.pyfunc import scoring_server
from policies import make_policy
from tensordict import TensorDict
from waiting import HANG_SECONDS

from pmoe_lightning import load_policy
from pmoe_lightning.tracking.policy_model import save_policy_model

#: What is no observation of three numbers, each in the body of a request.
BAD = [
    '{"inputs": [[NaN, 0, 0]]}',
    '{"inputs": [[0, Infinity, 0]]}',
    '{"inputs": [[0, 0, -Infinity]]}',
    '{"inputs": [[1e999, 0, 0]]}',
    '{"inputs": [[1e300, 0, 0]]}',
    '{"inputs": [[null, 0, 0]]}',
    '{"inputs": [[1, 2]]}',
    '{"inputs": [[1, 2, 3, 4]]}',
    '{"inputs": [1, 2, 3]}',
    '{"inputs": [[[1, 2, 3]]]}',
    '{"inputs": [[1, 2, 3], [1, 2]]}',
    '{"inputs": []}',
    '{"inputs": [[]]}',
    '{"inputs": 5}',
    '{"inputs": "abc"}',
    '{"inputs": [["a", "b", "c"]]}',
    '{"inputs": {"observation": [[1, 2, 3]]}}',
    '{"inputs": null}',
    '{"observation": [[1, 2, 3]]}',
    "[[1, 2, 3]]",
    "null",
    "nonsense",
    "",
    '{"inputs": [[' + "9" * 400 + ", 0, 0]]}",
    '{"instances": [{"a": [1, 2, 3]}]}',
]
NOT_FINITE = BAD[:6]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a packaged policy, and its checkpoint."""
    checkpoint = make_policy("Pendulum-v1", normalize=False)[1]
    folder = tmp_path_factory.mktemp("served") / "model"
    with shapes.unchecked():
        save_policy_model(checkpoint, folder)
    return folder, checkpoint


def post(url: str, body: str) -> requests.Response:
    headers = {"Content-Type": "application/json"}
    return requests.post(f"{url}/invocations", data=body.encode(), headers=headers, timeout=HANG_SECONDS)


def check_answers(url: str, checkpoint: dict[str, Any], good: int, bad: int) -> None:
    """Ask for the actions of ``good`` observations, one at a time, and send ``bad`` requests between them."""
    observations = torch.randn(good, 3, generator=torch.Generator().manual_seed(1)) * 3
    policy = load_policy(checkpoint, rule="max_weight")
    expected = policy(TensorDict(observation=observations, batch_size=good))["action"].numpy(force=True)
    codes: Counter[int] = Counter()
    answers = []
    for row in range(good):
        answer = post(url, json.dumps({"inputs": [observations[row].tolist()]}))
        assert answer.status_code == 200, answer.text
        answers += answer.json()["predictions"]
        if row * bad // good < (row + 1) * bad // good:
            refused = post(url, BAD[row * bad // good % len(BAD)])
            codes[refused.status_code] += 1
            assert 400 <= refused.status_code < 500, refused.text
            assert "nan" not in refused.json().get("predictions", [])
    np.testing.assert_allclose(answers, expected, atol=2e-5)
    assert sum(codes.values()) == bad and set(codes) == {400}


@contextmanager
def served_in_this_process(folder: Path) -> Iterator[str]:
    """MLflow's own scoring server with the model, as ``mlflow models serve`` starts it, in a thread."""
    server = uvicorn.Server(
        uvicorn.Config(scoring_server.init(mlflow.pyfunc.load_model(str(folder))), port=0, log_level="error")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + HANG_SECONDS
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(HANG_SECONDS)


def test_a_served_policy_answers_and_refuses(model: tuple[Path, dict[str, Any]]) -> None:
    folder, checkpoint = model
    with served_in_this_process(folder) as url:
        check_answers(url, checkpoint, good=50, bad=len(BAD))
        for body in NOT_FINITE:
            assert "RuntimeError: the observation holds NaN or an infinity" in post(url, body).json()["stack_trace"]
        assert "Shape of input (1, 2) does not match expected shape (-1, 3)" in post(url, BAD[6]).json()["message"]
        many = np.random.default_rng(0).normal(size=(1_000, 3)).astype(np.float32)
        actions = post(url, json.dumps({"inputs": many.tolist()})).json()["predictions"]
        np.testing.assert_allclose(actions, load_policy(checkpoint, rule="max_weight").predict(many), atol=2e-5)


@pytest.mark.slow
def test_mlflow_models_serve(model: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The real command: 1,000 requests are answered rightly, 200 bad ones refused with 400, and none gets a 5xx."""
    folder, checkpoint = model
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mlflow_command = Path(sys.executable).with_name("mlflow")
    words = ["models", "serve", "-m", str(folder), "--env-manager", "local", "--port", str(port), "--host", "127.0.0.1"]
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([mlflow_command, *words], env=environ, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_served(url, server, tmp_path / "log")
        check_answers(url, checkpoint, good=1_000, bad=200)
    finally:
        os.killpg(server.pid, 15)
        server.wait(HANG_SECONDS)


def wait_until_served(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            if requests.get(f"{url}/ping", timeout=5).status_code == 200:
                return
        except requests.ConnectionError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())
