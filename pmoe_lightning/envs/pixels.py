"""Pixels in place of the state: any environment, seen through its own camera."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image

from pmoe_lightning.envs.base import AbstractEnvironment, Arrays, Entry
from pmoe_lightning.envs.rendering import Look, SceneRenderer, checked_picture, choose_headless_renderer
from pmoe_lightning.errors import ConfigurationError
from pmoe_lightning.limits import Flag, Limit, checked

__all__ = ["PixelEnvironment", "see_pixels"]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of Rec. 601
Side = Annotated[int, Limit(low=16, high=512)]
Stack = Annotated[int, Limit(low=1, high=16)]


class PixelEnvironment(AbstractEnvironment):
    """N environments whose observations are the last pictures of each; keys as of :class:`AbstractEnvironment`, and

    ``pixels`` uint8 [N, S C, H, H] in place of ``observation``: S pictures of C channels, the newest last. Where an
    episode begins its first picture stands S times. Everything else, rewards, ends, costs and what is captured, is that
    of the environments within. What they observe themselves is not seen, but a simulator whose state is not finite is
    still a breakdown; the picture before then stays.

    MuJoCo draws at size H itself, where an environment names its ``scene``; another's ``picture()`` is averaged down.

    Args:
        envs: one :class:`AbstractEnvironment` of a single environment each. They are closed with this environment.
        seed: environment i receives ``seed + i`` at its first reset.
        carry: entries handed on to the next step.
        size: H, in pixels.
        grey: one channel (luma of Rec. 601) in place of red, green and blue.
        stack: S.
        look: ``default`` draws what the model asks for; ``fast`` leaves out shadows and samples every pixel once.

    Raises:
        ConfigurationError: an argument is not what it may be.
        RunError: this machine or environment cannot draw; says what to do.
    """

    @checked
    def __init__(
        self,
        envs: Sequence[AbstractEnvironment],
        *,
        seed: int | None = None,
        carry: Sequence[str] = (),
        size: Side = 84,
        grey: Flag = False,
        stack: Stack = 3,
        look: Look = "default",
    ) -> None:
        self.size, self.grey, self.stack, self.look = size, grey, stack, look
        self.channels = 1 if grey else 3
        first = envs[0]
        super().__init__(
            num_envs=len(envs),
            observed=("pixels", Entry((stack * self.channels, size, size), torch.uint8)),
            low=first._action_low,
            high=first._action_high,
            name=first.name,
            seed=seed,
            carry=carry,
            has_cost=first._has_cost,
        )
        choose_headless_renderer()
        self.envs, self.action_repeat = list(envs), first.action_repeat
        self._inner = [{**env.empty_root(), **env.empty_outcome()} for env in envs]
        self._renderers: list[SceneRenderer | None] = [None] * len(envs)
        self._seen = np.zeros((len(envs), *self.entries["pixels"].shape), np.uint8)

    def _begin(self, i: int, seed: int | None, observation: np.ndarray) -> None:
        env = self.envs[i]
        if seed is not None:
            env._set_seed(seed)
        env._start_episodes(self._inner[i], [0])
        self._seen[i].reshape(self.stack, self.channels, self.size, self.size)[:] = self._draw(i)
        observation[...] = self._seen[i]

    def _simulate(self, action: np.ndarray, outcome: Arrays) -> list[int]:
        ended = []
        for i, (env, inner) in enumerate(zip(self.envs, self._inner, strict=True)):
            written = {key: values[i : i + 1] for key, values in outcome.items() if key in inner and key != "pixels"}
            if env._step_envs(action[i : i + 1], {}, inner | written):
                ended.append(i)
                self.ended_in[i] = env.ended_in[0]
            self._seen[i, : -self.channels] = self._seen[i, self.channels :]
            if np.isfinite(outcome["reward"][i, 0]):  # what has broken down may not be fit to be drawn
                self._seen[i, -self.channels :] = self._draw(i)
        outcome["pixels"][...] = self._seen
        return ended

    def _may_have_broken_down(self, outcome: Arrays) -> bool:
        return False  # the environments within have seen to that

    def _draw(self, i: int) -> np.ndarray:
        """Environment i as it is now, uint8 [C, H, H]."""
        picture = self._picture(i)
        if self.grey:
            return (picture @ _LUMA + 0.5).astype(np.uint8)[None]
        return picture.transpose(2, 0, 1)

    def _picture(self, i: int) -> np.ndarray:
        env, size = self.envs[i], self.size
        scene = env.scene()
        if scene is None:
            return np.asarray(Image.fromarray(checked_picture(env)).resize((size, size), Image.Resampling.BOX))
        renderer = self._renderers[i]
        if renderer is None or renderer.scene.model is not scene.model or renderer.scene.data is not scene.data:
            if renderer is not None:
                renderer.close()
            renderer = self._renderers[i] = SceneRenderer(scene, size, self.look, self.name)
        return renderer.picture()

    def _capture(self) -> Any:
        totals = [[env._returns[0], env._lengths[0], env._costs[0]] for env in self.envs]
        seen = torch.from_numpy(self._seen.copy())
        return {"simulators": [env._capture() for env in self.envs], "totals": totals, "pixels": seen}

    def _restore(self, state: Any) -> None:
        for env, simulator, totals in zip(self.envs, state["simulators"], state["totals"], strict=True):
            env._restore(simulator)
            (env._returns[0], env._lengths[0], env._costs[0]) = totals
            env._seeds = [None]
        self._seen[...] = state["pixels"].numpy()

    @property
    def is_mujoco(self) -> bool:  # type: ignore[override]  # nobody sets it
        """Whether MuJoCo simulates all of the environments."""
        return all(env.is_mujoco for env in self.envs)

    @property
    def task(self) -> Any:
        return self.envs[0].task

    @property
    def seconds_per_step(self) -> float:
        """Of the environments within."""
        return self.envs[0].seconds_per_step

    def picture(self) -> np.ndarray:
        """The first environment as a film shows it, at its own size."""
        return self.envs[0].picture()

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the renderers and every environment within."""
        super().close(raise_if_closed=raise_if_closed)
        for renderer in filter(None, self._renderers):
            renderer.close()
        self._renderers = [None] * len(self.envs)
        for env in self.envs:
            env.close(raise_if_closed=False)


