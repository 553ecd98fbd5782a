"""How good is a policy: whole episodes, an honest interval, and a video."""

import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import ExplorationType, set_exploration_type

from pmoe_lightning.envs import GymnasiumEnv, carried_entries, make_env, with_memory
from pmoe_lightning.errors import ConfigurationError, RunError

# Matrix products of different row counts round differently, and a chaotic simulator magnifies that: with a constant
# count an episode does not depend on how many others are run beside it.
_POLICY_ROWS = 16


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns and lengths of whole episodes; episode i was seeded with ``seed + i``.

    ``costs`` are their undiscounted costs, and ``violations`` their numbers of steps with a cost; empty where the
    environment writes no cost.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    costs: tuple[float, ...] = ()
    violations: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """Mean return."""
        return math.fsum(self.returns) / len(self.returns)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean return over episodes of this one policy (not over training seeds)."""
        return student_t_interval(self.returns)


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
    policy: TensorDictModuleBase, env: GymnasiumEnv, *, episodes: int, seed: int, sample: bool = False
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

    Raises:
        ConfigurationError: ``episodes`` is not positive.
    """
    if episodes < 1:
        raise ConfigurationError(f"episodes must be at least 1, not {episodes}")
    outcomes: list[tuple[float, ...]] = []
    with _acting(policy, seed, sample) as act:
        for first in range(0, episodes, env.batch_size[0]):
            outcomes += _run_round(act, env, min(env.batch_size[0], episodes - first), seed + first)
    return Evaluation(*zip(*outcomes, strict=True))


def record_video(
    policy: TensorDictModuleBase,
    env_id: str,
    path: str | Path,
    *,
    seed: int = 0,
    max_frames: int = 1000,
    env_kwargs: Mapping[str, Any] | None = None,
    sample: bool = False,
    make: Callable[..., GymnasiumEnv] = make_env,
) -> Path:
    """Film the episode of ``seed`` as an H.264 file that browsers play.

    Args:
        policy: as in :func:`evaluate_policy`.
        env_id: Gymnasium id of an environment that can render to arrays.
        path: the ``.mp4`` file to write; its folder is made.
        seed: seed of the episode, which is the first one of :func:`evaluate_policy` with this seed.
        max_frames: the film ends here, or with the episode.
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
            _follow_the_body(env, env_kwargs or {})
            _coarsen_shadows(env)
            _film(act, env, path, max_frames)
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


def _run_round(act: Any, env: GymnasiumEnv, count: int, seed: int) -> list[tuple[float, ...]]:
    """The first episodes of the first ``count`` environments, seeded with ``seed``, ``seed + 1``, ...

    Of each the entries of an ``Evaluation``.
    """
    env.set_seed(seed)
    root = env.reset()
    outcomes: list[tuple[float, ...]] = [()] * count
    running, violations = set(range(count)), [0] * count
    while running:
        step, root = env.step_and_maybe_reset(act(root))
        following = step.get("next")
        done, cost = following.get("done").flatten().tolist(), following.get("cost", None)
        if cost is not None:
            violations = [n + (c > 0) for n, c in zip(violations, cost.flatten().tolist(), strict=False)]
        for i in [i for i in running if done[i]]:
            outcomes[i] = following.get("episode_return")[i].item(), int(following.get("episode_length")[i])
            if cost is not None:
                outcomes[i] += following.get("episode_cost")[i].item(), violations[i]
            running.remove(i)
    return outcomes


def _film(act: Any, env: GymnasiumEnv, path: Path, max_frames: int) -> None:
    import imageio.v2 as imageio

    root = env.reset()
    frame = _render(env)
    fps = env.envs[0].metadata.get("render_fps") or 30
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # yuv420p, the only layout that browsers play, needs even sides: cut a line rather than stretch the picture.
        with imageio.get_writer(
            path, fps=fps, codec="libx264", pixelformat="yuv420p", macro_block_size=None, ffmpeg_log_level="error"
        ) as writer:
            for _ in range(max_frames):
                writer.append_data(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])
                step, root = env.step_and_maybe_reset(act(root))
                if step["next", "done"].any():
                    break
                frame = _render(env)
    except (OSError, ImportError) as error:
        raise RunError(f"cannot write the video {path}: {_line(error)}; is imageio[ffmpeg] installed?") from error


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
