"""A policy as a file: it acts as the policy does, says so, or is refused in one line and leaves nothing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import shapes
import torch
from policies import make_policy, make_sac_policy
from tensordict import TensorDict

from pmoe_lightning import load_policy
from pmoe_lightning.callbacks import FinalPolicy
from pmoe_lightning.checkpoints import write_checkpoint
from pmoe_lightning.checkpoints.policy import build_policy, policy_entry
from pmoe_lightning.errors import RunError
from pmoe_lightning.export import main, parse
from pmoe_lightning.exporting import policy_file
from pmoe_lightning.exporting.formats import METADATA_FILE
from pmoe_lightning.exporting.graph import PolicyGraph
from pmoe_lightning.exporting.observations import draw, with_extremes
from pmoe_lightning.exporting.parity import compare, near_ties


@pytest.fixture(autouse=True)
def traced():
    """Annotated shapes are not enforced where ``torch.export`` traces Python."""
    with shapes.unchecked():
        yield


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried on 2,000 observations, of which two may be left out."""
    monkeypatch.setattr(policy_file, "OBSERVATIONS", 2_000)


def written(checkpoint: dict[str, Any], folder: Path) -> str:
    write_checkpoint(checkpoint, folder / "policy.ckpt")
    return f"checkpoint={folder / 'policy.ckpt'}"


def decided(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Critics as steep as trained ones: those of a fresh network rate every component nearly alike."""
    for critic in checkpoint["policy"]["action_values"]:
        for key in critic:
            if "layers" in key and key.endswith("weight"):
                critic[key] = 4 * critic[key]
    return checkpoint


def onnx_actions(path: Path, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["action"], {key: value.numpy() for key, value in inputs.items()})[0]


def assert_acts_alike(checkpoint: dict[str, Any], folder: Path, *words: str) -> dict[str, str]:
    """Export; the file's actions are those of the loaded policy within 1e-5. Returns its metadata."""
    path = folder / "policy.onnx"
    assert main([written(checkpoint, folder), f"output={path}", *words]) == 0
    rule = next((word.removeprefix("rule=") for word in words if word.startswith("rule=")), None)
    policy = load_policy(checkpoint, rule=rule)
    inputs = draw(policy, 300)
    expected = policy(TensorDict(inputs, batch_size=300))["action"].detach()
    low, high = (torch.tensor(checkpoint["policy"]["description"][f"action_{end}"]) for end in ("low", "high"))
    tied = near_ties(policy, rule or "max_weight", inputs, (high - low) / 2)
    assert tied.sum() <= 6
    np.testing.assert_allclose(
        onnx_actions(path, inputs)[~tied], expected[~tied], atol=1e-5 * float((high - low).min()) / 2
    )
    assert expected.std(0).min() > 1e-3
    one = {key: value[:1] for key, value in inputs.items()}
    np.testing.assert_allclose(onnx_actions(path, one), expected[:1], atol=1e-5)
    return onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map


def test_a_mixture_with_normaliser_and_bounds_as_onnx_and_pt2(tmp_path: Path, few: None, capsys) -> None:
    _, checkpoint = make_policy("Pendulum-v1")
    facts = assert_acts_alike(checkpoint, tmp_path, "rule=max_weight")
    assert facts["env"] == "Pendulum-v1" and facts["rule"] == "max_weight"
    assert "its episodes in Pendulum-v1" in facts["parity_source"]
    assert json.loads(facts["parity_observations"]) == 2_000 and json.loads(facts["action_high"]) == [2.0]
    assert 0 <= float(facts["parity_largest_difference"]) <= 1e-5
    before = (tmp_path / "policy.onnx").read_bytes()
    assert main([f"checkpoint={tmp_path}/policy.ckpt", f"output={tmp_path}/policy.onnx"]) == 2
    assert "exists, and is not overwritten" in capsys.readouterr().err
    assert (tmp_path / "policy.onnx").read_bytes() == before

    archive = tmp_path / "policy.pt2"
    assert main([f"checkpoint={tmp_path}/policy.ckpt", "format=pt2", f"output={archive}", "rule=mean"]) == 0
    extra = {METADATA_FILE: ""}
    module = torch.export.load(archive, extra_files=extra).module()
    assert json.loads(extra[METADATA_FILE])["rule"] == "mean"
    inputs = draw(load_policy(checkpoint), 50)
    expected = load_policy(checkpoint, rule="mean")(TensorDict(inputs, batch_size=50))["action"]
    torch.testing.assert_close(module(inputs)["action"], expected, atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError, match="holds NaN or an infinity"):
        module({"observation": torch.tensor([[0.0, torch.nan, 0.0]])})
    assert sorted(os.listdir(tmp_path)) == ["policy.ckpt", "policy.onnx", "policy.pt2"]


def test_the_best_value_with_a_transform_as_onnx(tmp_path: Path, few: None) -> None:
    """Critics, force and normaliser are all in the file; unlike the transform's, its own rule changes the action."""
    _, checkpoint = make_sac_policy(force="gated", rule="best_value", normalize=True, env_id="Pendulum-v1")
    facts = assert_acts_alike(decided(checkpoint), tmp_path)
    assert facts["rule"] == "best_value" and json.loads(facts["env_kwargs"]) == {"max_episode_steps": 20}


GREY = {"size": 32, "grey": True, "stack": 2, "look": "fast"}


@pytest.mark.parametrize(
    ("actor", "force"),
    [
        ("gaussian", None),
        *(pytest.param("pmoe", force, marks=pytest.mark.slow) for force in (None, "gated")),
        pytest.param("flow", "gated", marks=pytest.mark.slow),
    ],
)
def test_policies_that_see_pixels(tmp_path: Path, monkeypatch, actor: str, force: str | None) -> None:
    """They are tried on pictures of their episodes, and on pictures of black and white points alone."""
    monkeypatch.setattr(policy_file, "OBSERVATIONS", 1_000 if actor == "pmoe" else 250)
    _, checkpoint = make_sac_policy(actor, force=force, env_id="InvertedPendulum-v5", pixels=GREY)
    path = tmp_path / "policy.onnx"
    assert main([written(decided(checkpoint), tmp_path), f"output={path}"]) == 0
    pixels = np.random.default_rng(0).integers(0, 256, (50, 2, 32, 32), dtype=np.uint8)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    actions = session.run(["action"], {"pixels": pixels})[0]
    policy = load_policy(checkpoint)
    rows = {"pixels": torch.from_numpy(pixels)}
    tied = near_ties(policy, "best_value" if actor == "pmoe" else "max_weight", rows, torch.tensor([3.0])).numpy()
    np.testing.assert_allclose(actions[~tied], policy.predict(pixels)[~tied], atol=3e-5)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["pixels"]) == GREY and json.loads(facts["env_kwargs"]) == {"max_episode_steps": 20}
    assert "its episodes in InvertedPendulum-v5" in facts["parity_source"]