def see_pixels(
    make: Callable[..., AbstractEnvironment],
    pixels: Mapping[str, Any] | None,
    *,
    num_envs: int,
    seed: int | None,
    carry: Sequence[str],
    render_mode: str | None,
) -> AbstractEnvironment:
    """What ``make`` makes, or that as a :class:`PixelEnvironment` where ``pixels`` has a ``size``.

    Args:
        make: called with ``num_envs``, ``seed``, ``carry`` and ``render_mode``.
        pixels: ``size``, ``grey``, ``stack`` and ``look``, see :func:`pixel_settings`.
        num_envs, seed, carry, render_mode: see above.

    Raises:
        ConfigurationError: ``pixels`` holds something else.
    """
    settings = {} if pixels is None else pixels
    try:
        settings = pixel_settings(**settings)
    except TypeError:
        raise ConfigurationError(
            f"pixels={pixels!r} of an environment must be size, grey, stack and look, such as {{'size': 84}}"
        ) from None
    if settings["size"] is None:
        return make(num_envs=num_envs, seed=seed, carry=carry, render_mode=render_mode)
    choose_headless_renderer()
    envs: list[AbstractEnvironment] = []
    try:
        for _ in range(num_envs):
            envs.append(make(num_envs=1, seed=None, carry=(), render_mode="rgb_array"))
        return PixelEnvironment(envs, seed=seed, carry=carry, **settings)
    except BaseException:
        for env in envs:
            env.close(raise_if_closed=False)
        raise


@checked
def pixel_settings(
    *, size: Side | None = None, grey: Flag = False, stack: Stack = 3, look: Look = "default"
) -> dict[str, Any]:
    """What of an environment is seen, as a configuration says it: ``env.pixels``.

    Args:
        size: of the square pictures, in pixels; null: the state is seen, as a vector.
        grey: one channel in place of red, green and blue.
        stack: pictures that are seen at once.
        look: default, or fast, which leaves out shadows and samples every pixel once.
    """
    return {"size": size, "grey": grey, "stack": stack, "look": look}
