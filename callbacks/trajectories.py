"""Where a Hamiltonian transform takes actions, drawn over the action value."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from lightning.pytorch import Callback
from matplotlib.figure import Figure
from tensordict import TensorDict

from pmoe_lightning.evaluation import figures
from pmoe_lightning.limits import Limit, PositiveInt, checked

from .interval import FrameInterval
from .reporting import log_figure, warn_on_failure

if TYPE_CHECKING:
    from .contract import AbstractAlgorithm, Trainer


class ActionTrajectories(Callback):
    """The figure ``action_trajectories``: sampled trajectories of the action transform over min_i Q_i(s, a).

    For tasks with two action dimensions and algorithms with an action transform; others are left alone. Global random
    states are as before afterwards, so training is not changed.

    Args:
        every_frames: environment frames between two versions of the figure, which is also logged at the end.
        num_states: recent states, one panel each.
        num_actions: trajectories per state.
        resolution: cells of the action value along each dimension.
    """

    @checked
    def __init__(
        self,
        every_frames: PositiveInt = 100_000,
        num_states: PositiveInt = 4,
        num_actions: PositiveInt = 12,
        resolution: Annotated[int, Limit(low=2)] = 60,
    ) -> None:
        self._interval, self.num_states = FrameInterval(every_frames), num_states
        self.num_actions, self.resolution = num_actions, resolution

    def on_train_start(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        self._interval.start(trainer.datamodule.env_frames)

    def state_dict(self) -> dict[str, Any]:
        return {"frames": self._interval.frames}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._interval.frames = state_dict["frames"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: AbstractAlgorithm, *_: Any) -> None:
        if self._interval.is_due(trainer.datamodule.env_frames):
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        if self._interval.has_rest(trainer.datamodule.env_frames):
            self._log(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: AbstractAlgorithm, exception: BaseException) -> None:
        with warn_on_failure("the trajectories were not logged"):
            self.on_train_end(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        frames = trainer.datamodule.env_frames
        self._interval.mark(frames)
        transform = pl_module.action_transform
        drawable = transform is not None and transform.num_leapfrog_steps > 0 and pl_module.last_observation is not None
        if drawable and pl_module.actor.get_dist(_states(pl_module, 1)).loc.shape[-1] == 2:
            log_figure(trainer, "action_trajectories", partial(self.draw, pl_module), frames)

    @torch.no_grad()
    def draw(self, algorithm: AbstractAlgorithm) -> Figure:
        """The figure for the states that the algorithm trained on last."""
        states = _states(algorithm, self.num_states)
        distribution = algorithm.actor.get_dist(states.copy())
        devices = [distribution.loc.device] if distribution.loc.device.type == "cuda" else []
        transform, state = algorithm.action_transform, algorithm.loss.state_of(states, distribution)
        assert transform is not None, "where there is none, there is nothing to draw"
        with torch.random.fork_rng(devices=devices):
            u = distribution.rsample_unsquashed((self.num_actions,))
            positions = transform.trajectory(u, transform.sample_momentum(u), **state).positions
        paths = distribution.squash(torch.stack(positions)).permute(2, 1, 0, 3)
        centre = (torch.arange(self.resolution, device=u.device) + 0.5) / self.resolution
        low, high = (bound.expand(2) for bound in (distribution.low, distribution.high))
        x, y = (low[d] + (high[d] - low[d]) * centre for d in range(2))
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).unsqueeze(-2)
        grid = grid.expand(-1, -1, len(states), -1)
        values = state["qvalue"](distribution.normalize(grid))[0].min(0).values.permute(2, 0, 1)
        return figures.action_trajectories(*(tensor.cpu().numpy() for tensor in (values, paths, low, high)))


def _states(algorithm: AbstractAlgorithm, number: int) -> TensorDict:
    observation = algorithm.last_observation
    assert observation is not None, "there are states to draw once there was an update"
    observation = observation[:: max(1, len(observation) // number)][:number]
    return TensorDict({algorithm.observation_key: observation}, batch_size=[len(observation)])
