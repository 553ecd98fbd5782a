"""Checkpoints: never half-written, never executed, and the policy in them acts as it did."""

from __future__ import annotations

import hashlib
import os
import pickle
import resource
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from policies import make_policy, make_sac_policy
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type
from waiting import HANG_SECONDS

from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.checkpoints.files import previous_checkpoint, write_checkpoint
from pmoe_lightning.checkpoints.io import AtomicCheckpointIO
from pmoe_lightning.errors import RunError
from pmoe_lightning.modules.critics import make_qvalue_network
from pmoe_lightning.tracking.references import load_policy, resolve_checkpoint


def act(policy: Any, observation: torch.Tensor, mode: ExplorationType | None = None) -> torch.Tensor:
    tensordict = TensorDict(observation=observation, batch_size=observation.shape[:-1])
    if mode is None:
        return policy(tensordict)["action"].detach()
    with set_exploration_type(mode):
        return policy(tensordict)["action"].detach()


# ------------------------------------------------------------------ the policy


@pytest.mark.parametrize(
    ("actor", "normalize", "arguments"),
    [
        ("pmoe", True, {"num_components": 3, "activation": "tanh", "scale": "state_independent"}),
        ("pmoe", False, {"num_components": 4, "router": "attached", "initialization": "orthogonal"}),
        ("pmoe", True, {"return_log_prob": True}),
        ("gaussian", False, {}),
        ("additive_moe", False, {"num_experts": 3}),
        ("mcp", True, {"num_experts": 2}),
        ("latent", True, {"latent_dim": 3}),
        ("flow", False, {"num_transforms": 1}),
    ],
)
def test_loaded_policy_acts_as_the_saved_one(tmp_path: Path, actor: str, normalize: bool, arguments: dict) -> None:
    policy, checkpoint = make_policy(actor=actor, normalize=normalize, **arguments)
    write_checkpoint(checkpoint, tmp_path / "p.ckpt")
    loaded = load_policy(tmp_path / "p.ckpt")
    observation = torch.randn(4, 5, 3) * 3
    assert not loaded.training
    # Without a context the loaded policy is deterministic; a context rules.
    torch.testing.assert_close(
        act(loaded, observation), act(policy, observation, ExplorationType.DETERMINISTIC), rtol=0, atol=0
    )
    torch.manual_seed(1)
    expected = act(policy, observation, ExplorationType.RANDOM)
    torch.manual_seed(1)
    torch.testing.assert_close(act(loaded, observation, ExplorationType.RANDOM), expected, rtol=0, atol=0)


def test_rule_replaces_the_trained_one() -> None:
    _, checkpoint = make_policy(normalize=False, num_components=8, deterministic="max_weight")
    observation = torch.zeros(200, 3)
    assert act(load_policy(checkpoint), observation).unique().numel() == 1
    # The same observation everywhere: a drawn component gives several actions, but never more than components.
    drawn = act(load_policy(checkpoint, rule="sample_component"), observation).unique().numel()
    assert 1 < drawn <= 8


VARIANTS = [(actor, "best_value") for actor in ("gaussian", "pmoe", "additive_moe", "mcp")]
VARIANTS += [("pmoe", rule) for rule in ("max_weight", "mean", "sample_component")]


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("force", [None, "raw"])
@pytest.mark.parametrize(("actor", "rule"), VARIANTS)
def test_a_loaded_policy_explores_as_it_did_in_training_whatever_its_rule(
    actor: str, rule: str, force: str | None, safe: bool
) -> None:
    algorithm, checkpoint = make_sac_policy(actor, rule=rule, force=force, safe=safe)
    observation, draws = torch.randn(1, 11).expand(200, 11), []
    for policy in (algorithm.policy, loaded := load_policy(checkpoint, rule=rule)):
        torch.manual_seed(1)
        draws.append(act(policy, observation, ExplorationType.RANDOM))
    torch.testing.assert_close(*draws, rtol=0, atol=0)
    # One observation, 200 draws: every one is another. A rule chooses among four components.
    assert len(draws[1].unique(dim=0)) == 200
    chosen = len(act(loaded, observation).round(decimals=4).unique(dim=0))
    assert safe or chosen == 1 or (rule == "sample_component" and chosen <= 4)
    mixture = loaded.get_dist(TensorDict(observation=observation, batch_size=200))
    torch.testing.assert_close(mixture.loc, algorithm.actor.get_dist(TensorDict(observation=observation)).loc)


