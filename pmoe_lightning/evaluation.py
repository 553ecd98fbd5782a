"""How good is a policy: whole episodes, an honest interval, and a video."""

import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import ExplorationType, set_exploration_type

from pmoe_lightning.acting import acting_component, mixture_at
from pmoe_lightning.envs import GymnasiumEnv, carried_entries, make_env, with_memory
from pmoe_lightning.errors import ConfigurationError, RunError
from pmoe_lightning.film import film_frame, steps_between_pictures

_log = logging.getLogger(__name__)
#: An episode that has not ended by itself after so many steps is ended here.
MAX_EPISODE_STEPS = 10_000
# Matrix products of different row counts round differently, and a chaotic simulator magnifies that: with a constant
# count an episode does not depend on how many others are run beside it.
_POLICY_ROWS = 16


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns and lengths of whole episodes; episode i was seeded with ``seed + i``.

    ``costs`` are their undiscounted costs, and ``violations`` their numbers of steps with a cost; empty where the
    environment writes no cost. ``cut_short`` counts the episodes that did not end by themselves: their returns and
    lengths are those of their first ``max_episode_steps``.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    costs: tuple[float, ...] = ()
    violations: tuple[int, ...] = ()
    cut_short: int = 0

    @property
    def mean(self) -> float:
        """Mean return."""
        return math.fsum(self.returns) / len(self.returns)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean return over episodes of this one policy (not over training seeds)."""
        return student_t_interval(self.returns)


class EvaluationStopped(Exception):
    """``should_stop`` ended an evaluation before it had a result."""


def student_t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the mean: mean -+ t_{n-1} s / sqrt(n), with the quantile of Student's t.

    Args:
        values: n independent values; below two there is no interval: (nan, nan).
        confidence: its coverage if the values are normal.
    """
    from scipy.special import stdtrit

    n = len(values)
    if n < 2:
        return math.nan, math.nan
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * deviation / math.sqrt(n)
    return mean - half, mean + half


