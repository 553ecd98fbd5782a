"""Proximal policy optimisation with a mixture policy, as a plain TorchRL program.

    python examples/torchrl_ppo.py [--env InvertedPendulum-v5] [--frames 30000]

Of pmoe_lightning it takes the actor, the batch of environments and the loss; the collector and the advantages are
TorchRL's. The router is trained by the frequency loss, which ranks components by an action value. Prints the mean
return of the episodes that ended, rollout by rollout.
"""

import argparse

import torch
from torchrl.collectors import Collector
from torchrl.objectives.value import GAE

from pmoe_lightning import (
    Frequency,
    PMOEPPOLoss,
    make_env,
    make_pmoe_actor,
    make_qvalue_network,
    make_value_network,
)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--env", default="InvertedPendulum-v5", help="a Gymnasium id with continuous actions")
parser.add_argument("--frames", type=int, default=30_000)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

torch.manual_seed(arguments.seed)
env = make_env(arguments.env, num_envs=8, seed=arguments.seed)
sizes = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]
low, high = env.action_spec.space.low[0], env.action_spec.space.high[0]  # one row per environment, all the same

# return_log_prob stores the action before tanh, too: scored there, the first ratio is one however saturated the action.
small = {"hidden_sizes": (64, 64), "activation": "tanh", "initialization": "orthogonal"}
actor = make_pmoe_actor(sizes[0], low, high, scale="state_independent", return_log_prob=True, **small)
value, qvalue = make_value_network(sizes[0], **small), make_qvalue_network(*sizes, **small)
loss = PMOEPPOLoss(actor, value, qvalue, routing=Frequency(), normalize_advantage=True, entropy_coeff=0.001)
advantages = GAE(gamma=0.99, lmbda=0.95, value_network=value)
optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)

collector = Collector(
    env,
    actor,
    frames_per_batch=2_048,
    total_frames=arguments.frames,
    auto_register_policy_transforms=False,  # what TorchRL would add is for policies with a memory
)
for iteration, rollout in enumerate(collector, 1):
    with torch.no_grad():
        advantages(rollout)
    transitions = rollout.reshape(-1)
    for _ in range(10):
        for minibatch in transitions[torch.randperm(len(transitions))].split(256):
            out = loss(minibatch)
            optimizer.zero_grad()
            sum(value for name, value in out.items() if name.startswith("loss_")).backward()
            torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
            optimizer.step()
    ended = rollout["next", "episode_return"][rollout["next", "done"]]
    if len(ended):
        print(f"{2_048 * iteration:>7} frames, {len(ended)} episodes, return {ended.mean():.1f}")
collector.shutdown()
