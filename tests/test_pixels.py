"""Pixels: what an environment shows, what an encoder makes of it, how replay stores it, and runs that learn from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from probe_envs import DrawnEnv
from shapes import unchecked
from tensordict import TensorDict
from test_env_backend import BACKEND
from torchrl.envs.utils import check_env_specs

from pmoe_lightning.algorithms import make_sac
from pmoe_lightning.algorithms.sac import SAC
from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.checkpoints.blocks import locate_blocks, read_block, remove_unnamed, write_block
from pmoe_lightning.data import frames as frames_module
from pmoe_lightning.data.frames import FrameStore, check_memory, random_shift
from pmoe_lightning.data.n_step import NStepTransitions
from pmoe_lightning.envs import make_env
from pmoe_lightning.envs.pixels import see_pixels
from pmoe_lightning.errors import ConfigurationError, RunError
from pmoe_lightning.estimators import Frequency
from pmoe_lightning.evaluate import main as evaluate
from pmoe_lightning.hamiltonian import make_hamiltonian_transform
from pmoe_lightning.losses import PMOESACLoss
from pmoe_lightning.modules.actors import make_pmoe_actor
from pmoe_lightning.modules.critics import make_qvalue_network
from pmoe_lightning.modules.crossq import make_crossq_network
from pmoe_lightning.modules.encoders import make_drq_encoder
from pmoe_lightning.tracking.references import load_policy
from pmoe_lightning.updates import SACUpdate

SMALL = {"size": 32, "grey": True, "look": "fast"}
SHAPE = (3, 32, 32)  # three grey pictures


# -- what an environment shows -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "Pendulum-v1"])  # drawn by MuJoCo, and by picture()
def test_pixels_stack_the_last_pictures_and_go_on_exactly(env_id: str) -> None:
    env = make_env(env_id, num_envs=2, seed=0, pixels=SMALL)
    check_env_specs(env)
    env.set_seed(0)
    root = env.reset()
    assert root["pixels"].shape == (2, *SHAPE) and "observation" not in root
    assert (root["pixels"] == root["pixels"][:, :1]).all() and root["pixels"].float().std() > 1
    torch.manual_seed(0)
    rollout = env.rollout(12, break_when_any_done=False)
    before, after, done = rollout["pixels"], rollout["next", "pixels"], rollout["next", "done"].squeeze(-1)
    assert torch.equal(after[:, :, :-1], before[:, :, 1:])
    going_on = ~done[:, :-1]
    assert torch.equal(before[:, 1:][going_on], after[:, :-1][going_on])
    begun = before[:, 1:][done[:, :-1]]
    assert (begun == begun[:, :1]).all()

    root, state = env.step_mdp(rollout[:, -1]), env.simulator_state()
    step = env.step(root.set("action", torch.full((2, 1), 0.3)))["next"].clone()
    other = make_env(env_id, num_envs=2, seed=7, pixels=SMALL)
    other.reset()
    assert other.load_simulator_state(state) is None
    again = other.step(root.set("action", torch.full((2, 1), 0.3)))["next"]
    assert all(torch.equal(step[key], again[key]) for key in ("pixels", "reward", "episode_return", "episode_length"))
    env.close()
    other.close()


def test_a_look_without_shadows_and_samples_is_another_and_repeats_itself() -> None:
    seen = {}
    for look in ("default", "fast", "fast"):
        env = make_env("HalfCheetah-v5", seed=0, pixels={"size": 40, "look": look})
        pixels = env.reset()["pixels"]
        assert pixels.shape == (1, 9, 40, 40)
        assert torch.equal(seen.get(look, pixels), pixels)
        seen[look] = pixels
        env.close()
    difference = (seen["default"].float() - seen["fast"].float()).abs()
    assert 0 < difference.mean() < 20


def test_a_simulator_of_ones_own_is_seen_by_its_picture() -> None:
    names: dict = {}
    exec(BACKEND, names)

    def make(num_envs, seed, carry, render_mode):
        return names["make_point_mass"]("PointMass", num_envs=num_envs, seed=seed, carry=carry)

    env = see_pixels(make, {"size": 48}, num_envs=3, seed=0, carry=(), render_mode=None)
    check_env_specs(env)
    env.set_seed(0)
    rollout = env.rollout(30, break_when_any_done=False)
    red = rollout["pixels"][..., -3, :, :] > rollout["pixels"][..., -2, :, :].int() + 60
    assert (red.flatten(2).sum(-1) >= 4).all()  # the point is in every picture
    assert rollout["next", "done"].any() and rollout["next", "episode_length"].max() == 25


@pytest.mark.parametrize(
    "pixels", [{"size": 8}, {"size": "big"}, {"size": 32, "look": "nice"}, {"colour": 1}, {"stack": 0}]
)
def test_what_cannot_be_seen_is_one_line(pixels: dict) -> None:
    with pytest.raises(ConfigurationError, match="must be") as error:
        make_env("Pendulum-v1", pixels=pixels)
    assert "\n" not in str(error.value)


# -- what is made of it ------------------------------------------------------------------------------------------------
def make(seed: int = 0, transform: bool = False, **arguments) -> SAC:
    torch.manual_seed(seed)
    encoder = make_drq_encoder(SHAPE, channels=[4, 4], strides=[2, 2], features=6)
    actor = make_pmoe_actor(6, [-2.0, -1.0], [2.0, 1.0], num_components=3, hidden_sizes=[8])
    if transform:
        arguments["action_transform"] = make_hamiltonian_transform(6, 2)
    sizes = {"observation_dim": 6, "action_dim": 2, "hidden_sizes": [8]}
    return make_sac(actor, Frequency(), encoder=encoder, **sizes, **arguments)


def minibatches(updates: int = 2, size: int = 5) -> TensorDict:
    torch.manual_seed(1)
    flags = {key: torch.zeros(updates, size, 1, dtype=torch.bool) for key in ("done", "terminated", "truncated")}
    pixels = torch.randint(0, 256, (2, updates, size, *SHAPE), dtype=torch.uint8)
    following = {"pixels": pixels[1], "reward": torch.randn(updates, size, 1), **flags}
    return TensorDict(
        {"pixels": pixels[0], "action": torch.rand(updates, size, 2) - 0.5, "next": following}, [updates, size]
    )


CRITICS = {"plain": {}, "crossq": {"make_critic": make_crossq_network}}


def test_the_encoder_has_the_sizes_of_drq_and_says_what_does_not_fit() -> None:
    encoder = make_drq_encoder((9, 84, 84))
    assert [tuple(p.shape) for p in encoder.linear.parameters()] == [(50, 32 * 35 * 35), (50,)]
    out = encoder(TensorDict(pixels=torch.randint(0, 256, (2, 3, 9, 84, 84), dtype=torch.uint8), batch_size=[2, 3]))
    assert out["observation"].shape == (2, 3, 50) and out["observation"].abs().max() < 1
    for wrong, said in (
        ({"shape": (9, 8, 8)}, "too few"),
        ({"shape": (9, 84)}, "three sides"),
        ({"shape": (9, 84, 84), "strides": [2]}, "not of the same convolutions"),
        ({"shape": (9, 84, 84), "channels": [0, 1, 1, 1]}, "must be"),
    ):
        with pytest.raises((ValueError, ConfigurationError), match=said):
            make_drq_encoder(**wrong)


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("transform", [False, True])
def test_only_the_critics_loss_reaches_the_encoder(critic: str, transform: bool) -> None:
    loss = make(transform=transform, **CRITICS[critic]).loss
    out = loss(minibatches()[0])
    reached = {}
    for name in ("loss_actor", "loss_qvalue", "loss_alpha", "loss_frequency"):
        parameters = dict(loss.named_parameters())
        slopes = torch.autograd.grad(out[name], list(parameters.values()), retain_graph=True, allow_unused=True)
        found = zip(parameters, slopes, strict=True)
        reached[name] = {key.split("_params")[0].split(".")[0] for key, slope in found if slope is not None}
    assert reached["loss_qvalue"] == {"encoder", "qvalue_network"}
    assert "encoder" not in reached["loss_actor"] | reached["loss_alpha"] | reached["loss_frequency"]
    groups = loss.parameter_groups(lr_actor=1.0, lr_qvalue=2.0, lr_alpha=3.0)
    assert {group["name"]: group["lr"] for group in groups}["encoder"] == 2.0
    assert sum(len(group["params"]) for group in groups) == len([p for p in loss.parameters() if p.requires_grad])


def test_everything_behind_the_encoder_is_as_if_it_observed_the_encodings() -> None:
    algorithm = make()
    with torch.no_grad():
        for parameter in algorithm.loss.target_encoder_params.values(True, True):
            parameter.mul_(1.1)  # so that it matters which of the two encodes
    minibatch = minibatches()[0]
    torch.manual_seed(2)
    out = algorithm.loss(minibatch)
    encoded = algorithm.loss.encoded(minibatch)
    assert minibatch.keys() == minibatches()[0].keys()  # the caller's is left alone
    following = encoded["next"]
    assert not torch.equal(following["observation"], following["observation_of_target"])
    assert not following["observation"].requires_grad and encoded["observation"].requires_grad

    torch.manual_seed(0)
    make_drq_encoder(SHAPE, channels=[4, 4], strides=[2, 2], features=6)
    actor = make_pmoe_actor(6, [-2.0, -1.0], [2.0, 1.0], num_components=3, hidden_sizes=[8])
    plain = PMOESACLoss(
        actor,
        [make_qvalue_network(6, 2, hidden_sizes=[8]) for _ in range(2)],
        estimator=Frequency(),
        target_entropy=-2.0,
    )
    plain.make_value_estimator(gamma=0.99)
    live, seen_by_target = encoded.exclude("pixels").detach(), following["observation_of_target"]
    torch.manual_seed(2)
    actor_losses = plain(live.clone())
    for name in ("loss_actor", "loss_alpha", "loss_frequency", "entropy"):
        torch.testing.assert_close(out[name], actor_losses[name])
    after = plain._next_action(live["next"])
    torch.manual_seed(2)
    after = plain._next_action(live["next"])
    values = plain.qvalues(
        live["next"].clone().set("observation", seen_by_target), after.action, plain.target_qvalue_network_params
    )
    target = plain._critic_target(live, after, values)
    here = plain.qvalues(live, plain.normalize_action(live["action"]), plain.qvalue_network_params)
    torch.testing.assert_close(out["loss_qvalue"], (here - target).square().sum(0).mean())


@pytest.mark.slow
@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("transform", [False, True])
def test_the_compiled_update_takes_the_same_steps(critic: str, transform: bool) -> None:
    ends = []
    for compiled in (True, False):
        loss = make(transform=transform, **CRITICS[critic]).loss
        groups = loss.parameter_groups(lr_actor=1e-3, lr_qvalue=1e-3, lr_alpha=1e-3)
        update = SACUpdate(loss, torch.optim.Adam(groups, fused=True), tau=0.1, compile=compiled)
        torch.manual_seed(3)
        with unchecked():
            update(minibatches())
        ends.append({name: value.clone() for name, value in loss.state_dict().items() if torch.is_tensor(value)})
    start = make(transform=transform, **CRITICS[critic]).loss.state_dict()
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=2e-3, atol=2e-5, msg=name)
    moved = {name for name, value in ends[0].items() if not torch.equal(value, start[name])}
    assert any("target_encoder" in name for name in moved) is (critic == "plain")
    assert any(name.startswith("encoder_params") for name in moved)


@pytest.mark.parametrize("form", DrawnEnv.SPACES)
def test_an_environment_of_images_is_seen_through_its_camera(form: str) -> None:
    with pytest.raises(ConfigurationError, match="has images as observation.*see its pictures by env.pixels.size"):
        make_env("Drawn-v0", form=form)
    env = make_env("Drawn-v0", form=form, seed=0, pixels={"size": 32, "stack": 2})
    played = env.rollout(5, break_when_any_done=False)
    red = (100 + 100 * played["action"][..., 0]).int()
    assert played["pixels"].shape == (1, 5, 6, 32, 32)
    assert torch.equal(played["next", "pixels"][..., 3, 5, 5].int(), red)
    assert played["pixels"][..., 3, 5, 5].tolist() == [[0, *red[0, :2].tolist(), 0, red[0, 3].item()]]
    state = env.simulator_state()
    again = make_env("Drawn-v0", form=form, seed=1, pixels={"size": 32, "stack": 2})
    assert again.load_simulator_state(state) is None
    env.close()
    again.close()


# -- how it is stored --------------------------------------------------------------------------------------------------
def rollouts(number: int, steps: int, envs: int = 2, seed: int = 0) -> list[TensorDict]:
    """Rollouts [N, T] that follow on from one another, of episodes of 1 to 6 steps, in 2 x 2 pictures of noise."""
    random = np.random.default_rng(seed)
    fresh = lambda: random.integers(0, 256, (1, 2, 2), dtype=np.uint8)  # noqa: E731
    stacks = [np.repeat(fresh(), 3, 0) for _ in range(envs)]
    found = []
    for _ in range(number):
        here, after = np.zeros((2, envs, steps, 3, 2, 2), np.uint8)
        done = random.random((envs, steps)) < 0.3
        for t in range(steps):
            for i in range(envs):
                here[i, t] = stacks[i]
                after[i, t] = np.concatenate([stacks[i][1:], fresh()])
                stacks[i] = np.repeat(fresh(), 3, 0) if done[i, t] else after[i, t]
        flags = torch.from_numpy(done).unsqueeze(-1)
        following = {
            "pixels": torch.from_numpy(after.copy()),
            "done": flags,
            "terminated": flags,
            "truncated": ~flags & False,
        }
        following["reward"] = torch.from_numpy(random.normal(size=(envs, steps, 1)))
        found.append(TensorDict({"pixels": torch.from_numpy(here.copy()), "next": following}, [envs, steps]))
    return found


def test_every_picture_is_stored_once_and_every_observation_comes_back() -> None:
    played = rollouts(5, 7)
    store = FrameStore(200, (3, 2, 2), stack=3, num_envs=2)
    numbered = [store.number(rollout) for rollout in played]
    ends = sum(int(rollout["next", "done"].sum()) for rollout in played)
    last = int(played[-1]["next", "done"][:, -1].sum())  # whose next episode has not been seen
    assert store.count == 2 + 5 * 7 * 2 + ends - last
    for rollout, numbers in zip(played, numbered, strict=True):
        assert "pixels" not in numbers and numbers["observation"].shape == (2, 7, 3)
        for part, whole in ((numbers, rollout), (numbers["next"], rollout["next"])):
            assert torch.equal(store.look_up(part["observation"].reshape(-1, 3)), whole["pixels"].flatten(0, 1))


def test_transitions_of_several_steps_lead_to_the_right_pictures() -> None:
    played = rollouts(4, 6)
    n_step, store = NStepTransitions(3, 0.9), FrameStore(200, (3, 2, 2), stack=3, num_envs=2)
    together = torch.cat(played, 1)
    expected = {}
    for i in range(2):
        for t in range(together.shape[1]):
            end = next((k for k in range(t, min(t + 3, together.shape[1])) if together["next", "done"][i, k]), t + 2)
            if end < together.shape[1]:
                expected[together["pixels"][i, t].numpy().tobytes()] = together["next", "pixels"][i, end]
    found = torch.cat([n_step(store.number(rollout)) for rollout in played])
    assert len(found) == len(expected) > 30
    here, after = (store.look_up(part["observation"]) for part in (found, found["next"]))
    for pixels, following in zip(here, after, strict=True):
        assert torch.equal(expected[pixels.numpy().tobytes()], following)


def test_an_environment_that_was_made_anew_does_not_go_on() -> None:
    first, second = rollouts(1, 4)[0], rollouts(1, 4, seed=1)[0]
    store = FrameStore(100, (3, 2, 2), stack=3, num_envs=2)
    store.number(first)
    numbers = store.number(second)
    assert torch.equal(store.look_up(numbers["observation"].reshape(-1, 3)), second["pixels"].flatten(0, 1))


def test_a_shift_is_a_crop_of_the_padded_picture() -> None:
    pixels = torch.randint(0, 256, (60, 3, 10, 12), dtype=torch.uint8)
    torch.manual_seed(0)
    shifted = random_shift(pixels)
    torch.manual_seed(0)
    down, right = torch.randint(-4, 5, (2, 60)).tolist()
    padded = F.pad(pixels.float(), (4, 4, 4, 4), mode="replicate").byte()
    crops = [image[:, 4 + y : 14 + y, 4 + x : 16 + x] for image, y, x in zip(padded, down, right, strict=True)]
    assert torch.equal(shifted, torch.stack(crops)) and len({*zip(down, right, strict=True)}) > 20


def test_a_buffer_that_does_not_fit_is_refused_before_it_is_made() -> None:
    said = check_memory(100_000, (9, 84, 84), 3, torch.device("cpu"), refuse=False)
    assert said == "data.buffer_size: 100,000 pictures of 3 x 84 x 84 take 1.97 GiB"
    assert check_memory(60, (3, 32, 32), 3, torch.device("cpu")).endswith("60 pictures of 1 x 32 x 32 take 60.00 KiB")
    assert check_memory(1000, (3, 64, 64), 3, torch.device("cpu")).endswith("take 3.91 MiB")
    with pytest.raises(ConfigurationError, match="GiB free: lower data.buffer_size"):
        check_memory(10**12, (9, 84, 84), 3, torch.device("cpu"))


def test_blocks_are_written_once_found_again_and_removed_when_nobody_names_them(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(frames_module, "_BLOCK_BYTES", 10 * 4)  # of ten pictures
    folder, played = tmp_path / "frames", rollouts(12, 7)
    store, states = FrameStore(60, (3, 2, 2), stack=3, num_envs=2), []
    for rollout in played:
        store.number(rollout)
        remove_unnamed(folder) if folder.exists() else None
        before = {path: path.stat().st_mtime_ns for path in folder.glob("*")}
        states.append(store.state_dict(folder))
        assert all(path.stat().st_mtime_ns == then for path, then in before.items() if path.exists())
        checkpoint = {"experience": [{"replay": {"frames": states[-1]}}]}
        torch.save(
            {"experience": [{"replay": {"frames": states[-2] if len(states) > 1 else states[-1]}}]}, tmp_path / "b.ckpt"
        )
        torch.save(checkpoint, tmp_path / "a.ckpt")
        locate_blocks(checkpoint, tmp_path / "a.ckpt")
        other = FrameStore(60, (3, 2, 2), stack=3, num_envs=2)
        other.load_state_dict(states[-1], folder)
        numbers = torch.arange(store.oldest, store.count)[:, None].expand(-1, 3)
        assert torch.equal(store.look_up(numbers), other.look_up(numbers)) and other._current == store._current
    named = {name for state in states[-2:] for name in state["blocks"].values()}
    remove_unnamed(folder)
    assert {path.name for path in folder.glob("*")} == named and len(named) < len(
        {n for s in states for n in s["blocks"].values()}
    )


def test_a_damaged_or_missing_block_is_one_line(tmp_path: Path) -> None:
    name = write_block(torch.arange(50, dtype=torch.uint8), tmp_path / "frames")
    assert torch.equal(read_block(tmp_path / "frames" / name), torch.arange(50, dtype=torch.uint8))
    assert [path.name for path in (tmp_path / "frames").iterdir()] == [name]
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written: "):
        write_block(torch.zeros(5, dtype=torch.uint8), tmp_path / "file")
    checkpoint = {"experience": [{"replay": {"frames": {"blocks": {0: name}}}}]}
    path = tmp_path / "last.ckpt"
    locate_blocks(checkpoint, path)
    (tmp_path / "frames" / name).write_bytes(bytes(50))
    with pytest.raises(RunError, match="is damaged"):
        locate_blocks(checkpoint, path)
    (tmp_path / "frames" / name).unlink()
    with pytest.raises(RunError, match="cannot be read"):
        locate_blocks(checkpoint, path)
    checkpoint["experience"][0]["replay"]["frames"]["blocks"] = {0: "../../secret"}
    with pytest.raises(RunError, match="is no SHA-256"):
        locate_blocks(checkpoint, path)


# -- runs --------------------------------------------------------------------------------------------------------------
WORDS = ["algo=sac", "env=InvertedPendulum-v5", "env.pixels.size=32", "env.pixels.grey=true", "env.pixels.look=fast"]
WORDS += [
    "encoder=drq",
    "encoder.channels=[4,4]",
    "encoder.strides=[2,2]",
    "encoder.features=6",
    "algo.hidden_sizes=[8]",
]
WORDS += ["data.batch_size=4", "data.init_random_frames=32", "data.frames_per_epoch=48", "data.buffer_size=60"]
WORDS += ["callbacks.evaluation.episodes=1", "logger=none", "data.n_step=2"]


def test_a_run_from_pixels_is_judged_packaged_and_resumed_bit_for_bit(train, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(frames_module, "_BLOCK_BYTES", 12 * 32 * 32)
    minimal = "callbacks=[evaluation,metrics,checkpoint_last,mixture]"
    said = train(*WORDS, minimal, "total_frames=160", "hydra.run.dir=whole")
    assert "60 pictures of 1 x 32 x 32 take" in said
    train(*WORDS, minimal, "total_frames=96", "hydra.run.dir=cut")
    blocks = set(Path("cut/checkpoints/frames").iterdir())
    assert blocks and Path("cut/checkpoints/last.ckpt").stat().st_size < 1_000_000
    said = train(*WORDS, minimal, "total_frames=160", "resume=cut")
    assert "new episode" not in said
    whole, resumed = (read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "cut"))
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    replays = [checkpoint["experience"][0]["replay"] for checkpoint in (whole, resumed)]
    assert replays[0]["frames"]["blocks"] == replays[1]["frames"]["blocks"]
    assert torch.equal(replays[0]["frames"]["rest"], replays[1]["frames"]["rest"])

    capfd.readouterr()
    checkpoint = "whole/checkpoints/last.ckpt"
    assert evaluate([f"checkpoint={checkpoint}", "episodes=1", "--video", "--json"]) == 0
    assert Path(json.loads(capfd.readouterr().out)["video"]).stat().st_size > 1000
    assert evaluate([f"checkpoint={checkpoint}", "episodes=1", "+env.pixels.size=40"]) == 2
    assert "the policy sees pixels of 3 x 32 x 32" in capfd.readouterr().err

    policy = load_policy(checkpoint)
    pixels = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), dtype=np.uint8)
    together = policy.predict(pixels)
    assert together.shape == (5, 1)
    np.testing.assert_allclose(policy.predict(pixels[0]), together[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(policy.predict(pixels.astype(np.float64)), together)
    for wrong, said in (
        (pixels[:, :2], "shape"),
        (pixels / 255, "whole numbers"),
        (np.zeros(6), "shape"),
        ({"a": 1}, "numbers"),
    ):
        with pytest.raises(ValueError, match=said):
            policy.predict(wrong)

    kept = [read_checkpoint(Path("cut/checkpoints", name)) for name in ("last.ckpt", "last.previous.ckpt")]
    named = [set(checkpoint["experience"][0]["replay"]["frames"]["blocks"].values()) for checkpoint in kept]
    assert set(map(str, named[0] | named[1])) <= {path.name for path in Path("cut/checkpoints/frames").iterdir()}
    block = Path("cut/checkpoints/frames", min(named[0] & named[1]))
    block.write_bytes(block.read_bytes()[:-1])
    printed = train(*WORDS, minimal, "total_frames=200", "resume=cut", code=1)
    assert printed.count("is damaged") == 2 and "Traceback" not in printed  # in the last one and the one before


def test_a_run_goes_on_from_what_mlflow_holds_of_it(train, tmp_path, monkeypatch, empty_store) -> None:
    import mlflow

    monkeypatch.setattr(frames_module, "_BLOCK_BYTES", 12 * 32 * 32)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    words = [word for word in WORDS if word not in ("logger=none", "callbacks.evaluation.episodes=1")]
    words += ["callbacks=[checkpoint_last,final_policy]", "callbacks.final_policy.video=false"]
    words += ["callbacks.final_policy.model=false", f"logger.tracking_uri={uri}", "compile=false"]
    train(*words, "total_frames=96", "hydra.run.dir=here")
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs(["1"])
    here = read_checkpoint(Path("here/checkpoints/last.ckpt"))["experience"][0]["replay"]["frames"]
    held = Path(run.info.artifact_uri.removeprefix("file://"), "checkpoints", "frames")
    assert {path.name for path in held.iterdir()} == set(here["blocks"].values()) != set()
    written = {path.name: path.stat().st_mtime_ns for path in held.iterdir()}

    shutil.rmtree("here")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    train(*words, "total_frames=112", f"resume={run.info.run_id}", "hydra.run.dir=elsewhere")
    there = read_checkpoint(Path("elsewhere/checkpoints/last.ckpt"))["experience"][0]["replay"]["frames"]
    assert there["count"] > here["count"] and set(there["blocks"].values()) & set(here["blocks"].values())
    assert set(there["blocks"].values()) <= {path.name for path in held.iterdir()}
    assert all((held / name).stat().st_mtime_ns == then for name, then in written.items())  # none was sent again

    shutil.rmtree("elsewhere")
    (held / min(there["blocks"].values())).unlink()
    said = train(*words, "total_frames=128", f"resume={run.info.run_id}", "hydra.run.dir=third", code=1)
    assert "lacks a block of the replay buffer" in said and "Traceback" not in said


def test_a_policy_of_pixels_is_a_model_of_bytes(tmp_path: Path) -> None:
    import mlflow

    from pmoe_lightning.tracking.policy_model import save_policy_model

    algorithm = make()
    arguments = {"num_components": 3, "hidden_sizes": [8]}
    encoder = {"kind": "drq", "shape": list(SHAPE), "channels": [4, 4], "strides": [2, 2], "features": 6}
    algorithm.policy_description = {
        "format": 1, "actor": "pmoe", "arguments": arguments, "observation_dim": 6, "action_low": [-2.0, -1.0],
        "action_high": [2.0, 1.0], "normalize_observation": False, "encoder": encoder,
        "critic": {"hidden_sizes": [8], "activation": "relu"}, "env": {"id": "Reacher-v5", "kwargs": {}},
    }  # fmt: skip
    checkpoint = {"policy": algorithm.policy_state()}
    save_policy_model(checkpoint, tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (3, *SHAPE), dtype=np.uint8)
    served = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(pixels)
    np.testing.assert_allclose(served, load_policy(checkpoint).predict(pixels), rtol=1e-4, atol=1e-5)
    for change, said in (
        ({"kind": "resnet"}, "unknown kind"),
        ({"features": 7}, "not the actor's"),
        ({"shape": [3, 32]}, "not that of pixels"),
        ({"shape": [3, 32, 10**9]}, "not that of pixels"),
        ({"channels": [60_000] * 9}, "more than"),
        ({"strides": [0, 1]}, "must be"),
    ):
        changed = {**checkpoint["policy"]["description"], "encoder": {**encoder, **change}}
        with pytest.raises(RunError, match=said):
            load_policy({"policy": {**checkpoint["policy"], "description": changed}})


HUGE = ("data.buffer_size", "total_frames")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["algo=sac", "env.pixels.size=64"], "env.pixels.size=64 needs an encoder: use encoder=drq"),
        (["algo=sac", "encoder=drq"], "encoder=... encodes pixels: set env.pixels.size"),
        (["algo=ppo", "env.pixels.size=64", "encoder=drq"], "algo=ppo learns from the state alone"),
        (["algo=sac", "env.pixels.size=64", "encoder=drq", "data.normalize_observation=true"], "and pixels are not"),
        (["algo=sac", "env.pixels.size=4", "encoder=drq"], "env.pixels.size=4 must be a whole number >= 16"),
        (["algo=sac", "env.pixels.look=nice"], "env.pixels.look=nice must be one of default, fast"),
        (["algo=sac", "env.pixels.siez=64"], "did you mean env.pixels.size?"),
        (["algo=sac", "env.pixels.size=16", "encoder=drq", "encoder.strides=[2,2]"], "not of the same convolutions"),
        (
            [
                "algo=sac",
                "env.pixels.size=512",
                "encoder=drq",
                "data.buffer_size=900_000_000",
                "total_frames=900_000_000",
            ],
            "GiB free",
        ),
    ],
)
def test_what_cannot_learn_from_pixels_is_one_line(train, words: list[str], said: str) -> None:
    printed = train(*words, "logger=none", "env.id=InvertedPendulum-v5", code=2)
    assert said in printed and "Traceback" not in printed
    assert not Path("outputs").exists()