@pytest.mark.parametrize("critic", ["crossq", "layer_norm"])
@pytest.mark.parametrize(("force", "safe"), [(None, False), ("raw", False), ("raw", True)])
def test_a_policy_acts_again_with_critics_of_its_kind(critic: str, force: str | None, safe: bool) -> None:
    """Whatever their statistics, gains and those of the observations have become."""
    algorithm, _ = make_sac_policy(force=force, safe=safe, critic=critic, normalize=True)
    torch.manual_seed(2)
    for name, value in algorithm.state_dict().items():
        if "norms" in name and ("weight" in name or "var" in name):
            value.uniform_(0.5, 2.0)
        elif "norms" in name:
            value.normal_()
    algorithm.policy[0].update(torch.randn(100, 11) * 3 + 1)
    checkpoint = {"policy": algorithm.policy_state()}
    observation, actions = torch.randn(50, 11) * 3, []
    for policy in (algorithm.policy, load_policy(checkpoint, rule="max_weight")):
        torch.manual_seed(1)
        actions.append(act(policy, observation, ExplorationType.RANDOM))
    torch.testing.assert_close(*actions, rtol=0, atol=0)
    loss, states = algorithm.loss, algorithm.policy[0](TensorDict(observation=observation, batch_size=50))
    if force is None:  # judged by the best value, which its own critics tell
        best = act(load_policy(checkpoint), observation)
        modes = algorithm.actor.get_dist(states).component_modes.movedim(-2, 0)
        values = loss.qvalues(states, modes, loss.qvalue_network_params).min(0).values
        torch.testing.assert_close(best, modes[values.argmax(0), torch.arange(50)])


@pytest.mark.parametrize(
    ("critic", "message"),
    [
        (
            {"kind": "os.system"},
            "unknown kind 'os.system'; known: crossq, layer_norm, plain",
        ),
        ({"kind": ["plain"]}, "unknown kind"),
        ({"kind": "plain"}, "action_values do not fit"),
        ({"kind": "crossq", "hidden_sizes": [65536, 65536]}, "more than 500000000 parameters"),
        ({"kind": "crossq", "hidden_sizes": [16]}, "action_values do not fit"),
    ],
)
def test_a_described_critic_is_checked(critic: dict, message: str) -> None:
    _, checkpoint = make_sac_policy(critic="crossq")
    checkpoint["policy"]["description"]["critic"] |= critic
    with pytest.raises(RunError, match=message):
        load_policy(checkpoint)


@pytest.mark.parametrize("force", [None, "raw"])
def test_by_best_value_a_loaded_policy_is_deterministic_until_it_explores(force: str | None) -> None:
    algorithm, checkpoint = make_sac_policy(force=force, num_components=8)
    observation = torch.randn(100, 11)
    best, likeliest = (act(load_policy(checkpoint, rule=rule), observation) for rule in (None, "max_weight"))
    policy = load_policy(checkpoint)
    for mode in (None, ExplorationType.DETERMINISTIC):
        torch.testing.assert_close(act(policy, observation, mode), best, rtol=0, atol=0)
    assert (best - likeliest).abs().max() > 0.01
    if force is None:
        modes = policy.get_dist(TensorDict(observation=observation, batch_size=100)).component_modes
        actions = modes.movedim(-2, 0)
        states = TensorDict(observation=observation, batch_size=100)
        values = algorithm.loss.qvalues(states, actions, algorithm.loss.qvalue_network_params).min(0).values
        torch.testing.assert_close(best, actions[values.argmax(0), torch.arange(100)])


def test_the_mixture_of_a_loaded_policy_is_that_of_the_normalised_observation() -> None:
    for actor in ("pmoe", "options"):
        policy, checkpoint = make_policy(actor=actor)
        states = TensorDict(observation=torch.randn(5, 3), batch_size=5)
        expected = policy[1].get_dist(policy[0](states.copy()))
        found = load_policy(checkpoint).get_dist(states)
        if actor == "options":
            found, expected = found.mixture, expected.mixture
        torch.testing.assert_close(found.loc, expected.loc, rtol=0, atol=0)
        assert set(states.keys()) == {"observation"}


