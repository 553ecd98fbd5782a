"""Go on training the policy behind an alias of the MLflow model registry, as a plain TorchRL program.

    python -m pmoe_lightning.train algo=sac env=Pendulum-v1 total_frames=10000 callbacks.final_policy.register_as=swing
    python -c "import mlflow; mlflow.MlflowClient().set_registered_model_alias('swing', 'champion', 1)"
    python examples/finetune_from_registry.py models:/swing@champion [--frames 2000] [--save finetuned.ckpt]
    python -m pmoe_lightning.evaluate checkpoint=finetuned.ckpt

Every model that the train command registers will do: what was trained by SAC, with or without an action transform or a
limit on cost, goes on with SAC, what was trained by PPO with PPO. Critics, temperature and multiplier come along in the
checkpoint, so the policy is not led astray by new ones; the optimizers start afresh, and the actor's gradient is the
exact one. (``python -m pmoe_lightning.train resume=<MLflow run id> total_frames=...`` goes on with the run itself.)
"""

import argparse
import sys

import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.objectives import SoftUpdate
from torchrl.objectives.value import GAE

from pmoe_lightning import (
    CostConstraint,
    Frequency,
    PMOEPPOLoss,
    PMOESACLoss,
    SafeSACLoss,
    load_policy,
    make_env,
    make_hamiltonian_transform,
    make_qvalue_network,
    make_value_network,
)
from pmoe_lightning.checkpoints import read_checkpoint, write_checkpoint
from pmoe_lightning.checkpoints.policy import make_critic
from pmoe_lightning.evaluation.episodes import evaluate_policy
from pmoe_lightning.tracking.references import resolve_checkpoint

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="models:/<name>@<alias>, models:/<name>/<version>, an MLflow run id or a checkpoint")
parser.add_argument("--frames", type=int, default=2_000)
parser.add_argument("--gamma", type=float, default=0.99, help="discount of the training, algo.gamma")
parser.add_argument("--save", default="finetuned.ckpt")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

torch.manual_seed(arguments.seed)
checkpoint = read_checkpoint(resolve_checkpoint(arguments.model))
entry = checkpoint["policy"]
description, task = entry["description"], entry["description"]["env"]
if description["actor"] == "options":
    sys.exit(f"{arguments.model} acts through options, which need DACLoss: go on with its run, resume=<MLflow run id>")
loaded = load_policy(checkpoint, rule="max_weight")  # with the bare actor inside, which a collector lets explore
actor = loaded.actor
sizes = description["observation_dim"], len(description["action_low"])
critic = description["critic"] | {"observation_key": actor.in_keys[0]}
weights = {key.removeprefix("loss."): value for key, value in checkpoint["state_dict"].items()}


def mean_return(policy_entry: dict) -> float:
    """Of the policy as it is evaluated, by the rule of its training."""
    env = make_env(task["id"], num_envs=5, seed=arguments.seed + 1, **task["kwargs"])
    return evaluate_policy(load_policy({"policy": policy_entry}), env, episodes=5, seed=arguments.seed + 1).mean


def restore(loss: torch.nn.Module) -> None:
    """Critics, targets, temperature and multiplier as they were. Estimators may leave over what is theirs alone."""
    missing, _ = loss.load_state_dict(weights, strict=False)
    assert not missing, missing


def step(loss: torch.nn.Module, optimizer: torch.optim.Optimizer, minibatch: TensorDict) -> TensorDict:
    out = loss(minibatch)
    optimizer.zero_grad()
    sum(value for name, value in out.items() if name.startswith("loss_")).backward()
    torch.nn.utils.clip_grad_norm_(loss.parameters(), 10.0)
    optimizer.step()
    return out


def rollouts(policy: torch.nn.Module, frames_per_batch: int) -> Collector:
    env = make_env(task["id"], num_envs=4, seed=arguments.seed, **task["kwargs"])
    frames = {"frames_per_batch": frames_per_batch, "total_frames": arguments.frames}
    return Collector(env, policy, **frames, auto_register_policy_transforms=False)


def critics_of(loss: torch.nn.Module) -> list[dict]:
    """The weights of every action value, for the rule best_value."""
    stacked = loss.qvalue_network_params.data.flatten_keys(".")
    if not stacked.batch_size:
        return [dict(stacked.clone().items())]
    return [dict(stacked[i].clone().items()) for i in range(len(stacked))]


def train_sac() -> tuple[dict, list[dict]]:
    """An update per frame, of the loss that the policy was trained by."""
    if description["normalize_observation"]:
        sys.exit(f"{arguments.model} normalises what it replays: go on with its run, resume=<MLflow run id>")

    def pair() -> list:
        return [make_critic(description) for _ in range(2)]

    transform, constraint = description["action_transform"], description["safe"]
    options = {"action_transform": make_hamiltonian_transform(*sizes, **transform) if transform else None}
    if constraint:
        loss = SafeSACLoss(actor, pair(), pair(), CostConstraint(**constraint), **options)
    else:
        loss = PMOESACLoss(actor, pair(), **options)
    loss.make_value_estimator(gamma=arguments.gamma)
    restore(loss)
    policy = loss.acting_policy(actor)
    targets = SoftUpdate(loss, tau=0.005) if loss.delay_qvalue else None  # critic=crossq has none
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-4)
    buffer = ReplayBuffer(storage=LazyTensorStorage(arguments.frames), batch_size=256)
    for rollout in rollouts(policy, 64):
        buffer.extend(rollout.reshape(-1))
        for _ in range(64):
            loss.take_statistics(step(loss, optimizer, buffer.sample()).get("statistics", None))
            if targets is not None:
                targets.step()
    return dict(policy.state_dict()), critics_of(loss)


def train_ppo() -> tuple[dict, list[dict]]:
    """Four passes over every rollout, which the statistics of the training normalise and scale, as they are."""
    routed = bool(entry["action_values"])  # by the estimator "frequency", which ranks components by an action value
    qvalue = make_qvalue_network(*sizes, **critic) if routed else None
    value = make_value_network(sizes[0], **critic)
    routing = Frequency() if routed else None
    loss = PMOEPPOLoss(actor, value, qvalue, routing=routing, normalize_advantage=True)
    restore(loss)
    advantages = GAE(gamma=arguments.gamma, lmbda=0.95, value_network=loss.critic_network)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-4)
    scaler = checkpoint["OnPolicyData"].get("reward_scaler")
    for rollout in rollouts(loaded.policy, 512):
        if description["normalize_observation"]:
            loaded.policy[0](rollout.get("next"))
        if scaler:
            rollout["next", "reward"] *= (scaler["var"] + 1e-8).rsqrt()
        with torch.no_grad():
            advantages(rollout)
        transitions = rollout.reshape(-1)
        for _ in range(4):
            for minibatch in transitions[torch.randperm(len(transitions))].split(64):
                step(loss, optimizer, minibatch)
    return dict(loaded.policy.state_dict()), critics_of(loss) if routed else []


before = mean_return(entry)
trained_on_policy = description["arguments"].get("return_log_prob", False)  # PPO stores what it will compare with
state_dict, action_values = train_ppo() if trained_on_policy else train_sac()
finetuned = entry | {"state_dict": state_dict, "action_values": action_values}
write_checkpoint({"policy": finetuned}, arguments.save)
after = mean_return(finetuned)
print(f"return {before:.1f} before, {after:.1f} after {arguments.frames:,} frames; saved as {arguments.save}")
