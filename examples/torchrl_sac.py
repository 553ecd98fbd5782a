"""Soft actor-critic with a mixture policy, as a plain TorchRL program.

    python examples/torchrl_sac.py [--env Pendulum-v1] [--frames 10000]

Of pmoe_lightning it takes the actor, the gradient estimator, the Hamiltonian transform and the loss; the environment,
collector, replay buffer and target update are TorchRL's. Prints the return of training episodes as it goes, and at the
end that of the deterministic policy. Ten thousand frames take some minutes on one core.
"""

import argparse

import torch
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import Compose, DoubleToFloat, GymEnv, RewardSum, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

from pmoe_lightning import (
    Marginalized,
    PMOESACLoss,
    make_hamiltonian_transform,
    make_pmoe_actor,
    make_qvalue_network,
)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--env", default="Pendulum-v1", help="a Gymnasium id with continuous actions")
parser.add_argument("--frames", type=int, default=10_000)
parser.add_argument("--warmup", type=int, default=1_000, help="frames of random actions before learning begins")
parser.add_argument("--episodes", type=int, default=5, help="of the evaluation at the end")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()


def make_env() -> TransformedEnv:
    return TransformedEnv(GymEnv(arguments.env), Compose(DoubleToFloat(), RewardSum()))


torch.manual_seed(arguments.seed)
env = make_env()
env.set_seed(arguments.seed)
sizes = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]
low, high = env.action_spec.space.low, env.action_spec.space.high

# A mixture of four Gaussians, two critics, an unbiased estimator, and actions that follow the slope of the critics.
actor = make_pmoe_actor(sizes[0], low, high, num_components=4, hidden_sizes=(128, 128))
critics = [make_qvalue_network(*sizes, hidden_sizes=(128, 128)) for _ in range(2)]
transform = make_hamiltonian_transform(*sizes, force="gated", num_leapfrog_steps=2, step_size=0.05)
loss = PMOESACLoss(
    actor, critics, estimator=Marginalized(), action_transform=transform, target_entropy=-float(sizes[1])
)
loss.make_value_estimator(gamma=0.99)
targets = SoftUpdate(loss, tau=0.005)
optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
policy = loss.acting_policy(actor)  # the actor, and the transform behind it with the live critics

# One update per frame. The losses touch disjoint parameters, so one optimizer steps their sum.
buffer = ReplayBuffer(storage=LazyTensorStorage(arguments.frames), batch_size=128)
collector = Collector(
    env,
    policy,
    frames_per_batch=50,
    total_frames=arguments.frames,
    init_random_frames=arguments.warmup,
    auto_register_policy_transforms=False,  # what TorchRL would add is for policies with a memory
)
for iteration, rollout in enumerate(collector, 1):
    buffer.extend(rollout.reshape(-1))
    for _ in range(50 if len(buffer) >= arguments.warmup else 0):
        out = loss(buffer.sample())
        optimizer.zero_grad()
        sum(value for name, value in out.items() if name.startswith("loss_")).backward()
        optimizer.step()
        targets.step()
    for episode_return in rollout["next", "episode_reward"][rollout["next", "done"]]:
        print(f"{50 * iteration:>7} frames, return {episode_return:.1f}")
collector.shutdown()

with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
    evaluation = make_env()
    evaluation.set_seed(arguments.seed + 1)
    returns = [evaluation.rollout(1_000, policy)["next", "reward"].sum() for _ in range(arguments.episodes)]
print(f"deterministic policy: return {torch.stack(returns).mean():.1f} over {len(returns)} episodes")