# ------------------------------------------------------------------ the policy on arrays


@pytest.mark.parametrize(("actor", "normalize"), [("pmoe", True), ("gaussian", False)])
def test_observations_may_be_of_any_number_type(actor: str, normalize: bool) -> None:
    policy = load_policy(make_policy(actor=actor, normalize=normalize)[1])
    observation = np.random.default_rng(0).normal(size=(5, 3))
    expected = act(policy, torch.as_tensor(observation, dtype=torch.float32)).numpy()
    for given in (observation, torch.as_tensor(observation), observation.astype(np.float32)):
        tensordict = TensorDict(observation=given, batch_size=5)
        before = tensordict["observation"].dtype
        np.testing.assert_array_equal(policy(tensordict)["action"].detach(), expected)
        assert tensordict["observation"].dtype == before
        np.testing.assert_array_equal(policy.predict(given), expected)
    assert policy.predict(observation.tolist()).dtype == np.float32
    np.testing.assert_allclose(policy.predict(observation[0]), expected[0], atol=1e-6)
    assert policy.predict(observation[0]).shape == (1,) and policy.predict(observation[:0]).shape == (0, 1)
    assert policy.predict(np.zeros(3, dtype=np.int64)).shape == (1,)
    fixed = observation.copy()
    fixed.setflags(write=False)
    others = (fixed, observation.astype(">f8"), np.asfortranarray(observation), observation[::-1][::-1])
    others += (np.ma.masked_array(observation), list(torch.as_tensor(observation)), observation.astype(object))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in others:
            np.testing.assert_array_equal(policy.predict(given), expected)
    short = torch.as_tensor(observation).bfloat16()
    np.testing.assert_array_equal(policy.predict(short), policy.predict(short.float()))
    with set_exploration_type(ExplorationType.RANDOM):
        assert np.ptp(policy.predict(np.zeros((50, 3)))) > 0


@pytest.mark.parametrize("force", [None, "gated"])
@pytest.mark.parametrize("safe", [False, True])
def test_every_policy_predicts_on_arrays(force: str | None, safe: bool) -> None:
    policy = load_policy(make_sac_policy(force=force, safe=safe)[1])
    assert policy.predict(np.zeros(11)).shape == (3,) and policy.predict(np.zeros((4, 11))).shape == (4, 3)


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (np.zeros(4), r"must be of shape \[3\] or \[B, 3\], not \[4\]"),
        (np.zeros(1), r"not \[1\]"),
        (np.zeros((3, 1)), r"not \[3, 1\]"),
        (np.zeros((2, 2, 3)), r"not \[2, 2, 3\]"),
        (0.0, r"not \[\]"),
        ([[0.0, 1.0, 2.0], [0.0]], "is not an array of numbers"),
        ({"position": [0.0, 1.0, 2.0]}, "is not an array of numbers"),
        (["a", "b", "c"], "is not an array of numbers"),
        (["1", "2", "3"], "is not an array of numbers: it holds <U1"),
        (np.zeros(3) * 1j, "is not an array of numbers: it holds complex128"),
        (np.zeros(3, "M8[s]"), "is not an array of numbers: it holds datetime64"),
        (np.ma.masked_array(np.zeros(3), [0, 1, 0]), "is masked in places"),
        (None, r"must be of shape"),
        ([np.nan, 0.0, 0.0], "holds NaN"),
        ([[0.0, 0.0, 0.0], [np.inf, 0.0, 0.0]], "an infinity"),
        ([1e300, 0.0, 0.0], "too large for the policy's float32"),
    ],
)
def test_a_mistake_in_an_array_is_one_line(observation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_policy(make_policy()[1]).predict(observation)
    assert "\n" not in str(caught.value)


def test_a_policy_with_memory_does_not_predict_on_observations_alone() -> None:
    with pytest.raises(ValueError, match="also reads option_previous: call it with a TensorDict"):
        load_policy(make_policy(actor="options")[1]).predict(np.zeros(3))


def test_importing_load_policy_needs_no_trainer() -> None:
    code = """
import sys
from pmoe_lightning import load_policy
print([name for name in ("lightning", "mlflow", "hydra", "omegaconf", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.stdout.strip() == "[]", done.stderr


# ------------------------------------------------------------------ files that are no checkpoint


class Payload:
    """Unpickled carelessly, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def seal(path: Path) -> None:
    """Give an archive made elsewhere the digest that reading asks for: what follows must not depend on its absence."""
    content = path.read_bytes()
    end = (71).to_bytes(2, "little") + b"sha256:" + hashlib.sha256(content).hexdigest().encode()
    path.write_bytes(content[:-2] + end)


def _raw_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps({"policy": Payload(mark)}))


