"""SAC on the DeepMind Control Suite, from state and from pixels, in the frames and action repeats of the papers.

    python benchmarks/dm_control.py run                                  # every cell; resumable within a cell too
    python benchmarks/dm_control.py run --studies state --tasks cheetah-run --seeds 1
    python benchmarks/dm_control.py run --studies pixels --tasks cartpole-swingup --learners pmoe --seeds 1
    python benchmarks/dm_control.py table                                # beside what DrQ and DrQ-v2 have published
    python benchmarks/dm_control.py figure

A cell is one training run through the command a user types, of 100,000 frames of the simulator, and is judged by ten
deterministic episodes with seeds of their own. From state it is SAC with one Gaussian and with four components
(marginalized); from pixels it is experiment=dmc_pixels as it stands, which is not the published setting, and for one
seed also with a Hamiltonian transform. A run that was cut goes on from its last checkpoint. Processor seconds are those
of all its commands, what was lost with a kill and done once more included.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from resumable import fill, finished, indented

from pmoe_lightning.checkpoints import read_checkpoint

RESULTS = Path(__file__).parent / "results" / "dm_control"
RUNS = RESULTS.parent / "runs"
FRAMES, INTERVAL, EPISODES, EVALUATION_SEED, WARM_UP = 100_000, 5_000, 10, 10_000, 1000
#: Steps of the simulator for each action, as PlaNet and DrQ have them.
ACTION_REPEAT = {"cartpole-swingup": 8, "cheetah-run": 4, "ball_in_cup-catch": 4}
TASKS = {"state": ("cartpole-swingup", "cheetah-run"), "pixels": ("cartpole-swingup", "ball_in_cup-catch")}
LEARNERS = {
    "state": {
        "gaussian": ["actor=gaussian", "estimator=pathwise"],
        "pmoe": ["actor=pmoe", "estimator=marginalized"],
    },
    "pixels": {"pmoe": [], "pmoe_gated": ["action_transform=hamiltonian_gated"]},
}
SEEDS = {"pmoe_gated": (1,)}
#: Of 100,000 frames from pixels: Kostrikov et al. 2021 (arXiv 2004.13649) and Yarats et al. 2021 (arXiv 2107.09645).
PUBLISHED = {"cartpole-swingup": {"DrQ": 759, "DrQ-v2": 626}, "ball_in_cup-catch": {"DrQ": 914, "DrQ-v2": 359}}


class Cell(NamedTuple):
    """One run."""

    study: str
    task: str
    learner: str
    seed: int
    frames: int

    @property
    def name(self) -> str:
        return "-".join(map(str, self))

    def words(self) -> list[str]:
        """What a user types for it."""
        repeat = ACTION_REPEAT[self.task]
        words = ["experiment=dmc_pixels"] if self.study == "pixels" else ["algo=sac", "env=dm_control"]
        words += [f"env.task={self.task}", f"env.action_repeat={repeat}", *LEARNERS[self.study][self.learner]]
        # A thousand random actions, and minibatches after every second action, whatever the repeat.
        words += [f"data.init_random_frames={WARM_UP * repeat}", f"data.frames_per_batch={2 * repeat}"]
        words += [f"data.frames_per_epoch={INTERVAL}", f"callbacks.metrics.every_frames={INTERVAL}"]
        words += ["callbacks=minimal", "logger=none", "compile=true"]
        words += ["~callbacks.evaluation"] if self.study == "pixels" else []  # the preset's, which are five
        return [*words, f"seed={self.seed}", f"total_frames={self.frames}"]


def processor_seconds(pid: int) -> float:
    """Of a process that is running, and of those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def train(words: list[str], clock: Path) -> float:
    """The processor seconds of the command and of those before it; ``clock`` keeps them, should this process be killed.

    Raises:
        SystemExit: the command failed; what it said was printed.
    """
    before = float(clock.read_text()) if clock.exists() else 0.0
    process = subprocess.Popen([sys.executable, "-m", "pmoe_lightning.train", *words], stdout=subprocess.DEVNULL)
    try:
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            clock.write_text(f"{before + processor_seconds(process.pid):.1f}")
            time.sleep(1)
        used = before + processor_seconds(process.pid)  # it has ended, and waits to be waited for
        clock.write_text(f"{used:.1f}")
    except BaseException:  # this process is stopped: the run saves itself and stops too
        process.terminate()
        process.wait()
        raise
    if code := process.wait():
        sys.exit(f"python -m pmoe_lightning.train {' '.join(words)} ended with code {code}")
    return used