@torch.no_grad()
def evaluate_policy(
    policy: TensorDictModuleBase,
    env: GymnasiumEnv,
    *,
    episodes: int,
    seed: int,
    sample: bool = False,
    max_episode_steps: int = MAX_EPISODE_STEPS,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Run ``episodes`` whole episodes; episode i starts from a reset with seed ``seed + i``.

    The result of a deterministic policy does not depend on the number of environments in ``env`` (a policy that draws,
    by ``sample`` or by its own rule, repeats itself for the same ``seed`` and number of environments). Global random
    states and the policy's mode are as before afterwards. Environments are left in the middle of episodes: do not share
    ``env`` with training.

    Args:
        policy: reads ``observation`` [N, O], writes ``action`` [N, A]; acts on the device of its parameters. A policy
            with memory also reads what ``env`` carries, see ``envs.with_memory``.
        env: N environments; rounds of N episodes are run at once, and only the first episode after the reset counts.
        episodes: number of episodes, at least 1.
        seed: seed of episode 0.
        sample: draw from the policy, in place of its deterministic action.
        max_episode_steps: an episode that has not ended by then is cut short; the result counts it, a warning says so.
        should_stop: asked before every step.

    Raises:
        ConfigurationError: ``episodes`` or ``max_episode_steps`` is not positive.
        EvaluationStopped: ``should_stop`` said so.
    """
    for name, value in (("episodes", episodes), ("max_episode_steps", max_episode_steps)):
        if value < 1:
            raise ConfigurationError(f"{name} must be at least 1, not {value}")
    outcomes: list[tuple[float, ...]] = []
    cut_short = 0
    with _acting(policy, seed, sample) as act:
        for first in range(0, episodes, env.batch_size[0]):
            count = min(env.batch_size[0], episodes - first)
            finished, unfinished = _run_round(act, env, count, seed + first, max_episode_steps, should_stop)
            outcomes += finished
            cut_short += unfinished
    if cut_short:
        _log.warning(
            "%d of %d evaluation episodes did not end within %s steps and were cut short there (max_episode_steps)",
            *(cut_short, episodes, f"{max_episode_steps:,}"),
        )
    return Evaluation(*zip(*outcomes, strict=True), cut_short=cut_short)


def record_video(
    policy: TensorDictModuleBase,
    env_id: str,
    path: str | Path,
    *,
    seed: int = 0,
    max_frames: int = 250,
    env_kwargs: Mapping[str, Any] | None = None,
    sample: bool = False,
    make: Callable[..., GymnasiumEnv] = make_env,
) -> Path:
    """Film the whole episode of ``seed`` at the environment's own speed, as an H.264 file that browsers play.

    Below every picture stand the step, the time, the return so far and, for a mixture, the component that acts; a band
    shows which have acted. Long episodes are drawn at every n-th step only. To know n, the episode is run once before
    it is filmed.

    Args:
        policy: as in :func:`evaluate_policy`.
        env_id: Gymnasium id of an environment that can render to arrays.
        path: the ``.mp4`` file to write; its folder is made.
        seed: seed of the episode, which is the first one of :func:`evaluate_policy` with this seed.
        max_frames: pictures of the film, about; without a GPU each takes a tenth of a second or two.
        env_kwargs: further arguments of ``gymnasium.make``.
        sample: draw from the policy, in place of its deterministic action.
        make: called as ``make_env``, for an environment that is made another way.

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
        with torch.no_grad(), _acting(policy, seed, sample) as act:
            length = sum(1 for _ in _episode(act, env, seed)) - 1
        with torch.no_grad(), _acting(policy, seed, sample) as act:
            _follow_the_body(env, env_kwargs or {})
            _coarsen_shadows(env)
            _film(policy, _episode(act, env, seed), env, path, length, max_frames)
    finally:
        env.close()
    return path


def choose_headless_renderer() -> None:
    """Without a display, let MuJoCo render with EGL and pygame with memory only, unless the user chose otherwise.

    Sets ``MUJOCO_GL`` and ``SDL_VIDEODRIVER``. They are read when the first renderer opens, so this also works after
    MuJoCo was imported, and no environment that is not filmed depends on a graphics library.
    """
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


@contextmanager
def _acting(policy: TensorDictModuleBase, seed: int, sample: bool) -> Iterator[Any]:
    """A function that adds the policy's action [N, A] to a root [N], both on the CPU, and has no other side effect."""
    parameter = next(policy.parameters(), torch.empty(0))
    modes = [(module, module.training) for module in policy.modules()]
    written = ["action", *carried_entries(policy)]
    mode = ExplorationType.RANDOM if sample else ExplorationType.DETERMINISTIC

    def act(root: TensorDictBase) -> TensorDictBase:
        n = root.batch_size[0]
        rows = max(n, _POLICY_ROWS)
        read = root.select(*policy.in_keys, strict=False).items()
        inputs = {key: _padded(value, rows).to(parameter.device) for key, value in read}
        out = policy(TensorDict(inputs, batch_size=rows))
        for key in written:
            root.set(key, out.get(key)[:n].cpu())
        return root

    devices = [parameter.device] if parameter.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), set_exploration_type(mode):
        torch.manual_seed(seed)
        try:
            policy.eval()
            yield act
        finally:
            for module, training in modes:
                module.training = training


def _padded(values: Tensor, rows: int) -> Tensor:
    padded = values.new_zeros(rows, *values.shape[1:])
    padded[: len(values)] = values
    return padded


def _run_round(
    act: Any, env: GymnasiumEnv, count: int, seed: int, max_steps: int, should_stop: Callable[[], bool]
) -> tuple[list[tuple[float, ...]], int]:
    """The first episodes of the first ``count`` environments, seeded with ``seed``, ``seed + 1``, ...

    Returns:
        of each the entries of an ``Evaluation``, and how many were cut short.
    """
    env.set_seed(seed)
    root = env.reset()
    outcomes: list[tuple[float, ...]] = [()] * count
    running, violations = set(range(count)), [0] * count
    for _ in range(max_steps):
        if should_stop():
            raise EvaluationStopped
        step, root = env.step_and_maybe_reset(act(root))
        following = step.get("next")
        done, cost = following.get("done").flatten().tolist(), following.get("cost", None)
        if cost is not None:
            violations = [n + (c > 0) for n, c in zip(violations, cost.flatten().tolist(), strict=False)]
        for i in running:
            outcomes[i] = following.get("episode_return")[i].item(), int(following.get("episode_length")[i])
            if cost is not None:
                outcomes[i] += following.get("episode_cost")[i].item(), violations[i]
        running = {i for i in running if not done[i]}
        if not running:
            break
    return outcomes, len(running)