def _zipped_pickle(path: Path, mark: Path) -> None:
    torch.save({"policy": Payload(mark)}, path)
    seal(path)


def _module(path: Path, mark: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)
    seal(path)


def _truncated(path: Path, mark: Path) -> None:
    write_checkpoint(make_policy()[1], path)
    path.write_bytes(path.read_bytes()[:-1000])


def _flipped_bit_in_a_weight(path: Path, mark: Path) -> None:
    _, checkpoint = make_policy()
    write_checkpoint(checkpoint, path)
    content = bytearray(path.read_bytes())
    weights = next(value for value in checkpoint["policy"]["state_dict"].values() if value.numel() > 500)
    at = bytes(content).index(weights.numpy().tobytes()) + 403
    content[at] ^= 1
    path.write_bytes(content)


def _compressed(path: Path, mark: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    seal(path)


def _other_zip(path: Path, mark: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    seal(path)


def _list(path: Path, mark: Path) -> None:
    torch.save([1, 2], path)
    seal(path)


def _unsealed(path: Path, mark: Path) -> None:
    torch.save(make_policy()[1], path)


UNSEALED = r"carries no SHA-256: write it with Trainer\(plugins=\[AtomicCheckpointIO\(\)\]\)"
DAMAGED = "is damaged, or is not a checkpoint: its SHA-256 does not match"
BAD_FILES: list[tuple[Callable[[Path, Path], Any], str]] = [
    (lambda path, mark: None, "does not exist"),
    (lambda path, mark: path.mkdir(), "is not a file"),
    (lambda path, mark: path.write_bytes(b""), DAMAGED),
    (lambda path, mark: path.write_text("hello"), DAMAGED),
    (lambda path, mark: path.write_bytes(os.urandom(5000)), DAMAGED),
    (_truncated, DAMAGED),
    (_raw_pickle, DAMAGED),
    (_unsealed, UNSEALED),
    (_flipped_bit_in_a_weight, DAMAGED),
    (_zipped_pickle, "holds objects other than tensors and plain values"),
    (_module, "holds objects other than tensors and plain values"),
    (_compressed, "is not a PyTorch checkpoint"),
    (_other_zip, "is not a PyTorch checkpoint"),
    (_list, "holds a list, not a dictionary"),
]


@pytest.mark.parametrize(("make", "reason"), BAD_FILES)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, make: Callable[[Path, Path], Any], reason: str) -> None:
    path, mark = tmp_path / "bad.ckpt", tmp_path / "executed"
    make(path, mark)
    for read in (load_policy, read_checkpoint, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(RunError, match=reason) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not mark.exists()


def without(key: str) -> Callable[[dict], Any]:
    return lambda checkpoint: _parent(checkpoint, key).pop(key.split(".")[-1])


def with_value(key: str, value: Any) -> Callable[[dict], Any]:
    return lambda checkpoint: _parent(checkpoint, key).update({key.split(".")[-1]: value})


def _parent(checkpoint: dict, key: str) -> dict:
    for name in key.split(".")[:-1]:
        checkpoint = checkpoint[name]
    return checkpoint


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("policy"), "'policy' is missing"),
        (with_value("policy", [1]), "'policy' is a list"),
        (without("policy.state_dict"), "'state_dict' is missing"),
        (without("policy.description"), "'description' is missing"),
        (with_value("policy.description.format", 2), "format 2 is not 1"),
        (
            with_value("policy.description.actor", "os.system"),
            "unknown actor 'os.system'; known: additive_moe, .*pmoe",
        ),
        (with_value("policy.description.observation_dim", 0), "observation_dim 0 is out of range"),
        (with_value("policy.description.observation_dim", True), "'observation_dim' is a bool"),
        (with_value("policy.description.observation_dim", 4), "does not fit its description"),
        (with_value("policy.description.action_low", [float("nan")]), "'action_low' is not a list of finite numbers"),
        (with_value("policy.description.action_low", [3.0]), "not ordered bounds"),
        (with_value("policy.description.action_low", [-2.0, -2.0]), "not ordered bounds"),
        (with_value("policy.description.env", {"id": 3, "kwargs": {}}), "'id' is a int"),
        (with_value("policy.description.env.kwargs", {"render_mode": "human"}), "must not hold render_mode"),
        (with_value("policy.description.arguments.hidden_sizes", [65536, 65536]), "more than 500000000 parameters"),
        (
            with_value("policy.description.arguments.hidden_sizes", ["32"]),
            r"hidden_sizes=\['32'\] must be a list",
        ),
        (with_value("policy.description.arguments.hidden_sizes", []), r"hidden_sizes=\[\] must be a list"),
        (with_value("policy.description.arguments.num_components", 0), "num_components=0 must be a whole number >= 1"),
        (with_value("policy.description.arguments.num_components", 5), "does not fit its description"),
        (with_value("policy.description.arguments.router", 3), "router=3 must be one of detached, attached"),
        (with_value("policy.description.arguments.router", "x"), "router='x' must be one of"),
        (with_value("policy.description.arguments.typo", 1), "unexpected keyword argument 'typo'"),
        (with_value("policy.state_dict", {"a": 1}), "does not fit its description"),
    ],
)
def test_impossible_descriptions_are_refused_by_name(
    tmp_path: Path, damage: Callable[[dict], Any], message: str
) -> None:
    _, checkpoint = make_policy(num_components=4)
    damage(checkpoint)
    write_checkpoint(checkpoint, tmp_path / "p.ckpt")
    with pytest.raises(RunError, match=message) as caught:
        load_policy(tmp_path / "p.ckpt")
    assert "\n" not in str(caught.value)