def measure(cell: Cell, *extra: str) -> dict:
    folder = (RUNS / f"dm_control-{cell.name}").resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    words = [*cell.words(), *extra, "resume=auto", f"hydra.run.dir={folder}"]
    seconds = train(words, folder.with_suffix(".cpu_seconds"))
    last = folder / "checkpoints" / "last.ckpt"
    judge = [f"checkpoint={last}", f"episodes={EPISODES}", f"seed={EVALUATION_SEED}", "video=false", "--json"]
    command = [sys.executable, "-m", "pmoe_lightning.evaluate", *judge]
    judged = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = read_checkpoint(last)["callbacks"]["MetricsLogger"]["episodes"].tolist()
    return {
        **cell._asdict(),
        "cpu_seconds": round(seconds),
        "mean": judged["mean"],
        "returns": judged["returns"],
        "training": [[int(at), round(mean_return, 1)] for at, mean_return, _ in rows],
    }


def run(arguments: argparse.Namespace) -> None:
    """Fill the missing cells, seed by seed, so that an interrupted study compares what it has."""
    cells = [
        Cell(study, task, learner, seed, arguments.frames)
        for seed in arguments.seeds
        for study in arguments.studies
        for task in TASKS[study]
        for learner in LEARNERS[study]
        if task in arguments.tasks and learner in arguments.learners and seed in SEEDS.get(learner, arguments.seeds)
    ]
    for cell in cells:
        if found := fill(RESULTS / f"{cell.name}.json", partial(measure, cell, *arguments.words), indented):
            print(f"{cell.name}: {found['mean']:.0f} in {found['cpu_seconds']} processor seconds", flush=True)


def grouped() -> dict[tuple[str, str, str, int], dict[int, dict]]:
    """The finished cells by seed, of each study, task, learner and number of frames."""
    found: dict[tuple[str, str, str, int], dict[int, dict]] = {}
    for cell in finished(RESULTS):
        key = cell["study"], cell["task"], cell["learner"], cell["frames"]
        found.setdefault(key, {})[cell["seed"]] = cell
    return dict(sorted(found.items()))


def table() -> None:
    """Every seed's return, their median and mean, what others have published, and the median time it took."""
    print(
        "| seen | task | learner | frames | return, seed by seed | median | mean | DrQ | DrQ-v2 | processor minutes |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for (study, task, learner, frames), cells in grouped().items():
        values = [cells[seed]["mean"] for seed in sorted(cells)]
        published = PUBLISHED.get(task, {}) if (study, frames) == ("pixels", FRAMES) else {}
        row = [study, task, learner, f"{frames:,}", ", ".join(f"{value:.0f}" for value in values)]
        row += [f"{median(values):.0f}", f"{fmean(values):.0f}"]
        row += [str(published.get(name, "-")) for name in ("DrQ", "DrQ-v2")]
        row.append(f"{median(cell['cpu_seconds'] for cell in cells.values()) / 60:.0f}")
        print(f"| {' | '.join(row)} |")


def figure() -> None:
    """Curves of training, a panel for each study and task: a line for each seed, and what DrQ has published."""
    from matplotlib.figure import Figure

    panels = [(study, task) for study, tasks in TASKS.items() for task in tasks]
    page = Figure(figsize=(4 * len(panels), 3.5), layout="constrained")
    for axes, (study, task) in zip(page.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set(title=f"{task}, from {study}", xlabel="frames", ylabel="return in training", ylim=(0, 1000))
        for i, learner in enumerate(LEARNERS[study]):
            chosen = [cells for key, cells in grouped().items() if key[:3] == (study, task, learner)]
            curves = [cell["training"] for cells in chosen for cell in cells.values()]
            for k, curve in enumerate(curves):
                axes.plot(*zip(*curve, strict=True), color=f"C{i}", label=learner if k == 0 else None, alpha=0.8)
        if study == "pixels":
            axes.axhline(PUBLISHED[task]["DrQ"], color="grey", linestyle="--", label="DrQ, at 100,000")
        axes.legend(loc="upper left")
    page.savefig(RESULTS / "curves.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    learners = list(dict.fromkeys(name for study in LEARNERS.values() for name in study))
    runner.add_argument("--studies", nargs="+", choices=list(TASKS), default=list(TASKS))
    runner.add_argument("--tasks", nargs="+", choices=list(ACTION_REPEAT), default=list(ACTION_REPEAT))
    runner.add_argument("--learners", nargs="+", choices=learners, default=learners)
    runner.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    runner.add_argument("--frames", type=int, default=FRAMES)
    runner.add_argument("words", nargs="*", default=[], help="further words of the command line, for a trial")
    commands.add_parser("table")
    commands.add_parser("figure")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if arguments.command == "run":
        run(arguments)
    else:
        {"table": table, "figure": figure}[arguments.command]()


if __name__ == "__main__":
    main()