def _episode(act: Any, env: GymnasiumEnv, seed: int) -> Iterator[tuple[TensorDictBase, float]]:
    """The roots of the episode of ``seed``, each with its action and the return up to it, while ``env`` is there.

    The last root is where the episode ended and has no action.
    """
    env.set_seed(seed)
    root, total = env.reset(), 0.0
    for _ in range(MAX_EPISODE_STEPS):
        yield act(root), total
        step = env.step(root)
        root, total = env.step_mdp(step).exclude("action"), step["next", "episode_return"].item()
        if step["next", "done"].any():
            break
    yield root, total


@torch.no_grad()
def follow_episode(policy: TensorDictModuleBase, env: GymnasiumEnv, *, seed: int) -> TensorDictBase:
    """The roots [T] of the episode of ``seed``, with the actions of the policy, as :func:`evaluate_policy` runs it.

    Args:
        policy: as in :func:`evaluate_policy`.
        env: one environment; it is left at the end of the episode.
        seed: of the episode.
    """
    with _acting(policy, seed, sample=False) as act:
        *roots, _ = (root for root, _ in _episode(act, env, seed))
    return torch.cat(roots)


def _film(
    policy: TensorDictModuleBase,
    episode: Iterator[tuple[TensorDictBase, float]],
    env: GymnasiumEnv,
    path: Path,
    length: int,
    max_frames: int,
) -> None:
    """Write every n-th state of the episode, and its last."""
    import imageio.v2 as imageio

    seconds = _seconds_per_step(env)
    every = steps_between_pictures(length, max_frames, seconds)
    pictures = _pictures(policy, episode, env, every, seconds, length)
    first = next(pictures)  # a machine that cannot draw leaves no file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # yuv420p is the only layout that browsers play.
        with imageio.get_writer(
            path, fps=1 / (seconds * every), codec="libx264", pixelformat="yuv420p", macro_block_size=None,
            ffmpeg_log_level="error",
        ) as writer:  # fmt: skip
            for picture in chain([first], pictures):
                writer.append_data(picture)
    except (OSError, ImportError) as error:
        raise RunError(f"cannot write the video {path}: {_line(error)}; is imageio[ffmpeg] installed?") from error


def _pictures(
    policy: TensorDictModuleBase,
    episode: Iterator[tuple[TensorDictBase, float]],
    env: GymnasiumEnv,
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
            yield film_frame(_render(env), caption, acted, num_components, length)


def _seconds_per_step(env: GymnasiumEnv) -> float:
    """Simulated seconds of a step: ``dt`` of the environment, or what its rendering metadata say."""
    seconds = getattr(env.envs[0].unwrapped, "dt", None)
    if isinstance(seconds, int | float) and 0 < seconds < math.inf:
        return float(seconds)
    return 1 / (env.envs[0].metadata.get("render_fps") or 30)


def _follow_the_body(env: GymnasiumEnv, env_kwargs: Mapping[str, Any]) -> None:
    """Film with the camera that a MuJoCo model calls "track", unless one was chosen or there is none.

    The free camera of some tasks stays where it is, and a policy that runs well leaves the picture.
    """
    renderer = getattr(env.envs[0].unwrapped, "mujoco_renderer", None)
    chosen = {"camera_id", "camera_name", "default_camera_config"} & env_kwargs.keys()
    if renderer is not None and renderer.camera_id == -1 and not chosen:  # -1: the free camera
        import mujoco

        renderer.camera_id = mujoco.mj_name2id(renderer.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")


def _coarsen_shadows(env: GymnasiumEnv) -> None:
    """Let MuJoCo compute shadows on 1024 x 1024 points, twice as finely as the picture, and not on 4096 x 4096.

    Without a GPU these take half of the time of a film.
    """
    model = getattr(env.envs[0].unwrapped, "model", None)
    if hasattr(model, "vis"):
        model.vis.quality.shadowsize = min(model.vis.quality.shadowsize, 1024)


def _render(env: GymnasiumEnv) -> Any:
    try:
        frame = env.envs[0].render()
    except Exception as error:
        # A missing library, a missing device, a half-initialised context: each renderer has its own exception.
        _discard(error)
        backend = os.environ.get("MUJOCO_GL", "unset")
        raise RunError(
            f"cannot render {env.envs[0].spec.id} (MUJOCO_GL={backend}): {_line(error)}; install libegl1 and set "
            "MUJOCO_GL=egl, or libosmesa6 and MUJOCO_GL=osmesa"
        ) from None
    if frame is None:
        raise RunError(f"environment {env.envs[0].spec.id} cannot render to arrays")
    return frame


def _discard(error: Exception) -> None:
    """Let go of the half-made renderer now: its destructor fails too, and would print that at some later moment."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = hook


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