def test_unknown_references_are_refused() -> None:
    with pytest.raises(RunError, match="give a file, an MLflow run id, or models:/"):
        resolve_checkpoint("no/such/file.ckpt")
    with pytest.raises(RunError, match="models:/<name>/<version> or models:/<name>@<alias>"):
        resolve_checkpoint("models:/name")


# ------------------------------------------------------------------ writing


def test_lightning_saves_and_resumes_through_the_plugin(tmp_path: Path) -> None:
    settings = {"default_root_dir": tmp_path, "logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    settings |= {"enable_model_summary": False, "enable_checkpointing": False, "limit_train_batches": 2}
    trainer = Trainer(plugins=[AtomicCheckpointIO()], max_epochs=1, limit_val_batches=0, **settings)
    trainer.fit(BoringModel())
    path = tmp_path / "new" / "folder" / "last.ckpt"
    trainer.save_checkpoint(path)
    assert os.listdir(path.parent) == ["last.ckpt"]
    resumed = Trainer(plugins=[AtomicCheckpointIO()], max_epochs=2, limit_val_batches=0, **settings)
    resumed.fit(BoringModel(), ckpt_path=path)
    assert resumed.global_step == 4


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files of this process cannot grow beyond 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint({"step": 1}, path)
    with pytest.raises(OSError, match="File too large"):
        write_checkpoint({"step": 2, "weights": torch.zeros(100_000)}, path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        write_checkpoint({"step": 3, "code": lambda: None}, path)
    with pytest.raises(RunError, match=r"last.ckpt cannot be written: File too large; the one before it is intact"):
        AtomicCheckpointIO().save_checkpoint({"step": 4, "weights": torch.zeros(100_000)}, str(path))
    assert read_checkpoint(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


KILLED_WRITER = """
import os, random, signal, sys, time, torch
from pmoe_lightning.checkpoints.files import previous_checkpoint, read_checkpoint, write_checkpoint
from pmoe_lightning.processes.partial_files import remove_leftovers

torch.set_num_threads(1)  # a forked child has none of the parent's threads and would wait for them
path, kills = sys.argv[1], int(sys.argv[2])
weights = torch.arange(300_000.0)
write_checkpoint({"step": 0, "weights": weights}, path)
seen = set()
for kill in range(kills):
    before = os.stat(path).st_mtime_ns
    writer = os.fork()
    if writer == 0:
        step = kill * 1_000_000
        while True:
            step += 1
            write_checkpoint({"step": step, "weights": weights + step}, path)
    while os.stat(path).st_mtime_ns == before:  # the kill must hit a writer at work, not one that is still starting
        time.sleep(0.001)
    time.sleep(0.03 * random.random())
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    remove_leftovers(os.path.dirname(path))
    assert sorted(os.listdir(os.path.dirname(path))) == ["last.ckpt", "last.previous.ckpt"]
    found, earlier = read_checkpoint(path), read_checkpoint(previous_checkpoint(path))
    assert torch.equal(found["weights"], weights + found["step"]), "mixed content"
    assert earlier["step"] <= found["step"]
    seen.add(found["step"])
print(len(seen))
"""


def test_a_killed_writer_never_damages_the_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, str(tmp_path / "last.ckpt"), "40"],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 40


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """In the archive, its directory, its end, the digest itself: nowhere is a place that nobody checks."""
    path = tmp_path / "p.ckpt"
    write_checkpoint({"weights": torch.arange(50.0), "step": 3}, path)
    intact = path.read_bytes()
    for position in range(len(intact)):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=DAMAGED):
            read_checkpoint(path)


def test_the_replaced_checkpoint_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for step in (1, 2, 3):
        write_checkpoint({"step": step}, path)
    assert read_checkpoint(path) == {"step": 3}
    assert read_checkpoint(previous_checkpoint(path)) == {"step": 2}
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "last.previous.ckpt"]


