"""Exported policies of every kind beside those that they were made of, in a process without PyTorch and this package.

    python benchmarks/exported.py run --folder outputs/exported [--only 'sac flow']    # an hour of one core in all
    python benchmarks/exported.py table --folder outputs/exported                      # what is there, as a table

A row trains a policy for some thousand frames, exports it by the command, and then acts by ONNX Runtime alone, where an
import of torch or of this package fails: for a thousand logged observations, which are none of those that the export
compared, and for 20 episodes of the examples' loops. It stands if no action differs by more than 1e-5 of its normalised
range and the mean return lies within two standard errors of that of ``evaluate`` with the same seeds. Near-ties of a
rule, where rounding decides, are counted and left out of the actions, as in the export. A row that is there is not made
again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pmoe_lightning.checkpoints.files import read_checkpoint
from pmoe_lightning.checkpoints.policy import build_policy, policy_entry, trained_rule
from pmoe_lightning.evaluate import Request, find_environment
from pmoe_lightning.exporting.graph import PolicyGraph
from pmoe_lightning.exporting.observations import observe
from pmoe_lightning.exporting.parity import TOLERANCE, near_ties

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
OBSERVATIONS, EPISODES = 1_000, 20
_SEED = 10_000  # of the logged episodes: the export has its own from 0 on

#: Run by a Python that has neither: the actions of logged observations, and the returns of a loop.
ALONE = """
import json, runpy, sys
import numpy as np, onnxruntime
absent = ["pmoe_lightning", "torch", "tensordict", "torchrl", "lightning"]
sys.modules |= dict.fromkeys(absent)  # importing these now fails
path, logged, loop, episodes = sys.argv[1:]
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
with np.load(logged) as rows:
    inputs = {name: rows[name] for name in rows.files}
actions = session.run(["action"], inputs)[0]
sys.argv = [loop, path, "--episodes", episodes]
returns = runpy.run_path(loop, run_name="__main__")["returns"]
loaded = {name.split(".")[0] for name, module in sys.modules.items() if module is not None}
assert not loaded.intersection(absent)
print(json.dumps({"actions": actions.tolist(), "returns": returns}))
"""

_SIZES = ["algo.hidden_sizes=[64,64]", "actor.hidden_sizes=[64,64]"]
_QUIET = ["compile=false", "logger=none", "callbacks=minimal"]
PPO = ["algo=ppo", "env=Pendulum-v1", "total_frames=10_240", *_SIZES, *_QUIET]
SAC = ["algo=sac", "data.init_random_frames=1000", "data.utd_ratio=0.25", "data.batch_size=64", *_SIZES, *_QUIET]
STATE = ["env=Pendulum-v1", "total_frames=5000", "algo.lr=1e-3"]
PIXELS = ["encoder=drq", "encoder.channels=[16,32,32]", "encoder.strides=[2,2,2]", "data.buffer_size=8000"]
SUITE = [*PIXELS, "env=dm_control", "env.task=cartpole-swingup", "env.action_repeat=8", "env.pixels.size=48"]
SUITE += ["env.pixels.grey=true", "env.pixels.look=fast", "total_frames=4000"]
COLOUR = [*PIXELS, "env=InvertedPendulum-v5", "env.pixels.size=48", "total_frames=1600"]
_ESTIMATORS = {"gaussian": "pathwise", "pmoe": "frequency", "flow": "pathwise"}


class Row(NamedTuple):
    """A kind of policy and the words that train it."""

    name: str
    words: list[str]


def rows() -> list[Row]:
    """Every algorithm, actor, transform and sight that go together: PPO has no transform, and sees the state."""
    made = [Row(f"ppo {actor}", [*PPO, *_actor("ppo", actor)]) for actor in _ESTIMATORS]
    for sight, words in (("", STATE), ("pixels", SUITE)):
        for actor in _ESTIMATORS:
            for force in ("", "gated"):
                transform = [f"action_transform=hamiltonian_{force}"] if force else []
                normal = ["data.normalize_observation=true"] if force and not sight else []
                name = " ".join(filter(None, ("sac", actor, force, sight)))
                made.append(Row(name, [*SAC, *words, *_actor("sac", actor), *transform, *normal]))
    for force, critic in (("raw", "crossq"), ("normalized", "layer_norm")):
        words = [*_actor("sac", "pmoe"), f"action_transform=hamiltonian_{force}", f"critic={critic}"]
        made.append(Row(f"sac pmoe {force} {critic}", [*SAC, *STATE, *words]))
    made.append(Row("sac pmoe gated coloured pixels", [*SAC, *COLOUR, "action_transform=hamiltonian_gated"]))
    made.append(Row("sac latent", [*SAC, *STATE, "actor=latent", "estimator=pathwise"]))
    made.append(Row("dac options", [*PPO, "algo=dac", "actor=options"]))
    return made


def _actor(algo: str, actor: str) -> list[str]:
    estimator = _ESTIMATORS[actor] if algo == "sac" else "marginalized"
    return [f"actor={actor}", f"estimator={estimator}"]


def measure(row: Row, folder: Path) -> dict[str, Any]:
    """Train it, export it, and act with both."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, path = folder / "run" / "checkpoints" / "last.ckpt", folder / "policy.onnx"
    if not checkpoint.exists():
        _command("train", *row.words, f"hydra.run.dir={folder / 'run'}")
    path.unlink(missing_ok=True)
    written = _command("export", f"checkpoint={checkpoint}", f"output={path}")
    entry = policy_entry(read_checkpoint(checkpoint))
    rule, policy = trained_rule(entry), build_policy(entry).requires_grad_(False)
    make, env_id, arguments = find_environment(Request(str(checkpoint)), entry["description"], {})
    inputs = observe(policy, partial(make, id=env_id, **arguments), OBSERVATIONS, seed=_SEED)
    np.savez(folder / "logged.npz", **{key: values.numpy() for key, values in inputs.items()})
    loop = EXAMPLES / ("onnxruntime_loop.py" if policy.pixels is None else "onnxruntime_pixels.py")
    command = [sys.executable, "-c", ALONE, str(path), str(folder / "logged.npz"), str(loop), str(EPISODES)]
    alone = json.loads(_output(command).splitlines()[-1])
    judged = json.loads(_command("evaluate", f"checkpoint={checkpoint}", f"episodes={EPISODES}", "--json"))
    low, high = (torch.tensor(entry["description"][f"action_{end}"]) for end in ("low", "high"))
    with torch.no_grad():
        expected, tied = PolicyGraph(policy)(inputs)["action"], near_ties(policy, rule, inputs, (high - low) / 2)
    apart = (torch.tensor(alone["actions"]) - expected).div((high - low) / 2).abs().amax(-1)
    returns = np.array(judged["returns"])
    return {
        "row": row.name,
        "rule": rule,
        "bytes": path.stat().st_size,
        "largest_difference": apart[~tied].max().item(),
        "near_ties": int(tied.sum()),
        "return_file": float(np.mean(alone["returns"])),
        "return_evaluate": float(returns.mean()),
        "standard_error": float(returns.std(ddof=1) / EPISODES**0.5),
        "exported": written.splitlines()[-2:],
    }


