"""Go on training the policy behind an alias of the MLflow model registry, as a plain TorchRL program.

    python -m pmoe_lightning.train algo=sac env=Pendulum-v1 total_frames=10000 callbacks.final_policy.register_as=swing
    python -c "import mlflow; mlflow.MlflowClient().set_registered_model_alias('swing', 'champion', 1)"
    python examples/finetune_from_registry.py models:/swing@champion [--frames 2000] [--save finetuned.ckpt]
    python -m pmoe_lightning.evaluate checkpoint=finetuned.ckpt

Any policy trained with ``algo=sac`` and without an action transform will do. Its checkpoint brings the critics along,
so the policy is not led astray by new ones. (``python -m pmoe_lightning.train resume=<MLflow run id> total_frames=...``
goes on with the run itself.)
"""

import argparse
import sys

import torch
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.objectives import SoftUpdate

from pmoe_lightning import PMOESACLoss, load_policy, make_env, make_qvalue_network
from pmoe_lightning.checkpoints import read_checkpoint, resolve_checkpoint, write_checkpoint
from pmoe_lightning.evaluation import evaluate_policy

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="models:/<name>@<alias>, models:/<name>/<version>, an MLflow run id or a checkpoint")
parser.add_argument("--frames", type=int, default=2_000)
parser.add_argument("--save", default="finetuned.ckpt")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

torch.manual_seed(arguments.seed)
checkpoint = read_checkpoint(resolve_checkpoint(arguments.model))
entry = checkpoint["policy"]
task = entry["description"]["env"]
if not entry["action_values"] or entry["description"]["action_transform"]:
    sys.exit(f"{arguments.model} is not a policy of algo=sac without an action transform")

actor = load_policy(checkpoint)  # acts deterministically, unless a collector asks it to explore
sizes = entry["description"]["observation_dim"], len(entry["description"]["action_low"])
critics = [make_qvalue_network(*sizes, **entry["description"]["critic"]) for _ in entry["action_values"]]
for critic, weights in zip(critics, entry["action_values"], strict=True):
    critic.load_state_dict(weights)


def mean_return() -> float:
    env = make_env(task["id"], num_envs=5, seed=arguments.seed + 1, **task["kwargs"])
    return float(evaluate_policy(actor, env, episodes=5, seed=arguments.seed + 1).mean)


before = mean_return()
loss = PMOESACLoss(actor, critics, alpha_init=0.05, target_entropy=-float(sizes[1]))
loss.make_value_estimator(gamma=0.99)
targets = SoftUpdate(loss, tau=0.005)
optimizer = torch.optim.Adam(loss.parameters(), lr=1e-4)
buffer = ReplayBuffer(storage=LazyTensorStorage(arguments.frames), batch_size=256)
env = make_env(task["id"], num_envs=4, seed=arguments.seed, **task["kwargs"])
frames = {"frames_per_batch": 64, "total_frames": arguments.frames}
for rollout in Collector(env, actor, **frames, auto_register_policy_transforms=False):
    buffer.extend(rollout.reshape(-1))
    for _ in range(64):
        out = loss(buffer.sample())
        optimizer.zero_grad()
        sum(value for name, value in out.items() if name.startswith("loss_")).backward()
        optimizer.step()
        targets.step()

entry["state_dict"] = dict(actor.state_dict())
write_checkpoint({"policy": {**entry, "action_values": []}}, arguments.save)
print(f"return {before:.1f} before, {mean_return():.1f} after {arguments.frames:,} frames; saved as {arguments.save}")