def is_whole(path: Path) -> bool:
    try:
        return bool(read_checkpoint(path))
    except RunError:
        return False


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_damaged_checkpoint_never_replaces_the_whole_one_before(links, tmp_path: Path, monkeypatch) -> None:
    """At every step of the writing after a recovery there is a whole one, whatever the filesystem can do."""
    path, replace = tmp_path / "last.ckpt", os.replace

    def replace_and_look(*names: Any) -> None:
        replace(*names)
        assert is_whole(path) or is_whole(previous_checkpoint(path)), names

    def refuse(*_: Any) -> None:
        raise OSError("no links")

    write_checkpoint({"step": 1}, path)
    write_checkpoint({"step": 2}, path)
    monkeypatch.setattr(os, "replace", replace_and_look)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for step in (3, 4, 5):
        path.write_bytes(path.read_bytes()[:-7])  # of another length, so that whoever wrote it can see that
        write_checkpoint({"step": step}, path)
        assert read_checkpoint(path) == {"step": step}
        assert read_checkpoint(previous_checkpoint(path)) == {"step": 1}
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "last.previous.ckpt"]


def test_a_policy_trained_to_follow_the_best_value_does_so_where_there_are_action_values() -> None:
    _, checkpoint = make_policy(normalize=False, num_components=8)
    checkpoint["policy"]["description"]["arguments"]["deterministic"] = "best_value"
    observation = torch.randn(200, 3)
    likeliest = act(load_policy(checkpoint, rule="max_weight"), observation)
    torch.testing.assert_close(act(load_policy(checkpoint), observation), likeliest, rtol=0, atol=0)
    checkpoint["policy"]["description"]["critic"] = {"hidden_sizes": [8], "activation": "relu"}
    checkpoint["policy"]["action_values"] = [dict(make_qvalue_network(3, 1, hidden_sizes=(8,)).state_dict())]
    best = act(load_policy(checkpoint), observation)
    torch.testing.assert_close(best, act(load_policy(checkpoint, rule="best_value"), observation), rtol=0, atol=0)
    assert (best - likeliest).abs().max() > 0.01


def test_best_value_needs_action_values() -> None:
    checkpoint = make_policy()[1]
    with pytest.raises(RunError, match="holds no action values to rank components by: use rule=max_weight"):
        load_policy(checkpoint, rule="best_value")
    checkpoint["policy"]["action_values"] = [{"module.layers.0.weight": torch.zeros(2, 2)}]
    with pytest.raises(RunError, match="hidden_sizes=None must be a list"):
        load_policy(checkpoint, rule="best_value")
    checkpoint["policy"]["description"]["critic"] = {"hidden_sizes": [8], "activation": "relu"}
    with pytest.raises(RunError, match="action_values do not fit"):
        load_policy(checkpoint, rule="best_value")
