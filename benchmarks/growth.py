"""Time and memory as the work grows: PPO with the number of environments, SAC's data with the size of the buffer.

    python benchmarks/growth.py environments      # 1 to 64
    python benchmarks/growth.py buffer            # 10^4 to 10^6 transitions

Each point is a process of its own. Writes ``results/speed/growth_<what>.csv`` and the figure beside it.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from speed import RESULTS, environment, windows

POINTS = {"environments": (1, 2, 4, 8, 16, 32, 64), "buffer": (10_000, 30_000, 100_000, 300_000, 1_000_000)}
AXES = {"environments": "environments", "buffer": "transitions in the replay buffer"}
TIMES = {"environments": "us of CPU per frame of PPO", "buffer": "us of CPU per frame and minibatch"}


def with_environments(num_envs: int) -> tuple[float, float]:
    """CPU microseconds per frame of PPO, and the peak memory of its process in MiB."""
    marks = RESULTS.parent / "runs" / f"growth-{num_envs}-{time.time_ns()}.marks"
    marks.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("speed.py")), "one", "ppo", "gaussian", str(num_envs)]
    process = subprocess.Popen([*command, str(marks)], env=environment(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"PPO with {num_envs} environments failed")
    return 1e6 * statistics.median(row["cpu"] for row in windows(marks, "ppo")), usage.ru_maxrss / 1024


def with_buffer(transitions: int) -> tuple[float, float]:
    """CPU microseconds per frame of storing a rollout and drawing its minibatches, and the peak memory in MiB."""
    command = [sys.executable, __file__, "one-buffer", str(transitions)]
    answer = subprocess.run(command, env=environment(), check=True, capture_output=True, text=True).stdout
    time_per_frame, memory = answer.split()[-2:]
    return float(time_per_frame), float(memory)


def fill_buffer(transitions: int) -> None:
    """Fill a buffer by HalfCheetah's sizes, then time what SAC asks of it for every 16 frames."""
    import torch
    from tensordict import TensorDict

    from pmoe_lightning.data.off_policy import OffPolicyData

    torch.set_num_threads(1)
    policy = torch.nn.Linear(1, 1)
    sizes = {"total_frames": 2 * transitions, "frames_per_epoch": transitions, "buffer_size": transitions}
    data = OffPolicyData(lambda **_: None, policy, init_random_frames=transitions, **sizes)

    def rollout(frames: int) -> TensorDict:
        flags = {key: torch.zeros(1, frames, 1, dtype=torch.bool) for key in ("done", "terminated", "truncated")}
        after = {"observation": torch.randn(1, frames, 17), "reward": torch.randn(1, frames, 1), **flags}
        entries = {"observation": torch.randn(1, frames, 17), "action": torch.randn(1, frames, 6), "next": after}
        return TensorDict(entries, batch_size=(1, frames))

    for _ in range(transitions // 10_000):
        data.make_batch(rollout(10_000))
    frames, seconds = rollout(16), []
    for _ in range(60):
        start = time.process_time()
        data.make_batch(frames)
        seconds.append(time.process_time() - start)
    print(1e6 * statistics.median(seconds[10:]) / 16, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def draw(what: str, rows: list[tuple[int, float, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, column, label in zip(figure.subplots(1, 2), (1, 2), (TIMES[what], "peak memory, MiB"), strict=True):
        axes.plot([row[0] for row in rows], [row[column] for row in rows], "o-")
        axes.set(xscale="log", xlabel=AXES[what], ylabel=label, ylim=(0, None))
        axes.minorticks_off()
        axes.set_xticks([row[0] for row in rows], [f"{row[0]:,}" for row in rows])
        axes.grid(alpha=0.3)
    figure.savefig(RESULTS / f"growth_{what}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*POINTS, "one-buffer"])
    parser.add_argument("transitions", nargs="?", type=int)
    arguments = parser.parse_args()
    if arguments.what == "one-buffer":
        fill_buffer(arguments.transitions)
        return
    measure = {"environments": with_environments, "buffer": with_buffer}[arguments.what]
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = []
    for point in POINTS[arguments.what]:
        rows.append((point, *measure(point)))
        print("{}: {:.1f} us, {:.0f} MiB".format(*rows[-1]), flush=True)
    with (RESULTS / f"growth_{arguments.what}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([(arguments.what, "microseconds", "mebibytes"), *rows])
    draw(arguments.what, rows)


if __name__ == "__main__":
    main()