def stands(found: dict[str, Any]) -> bool:
    """Whether the file acts as the policy."""
    near = abs(found["return_file"] - found["return_evaluate"]) <= 2 * found["standard_error"]
    return found["largest_difference"] <= TOLERANCE and near


def _command(name: str, *words: str) -> str:
    return _output([sys.executable, "-m", f"pmoe_lightning.{name}", *words])


def _output(command: list[str]) -> str:
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
    return done.stdout


def table(folder: Path) -> int:
    """Print what is there; 1 where a row is missing or does not stand."""
    print("| policy | rule | largest difference | near-ties of 1,000 | return of the file | of `evaluate` | stands |")
    print("|---|---|---|---|---|---|---|")
    missing = 0
    for row in rows():
        path = folder / row.name.replace(" ", "-") / "found.json"
        found = json.loads(path.read_text()) if path.exists() else None
        missing += found is None or not stands(found)
        if found is None:
            print(f"| {row.name} | | | | | | missing |")
            continue
        judged = f"{found['return_evaluate']:.2f} +- {found['standard_error']:.2f}"
        cells = [row.name, found["rule"], f"{found['largest_difference']:.1e}", found["near_ties"]]
        cells += [f"{found['return_file']:.2f}", judged, "yes" if stands(found) else "no"]
        print("|", " | ".join(map(str, cells)), "|")
    return int(missing > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--folder", type=Path, default=Path("outputs/exported"))
    parser.add_argument("--only", default="", help="rows whose names hold this, for example 'sac pmoe'")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    for row in rows() if arguments.what == "run" else []:
        place = folder / row.name.replace(" ", "-")
        if arguments.only not in row.name or (place / "found.json").exists():
            continue
        try:
            found = measure(row, place)
            (place / "found.json").write_text(json.dumps(found, indent=1))
            print(json.dumps(found), flush=True)
        except RuntimeError as error:  # what a command says where it refuses; the next rows are to be seen
            print(f"{row.name}: {error}", flush=True)
    return table(folder)


if __name__ == "__main__":
    sys.exit(main())