def test_the_corners_of_pixels_are_black_and_white() -> None:
    inputs = with_extremes({"pixels": torch.full((300, 1, 4, 4), 7, dtype=torch.uint8)})["pixels"]
    assert inputs.dtype == torch.uint8 and (inputs[:200] == 7).all() and not inputs[-1].any()
    assert set(inputs[200:-1].unique().tolist()) == {0, 255}


@pytest.mark.slow
@pytest.mark.parametrize("actor", ["gaussian", "pmoe", "flow"])
@pytest.mark.parametrize("force", [None, "raw", "normalized", "gated"])
@pytest.mark.parametrize("critic", ["plain", "crossq", "layer_norm"])
def test_policies_of_sac(tmp_path: Path, actor: str, force: str | None, critic: str) -> None:
    normalize = force in (None, "gated")
    assert_acts_alike(decided(make_sac_policy(actor, force=force, critic=critic, normalize=normalize)[1]), tmp_path)


@pytest.mark.slow
def test_a_latent_policy_and_a_safe_one_of_a_single_candidate(tmp_path: Path) -> None:
    assert_acts_alike(make_sac_policy("latent")[1], tmp_path)
    (tmp_path / "policy.onnx").unlink()
    assert_acts_alike(make_sac_policy("gaussian", safe=True, num_candidates=1)[1], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("actor", ["gaussian", "pmoe", "additive_moe", "mcp", "options", "flow"])
def test_policies_of_ppo(tmp_path: Path, actor: str) -> None:
    facts = assert_acts_alike(make_policy("Hopper-v5", actor=actor)[1], tmp_path)
    assert json.loads(facts["inputs"]) == ["observation", "option_previous"][: 1 + (actor == "options")]


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_any_number_of_rows(tmp_path: Path, few: None, format: str) -> None:
    """None, one, and more than it was tried on at once."""
    _, checkpoint = make_policy("Pendulum-v1", actor="gaussian")
    path = tmp_path / f"policy.{format}"
    assert main([written(checkpoint, tmp_path), f"output={path}", f"format={format}"]) == 0
    policy = load_policy(checkpoint)
    for rows in (0, 1, 20_011):
        inputs = draw(policy, rows)
        if format == "onnx":
            actions = onnx_actions(path, inputs)
        else:
            actions = torch.export.load(path).module()(inputs)["action"].numpy(force=True)
        assert actions.shape == (rows, 1)
        np.testing.assert_allclose(actions, policy.predict(inputs["observation"]), atol=2e-5)


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["rule=sample"], 2, "rule=sample draws a new action every time"),
        (["rule=best"], 2, "unknown rule 'best'"),
        (["format=onxx"], 2, "unknown format 'onxx'"),
        (["outptu=x"], 2, "unknown argument 'outptu=x'"),
        (["output"], 2, "output needs a value"),
        (["rule=sample_component"], 1, "draws random numbers"),
        (["rule=best_value"], 1, "holds no action values"),
        (["output=.."], 2, "is a folder: name a file"),
        (["output=policy.ckpt"], 2, "policy.ckpt exists, and is not overwritten"),
        (["output=policy.ckpt/a.onnx"], 2, "policy.ckpt is not a folder"),
        (["output=a.pt2"], 2, "has the suffix of format=pt2"),
        (["output=a.onnx", "format=pt2"], 2, "has the suffix of format=onnx"),
        ([f"output={'a' * 300}"], 2, "File name too long"),
        (["env=NoSuch-v0"], 2, "unknown environment id 'NoSuch-v0'"),
        (["env=HalfCheetah-v5"], 2, "the policy maps 3 observations to 1 actions"),
        (["checkpoint=nowhere.ckpt"], 1, "nowhere.ckpt does not exist"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_a_line_and_leaves_no_file(
    tmp_path: Path, few: None, monkeypatch, capsys, words: list[str], code: int, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = written(make_policy()[1], tmp_path)
    assert main([checkpoint, *words]) == code
    said = capsys.readouterr().err
    assert line in said and said.startswith("error: ") and said.count("\n") == 1
    assert os.listdir(tmp_path) == ["policy.ckpt"]


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, few: None, capsys) -> None:
    _, checkpoint = make_policy()
    next(value for key, value in checkpoint["policy"]["state_dict"].items() if key.endswith("weight")).fill_(torch.nan)
    assert main([written(checkpoint, tmp_path), f"output={tmp_path}/a.onnx"]) == 1
    assert "weight is not finite" in capsys.readouterr().err and os.listdir(tmp_path) == ["policy.ckpt"]


def test_a_folder_that_may_not_be_written_in_is_refused_before_the_work(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(policy_file.os, "access", lambda folder, mode: False)  # whoever is root may write everywhere
    assert main([written(make_policy()[1], tmp_path), f"output={tmp_path}/new/a.onnx"]) == 2
    assert f"{tmp_path} may not be written in" in capsys.readouterr().err and os.listdir(tmp_path) == ["policy.ckpt"]


def test_a_safe_policy_that_draws_its_candidates_is_refused(tmp_path: Path, few: None, capsys) -> None:
    assert (
        main([written(make_sac_policy(safe=True, env_id="Pendulum-v1")[1], tmp_path), f"output={tmp_path}/a.onnx"]) == 1
    )
    assert "several candidates of a safe policy" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["policy.ckpt"]


def test_an_environment_that_is_not_here_is_replaced_by_draws_and_the_file_says_so(tmp_path: Path, few: None) -> None:
    _, checkpoint = make_policy("Pendulum-v1", actor="gaussian")
    checkpoint["policy"]["description"]["env"]["id"] = "Missing-v0"
    path = tmp_path / "policy.pt2"
    assert main([written(checkpoint, tmp_path), "format=pt2", f"output={path}"]) == 0
    extra = {METADATA_FILE: ""}
    torch.export.load(path, extra_files=extra)
    source = json.loads(extra[METADATA_FILE])["parity_source"]
    assert source.startswith("normal draws") and "unknown environment id 'Missing-v0'" in source


def test_without_the_extra_it_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    assert main([written(make_policy()[1], tmp_path), f"output={tmp_path}/policy.onnx"]) == 1
    line = "error: format onnx needs onnxscript, not installed here: pip install 'pmoe-lightning[onnx]'\n"
    assert capsys.readouterr().err == line and os.listdir(tmp_path) == ["policy.ckpt"]
    with pytest.raises(RunError, match="needs onnxscript"):
        FinalPolicy(export="onnx")


def test_near_ties_are_left_out_and_too_many_are_refused() -> None:
    """Two components of nearly the same weight everywhere: which of them acts is for rounding to say."""
    _, checkpoint = make_policy("Pendulum-v1", num_components=2, deterministic="max_weight")
    entry = policy_entry(checkpoint)
    state = entry["state_dict"]
    router = next(key.removesuffix("weight") for key in state if key.endswith("router.weight"))
    state[f"{router}weight"] = torch.zeros_like(state[f"{router}weight"])
    half_range, gaps = torch.tensor([2.0]), {}
    for gap in (5e-5, 5e-4):
        state[f"{router}bias"] = torch.tensor([0.0, gap])
        policy = build_policy(entry)
        inputs = with_extremes(draw(policy, 1_000))
        gaps[gap] = near_ties(policy, "max_weight", inputs, half_range).sum()
    # Only where the two modes differ does the choice matter.
    assert gaps[5e-4] == 0 and gaps[5e-5] > 900
    assert compare(policy, "max_weight", _itself(policy), inputs, half_range).largest_difference < 1e-6
    state[f"{router}bias"] = torch.tensor([0.0, 5e-5])
    policy = build_policy(entry)
    with pytest.raises(RunError, match="near-ties of the rule max_weight"):
        compare(policy, "max_weight", _itself(policy), inputs, half_range)


def test_a_file_that_acts_otherwise_is_refused() -> None:
    policy = build_policy(policy_entry(make_policy("Pendulum-v1", actor="gaussian")[1]))
    inputs, half_range = draw(policy, 1_000), torch.tensor([2.0])
    for wrong, size in ((3e-5, "1.5e-05"), (torch.nan, "inf")):

        def run(entries: Any, wrong: float = wrong) -> dict[str, torch.Tensor]:
            return {key: value + wrong for key, value in _itself(policy)(entries).items()}

        with pytest.raises(RunError, match=f"differ from the policy's by up to {size}"):
            compare(policy, "max_weight", run, inputs, half_range)


def _itself(policy: Any) -> Any:
    return lambda entries: {key: value.detach() for key, value in PolicyGraph(policy)(dict(entries)).items()}


def test_the_extremes_lie_far_outside() -> None:
    inputs = with_extremes({"observation": torch.randn(1_000, 3), "option_previous": torch.zeros(1_000, 1).long()})
    assert inputs["observation"][-100:-1].abs().min() > 5 and not inputs["observation"][-1].any()
    assert not inputs["option_previous"].any()


def test_words_are_read_as_those_of_the_other_commands() -> None:
    assert parse(["--checkpoint", "a b.ckpt", "--format=pt2"]).path == Path("policy.pt2")
    assert parse(["checkpoint='x=1.ckpt'", "output=", "config-dir=mine"]).config_dir == "mine"


@pytest.mark.slow
def test_a_run_leaves_its_best_policy_as_a_file(train: Any, tmp_path: Path) -> None:
    words = [
        "algo=ppo",
        "actor=gaussian",
        "env.id=Pendulum-v1",
        "total_frames=256",
        "data.frames_per_batch=128",
        "logger=none",
    ]
    words += ["logger=none", "callbacks=[minimal,checkpoint_last,final_policy]", "callbacks.final_policy.video=false"]
    said = train(*words, "callbacks.final_policy.export=onnx", "hydra.run.dir=run")
    assert "onnx_ir" not in said and "onnxscript" not in said
    (path,) = (tmp_path / "run" / "checkpoints").glob("*.onnx")
    policy = load_policy(path.with_suffix(".ckpt"))
    inputs = draw(policy, 100)
    expected = policy(TensorDict(inputs, batch_size=100))["action"].detach()
    np.testing.assert_allclose(onnx_actions(path, inputs), expected, atol=2e-5)
