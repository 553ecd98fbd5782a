"""PPO and SAC of TorchRL's own parts, put together as its recipes put them together: a peer for ``speed.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict.nn import AddStateIndependentNormalScale, NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import DoubleToFloat, EnvBase, RewardSum, SerialEnv, StepCounter, TransformedEnv, VecNormV2
from torchrl.envs.libs.gym import GymEnv
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, SACLoss, SoftUpdate
from torchrl.objectives.value import GAE

Mark = Callable[[int], None]


def make_env(env_id: str, num_envs: int, normalize: bool) -> EnvBase:
    base = GymEnv(env_id) if num_envs == 1 else SerialEnv(num_envs, lambda: GymEnv(env_id))
    env = TransformedEnv(base)
    env.append_transform(DoubleToFloat(in_keys=["observation"]))
    if normalize:
        env.append_transform(VecNormV2(in_keys=["observation"]))
    env.append_transform(RewardSum())
    env.append_transform(StepCounter())
    return env


def make_actor(env: EnvBase, cells: list[int], activation: type[nn.Module], *, state_dependent: bool) -> nn.Module:
    sizes = {"num_cells": cells, "activation_class": activation}
    dim = env.action_spec.shape[-1]
    if state_dependent:
        network = nn.Sequential(MLP(out_features=2 * dim, **sizes), NormalParamExtractor())
    else:
        network = nn.Sequential(MLP(out_features=dim, **sizes), AddStateIndependentNormalScale(dim))
    return ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=env.action_spec_unbatched,
        distribution_class=TanhNormal,
        return_log_prob=not state_dependent,
    )


def train(algo: str, env_id: str, num_envs: int, frames: int, mark: Mark) -> None:
    """Train for ``frames`` environment frames, calling ``mark`` with their number."""
    torch.set_num_threads(1)
    {"ppo": train_ppo, "sac": train_sac}[algo](env_id, num_envs, frames, mark)


def train_ppo(env_id: str, num_envs: int, frames: int, mark: Mark) -> None:
    env = make_env(env_id, num_envs, normalize=True)
    actor = make_actor(env, [64, 64], nn.Tanh, state_dependent=False)
    critic = ValueOperator(MLP(out_features=1, num_cells=[64, 64], activation_class=nn.Tanh), in_keys=["observation"])
    with torch.no_grad():
        state = env.reset()
        critic(actor(state))
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=False)
    loss = ClipPPOLoss(
        actor, critic, clip_epsilon=0.2, entropy_coeff=0.0, loss_critic_type="l2", normalize_advantage=True
    )
    adam = torch.optim.Adam(loss.parameters(), lr=3e-4, eps=1e-5)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(2048), sampler=SamplerWithoutReplacement(), batch_size=64)
    collector = Collector(env, actor, frames_per_batch=2048, total_frames=frames, auto_register_policy_transforms=False)
    done = 0
    for rollout in collector:
        done += rollout.numel()
        for _ in range(10):
            with torch.no_grad():
                rollout = advantage(rollout)
            buffer.extend(rollout.reshape(-1))
            for minibatch in (buffer.sample() for _ in range(2048 // 64)):
                out = loss(minibatch)
                (out["loss_objective"] + out["loss_entropy"] + out["loss_critic"]).backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                adam.step()
                adam.zero_grad()
        mark(done)
    collector.shutdown()


def train_sac(env_id: str, num_envs: int, frames: int, mark: Mark) -> None:
    env = make_env(env_id, num_envs, normalize=False)
    actor = make_actor(env, [256, 256], nn.ReLU, state_dependent=True)
    critic = ValueOperator(
        MLP(out_features=1, num_cells=[256, 256], activation_class=nn.ReLU), in_keys=["action", "observation"]
    )
    with torch.no_grad():
        critic(actor(env.reset()))
    loss = SACLoss(actor, critic, num_qvalue_nets=2, delay_qvalue=True, action_spec=env.action_spec_unbatched)
    loss.make_value_estimator(gamma=0.99)
    targets = SoftUpdate(loss, tau=0.005)
    adam = torch.optim.Adam(loss.parameters(), lr=3e-4)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(frames), batch_size=256)
    collector = Collector(
        env,
        actor,
        frames_per_batch=num_envs,
        total_frames=frames,
        init_random_frames=1000,
        auto_register_policy_transforms=False,
    )
    done = 0
    for rollout in collector:
        done += rollout.numel()
        buffer.extend(rollout.reshape(-1))
        for _ in range(rollout.numel() if done > 1000 else 0):
            out = loss(buffer.sample())
            (out["loss_actor"] + out["loss_qvalue"] + out["loss_alpha"]).backward()
            adam.step()
            adam.zero_grad()
            targets.step()
        mark(done)
    collector.shutdown()
