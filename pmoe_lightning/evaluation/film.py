"""A film of an episode: MuJoCo and pygame without a display, and an H.264 file that browsers play."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from pmoe_lightning.envs import AbstractEnvironment, make_env, with_memory
from pmoe_lightning.envs.rendering import checked_picture, choose_headless_renderer
from pmoe_lightning.errors import ConfigurationError, RunError, error_line
from pmoe_lightning.evaluation.episodes import acting, episode_of
from pmoe_lightning.evaluation.film_frames import film_frame, steps_between_pictures
from pmoe_lightning.modules.acting import acting_component, mixture_at
from pmoe_lightning.processes.partial_files import partial_file


def record_video(
    policy: TensorDictModuleBase,
    env_id: str,
    path: str | Path,
    *,
    seed: int = 0,
    max_frames: int = 250,
    env_kwargs: Mapping[str, Any] | None = None,
    sample: bool = False,
    make: Callable[..., AbstractEnvironment] = make_env,
) -> Path:
    """Film the whole episode of ``seed`` at the environment's own speed, as an H.264 file that browsers play.

    Below every picture stand the step, the time, the return so far and, for a mixture, the component that acts; a band
    shows which have acted. Long episodes are drawn at every n-th step only. To know n, the episode is run once before
    it is filmed.

    Args:
        policy: as in :func:`evaluate_policy`.
        env_id: ``id`` of an environment that can be drawn, for Gymnasium one that can render to arrays.
        path: the ``.mp4`` file to write; its folder is made.
        seed: seed of the episode, which is the first one of :func:`evaluate_policy` with this seed.
        max_frames: pictures of the film, about; without a GPU each takes a tenth of a second or two.
        env_kwargs: further arguments of ``make``.
        sample: draw from the policy, in place of its deterministic action.
        make: makes it, called as ``make_env`` is.

    Returns:
        ``path``.

    Raises:
        RunError: this machine or environment cannot render, or the file cannot be written; says what to do.
    """
    path = Path(path)
    choose_headless_renderer()
    try:
        env = with_memory(make, policy)(
            id=env_id, num_envs=1, seed=seed, render_mode="rgb_array", **dict(env_kwargs or {})
        )
    except ConfigurationError as error:
        raise RunError(f"cannot film {env_id}: {error}") from error
    try:
        with torch.no_grad(), acting(policy, seed, sample) as act:
            length = sum(1 for _ in episode_of(act, env, seed)) - 1
        with torch.no_grad(), acting(policy, seed, sample) as act:
            _film(policy, episode_of(act, env, seed), env, path, length, max_frames)
    finally:
        env.close()
    return path


def _film(
    policy: TensorDictModuleBase,
    episode: Iterator[tuple[TensorDictBase, float]],
    env: AbstractEnvironment,
    path: Path,
    length: int,
    max_frames: int,
) -> None:
    """Write every n-th state of the episode, and its last."""
    import imageio.v2 as imageio

    seconds = env.seconds_per_step
    every = steps_between_pictures(length, max_frames, seconds)
    pictures = _pictures(policy, episode, env, every, seconds, length)
    first = next(pictures)  # a machine that cannot draw leaves no file
    partial = partial_file(path) / path.name  # in a folder, because the writer goes by the name
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        # yuv420p is the only layout that browsers play.
        writer: Any
        with imageio.get_writer(
            partial, fps=1 / (seconds * every), codec="libx264", pixelformat="yuv420p", macro_block_size=None,
            ffmpeg_log_level="error",
        ) as writer:  # fmt: skip
            for picture in chain([first], pictures):
                if picture.shape != first.shape:
                    raise RunError(f"environment {env.name} draws pictures of several sizes, which make no film")
                writer.append_data(picture)
        os.replace(partial, path)
    except (OSError, ImportError) as error:
        raise RunError(f"cannot write the video {path}: {error_line(error)}; is imageio[ffmpeg] installed?") from error
    finally:
        shutil.rmtree(partial.parent, ignore_errors=True)


def _pictures(
    policy: TensorDictModuleBase,
    episode: Iterator[tuple[TensorDictBase, float]],
    env: AbstractEnvironment,
    every: int,
    seconds: float,
    length: int,
) -> Iterator[Any]:
    """The film's pictures: every ``every``-th state of the episode, and the one in which it ended."""
    acted, num_components = [], 1
    for step, (root, total) in enumerate(episode):
        over = root.get("action", None) is None
        if not over:
            mixture = mixture_at(policy, root)
            num_components = 1 if mixture is None else mixture.num_components
            acted.append(0 if mixture is None else int(acting_component(mixture, root)))
        if over or step % every == 0:
            caption = f"step {step} of {length}    {step * seconds:.1f} s    return {total:,.1f}"
            yield film_frame(checked_picture(env), caption, acted, num_components, length)
