"""Three hundred signals at random moments of whole runs, from the first import to the end of Python: nothing is lost.

Each case is one seed: five signals (KILL, TERM, INT, HUP; to the training process, to all of its group, or KILL to one
that it started) to starts of the same command with ``resume=auto``, at moments drawn uniformly over the length of a
whole undisturbed run; then that command until it is through. What it has come to is compared with the undisturbed run.
A start is forked from a process that has imported what it needs, or, one in five, a fresh process of Python.

    make torture-moments CASE="[ppo-7]"      repeats the case of kind ppo and seed 7
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cells import cell
from forked import LAST, SMALL, TINY
from nursery import Nursery, read_phase, wait_while
from test_devices import is_alive
from test_outage import Server
from test_resume import BEST, differing, state_of
from waiting import HANG_SECONDS

from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.tracking.database import make_database

SIGNALS_PER_CASE = 5
FRESH = 0.2
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Far longer than any end takes, at any load: what has not ended by then hangs.
PATIENCE_SECONDS = 300.0
#: What a checkpoint says of its MLflow run.
NAMES = {"run": None}
READY = 2  # of MLflow's states of a logged model

# Every callback of a run by default, at intervals of which none fits another; an episode of 50 steps is drawn in 5.
WATCHED = ["env=Pendulum-v1", "+env.max_episode_steps=50", "callbacks.final_policy.video_frames=5"]
WATCHED += ["callbacks.evaluation.episodes=1", "callbacks.metrics.every_frames=100", "~callbacks.progress"]
WATCHED += ["callbacks.mixture.every_frames=200", "callbacks.estimator_variance.every_frames=400"]
WATCHED += ["callbacks.estimator_variance.num_samples=2", "logger.flush_seconds=0.5"]
LENGTH = {
    "sac": ["data.buffer_size=512", "total_frames=480", "data.frames_per_epoch=160"],
    "ppo": ["total_frames=768", "data.frames_per_epoch=256"],
}
WORKERS = ["data.num_workers=2", "data.num_envs=1"]
PROCESSES = ["trainer.devices=2"]


@dataclass(frozen=True)
class Kind:
    """Runs of one sort; ``seeds`` are the jobs of a sweep."""

    words: list[str]
    seeds: tuple[int, ...] = ()


def kind(algo: str, *more: str, seeds: tuple[int, ...] = ()) -> Kind:
    return Kind([*TINY[algo], *SMALL, *WATCHED, *LENGTH[algo], *more], seeds)


KINDS = {
    "sac": kind("sac"),
    "ppo": kind("ppo"),
    "workers-sac": kind("sac", *WORKERS),
    "workers-ppo": kind("ppo", *WORKERS),
    "processes-sac": kind("sac", *PROCESSES, "data.frames_per_batch=32"),
    "processes-ppo": kind("ppo", *PROCESSES),
    "sweep": kind("ppo", seeds=(1, 2)),
}
CASES = {"sac": 20, "ppo": 18, "workers-sac": 3, "workers-ppo": 3, "processes-sac": 3, "processes-ppo": 3, "sweep": 10}


@dataclass
class Place:
    """A store and the folder in which runs use it."""

    folder: Path
    database: Path
    uri: str
    artifacts: Path | None = None  # of a server, which names them by a scheme of its own

    def rows(self, query: str, *values: Any) -> list[tuple]:
        if not self.database.exists():
            return []
        with sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=60) as connection:
            try:
                return connection.execute(query, values).fetchall()
            except sqlite3.OperationalError as error:  # a new store, before its tables
                if "no such table" in str(error):
                    return []
                raise

    def runs(self, experiment: str) -> dict[str, str]:
        """Status of every run, by id."""
        query = "select run_uuid, status from runs join experiments using (experiment_id) where experiments.name = ?"
        return dict(self.rows(query, experiment))

    def seed_of(self, run: str) -> str | None:
        found = self.rows("select value from params where run_uuid = ? and key = 'seed'", run)
        return found[0][0] if found else None

    def points(self, run: str) -> dict[tuple[str, int], list[float]]:
        """All values of every metric at every step."""
        points: dict[tuple[str, int], list[float]] = {}
        for key, step, value in self.rows("select key, step, value from metrics where run_uuid = ?", run):
            points.setdefault((key, step), []).append(value)
        return points

    def artifacts_of(self, run: str) -> set[str]:
        ((uri,),) = self.rows("select artifact_uri from runs where run_uuid = ?", run)
        folder = Path(uri.removeprefix("file://"))
        if uri.startswith("mlflow-artifacts:"):
            folder = self.artifacts / uri.split(":", 1)[1].lstrip("/")
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    def models_of(self, run: str) -> list[int]:
        return [status for (status,) in self.rows("select status from logged_models where source_run_id = ?", run)]


@dataclass
class Reference:
    """What an undisturbed run has come to, by job, and how long it took."""

    states: dict[str, Any] = field(default_factory=dict)
    points: dict[str, dict] = field(default_factory=dict)
    artifacts: dict[str, set[str]] = field(default_factory=dict)
    files: dict[str, set[str]] = field(default_factory=dict)
    best: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def job_folders(kind: Kind, name: str) -> dict[str, str]:
    """The folder of every job, by its seed."""
    if not kind.seeds:
        return {"0": name}
    return {str(seed): f"{name}/{number}-ppo-Pendulum-v1-seed{seed}" for number, seed in enumerate(kind.seeds)}


def best_of(folder: Path) -> int:
    """The frames of the best policy."""
    return read_checkpoint(folder / BEST)["policy"]["env_frames"]


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def command(kind: Kind, name: str, place: Place, experiment: str, seed: str | None = None) -> list[str]:
    """The words of a run, of a whole sweep, or of one job of a sweep in its own folder."""
    words = [*kind.words, f"logger.tracking_uri={place.uri}", f"logger.experiment_name={experiment}"]
    if not kind.seeds:
        return [*words, f"hydra.run.dir={name}", "resume=auto"]
    if seed is None:
        return ["-m", *words, f"seed={','.join(map(str, kind.seeds))}", f"hydra.sweep.dir={name}"]
    return [*words, f"seed={seed}", f"hydra.run.dir={job_folders(kind, name)[seed]}", "resume=auto"]


class Fault(AssertionError):
    """What should not have happened."""


@dataclass
class Torture:
    """One case: its trainings are signalled until it has given as many signals as it shall."""

    name: str
    kind: Kind
    place: Place
    nursery: Nursery
    reference: Reference
    overheads: dict[str, float]
    rng: random.Random
    signals: int = SIGNALS_PER_CASE
    fresh: float = FRESH
    starts: int = 0
    given: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    longest_end: float = 0.0
    given_before: int = 0  # to earlier trainings of the case

    def run(self) -> dict[str, Any]:
        trainings = 0
        while len(self.given) < self.signals:
            trainings += 1
            self.train(f"run{trainings}", f"{self.name}-{trainings}")
            if self.faults:
                raise self.failure()
        return {"signals": self.given, "starts": self.starts, "trainings": trainings, "end": round(self.longest_end, 1)}

    # -- a training from its first start to its end --------------------------------------------------------------------
    def train(self, name: str, experiment: str) -> None:
        self.given_before = len(self.given)
        if self.kind.seeds:
            whole = command(self.kind, name, self.place, experiment)
            if self.signalled(whole, experiment):
                for seed in job_folders(self.kind, name):
                    self.finish(command(self.kind, name, self.place, experiment, seed), experiment, every=0.3)
                self.undisturbed([name], module="pmoe_lightning.tracking.resend")
        else:
            self.finish(command(self.kind, name, self.place, experiment), experiment)
        self.check_what_is_left(name)
        self.check_results(name, experiment)
        for seed, folder in job_folders(self.kind, name).items():
            before = (self.place.folder / folder / LAST).stat().st_mtime_ns
            log = self.undisturbed(command(self.kind, name, self.place, experiment, seed))
            if (self.place.folder / folder / LAST).stat().st_mtime_ns != before or len(log.splitlines()) != 1:
                self.fault(f"a start of the finished run was not one line: {log[-500:]}")

    def finish(self, words: list[str], experiment: str, every: float = 1.0) -> None:
        """The same command again and again, signalled as long as there are signals to give."""
        while len(self.given) < self.signals and self.rng.random() < every:
            if not self.signalled(words, experiment):
                return
        self.undisturbed(words)

    def undisturbed(self, words: list[str], module: str = "pmoe_lightning.train") -> str:
        """Start and wait for success; what was said."""
        pid, log = self.start(words, module=module)
        self.wait_for_the_end_of(pid, log)
        self.check_success(pid, log)
        return log.read_text()

    def start(self, words: list[str], *, fresh: bool = False, module: str = "pmoe_lightning.train") -> tuple[int, Path]:
        self.starts += 1
        log = self.place.folder / f"log{self.starts:02d}.txt"
        log.touch()  # it may be signalled before it says anything
        return self.nursery.start(words, self.place.folder, log, module=module, fresh=fresh), log

    # -- a start that is signalled -------------------------------------------------------------------------------------
    def signalled(self, words: list[str], experiment: str) -> bool:
        """Start and signal at a random moment; False if it was through before."""
        number = self.rng.choice(SIGNALS)
        to = self.rng.choice(["main", "group", "child" if number == signal.SIGKILL else "main"])
        fresh, waits = self.rng.random() < self.fresh, self.rng.random() < 0.5
        seconds = self.reference.seconds + (self.overheads["imports"] if fresh else 0.0)
        seconds += 0.0 if self.place.database.exists() else self.overheads["store"]
        moment = self.rng.random() * seconds
        open_before = {run for run, status in self.place.runs(experiment).items() if status == "RUNNING"}
        begun, entered = time.time(), time.monotonic()
        pid, log = self.start(words, fresh=fresh)
        if not wait_while(lambda: is_alive(pid), moment):
            phase = self.phase(begun, fresh)
            over = "results " in log.read_text()
            to = self.send(number, to, pid)
            told = time.monotonic()
            self.given.append({"start": self.starts, "signal": number.name, "to": to, "at": round(told - entered, 2)})
            self.given[-1] |= {"phase": phase, "fresh": fresh}
            self.wait_for_the_end_of(pid, log)
            self.longest_end = max(self.longest_end, time.monotonic() - told)
            code = self.nursery.end_of(pid)
            self.given[-1]["code"] = code
            self.check_the_end(code, number, to, over or phase in ("upload", "exit"), log)
            if waits or number != signal.SIGKILL:
                self.wait_for_orphans()
            if number != signal.SIGKILL:
                left = {run for run, status in self.place.runs(experiment).items() if status == "RUNNING"}
                if left - open_before:
                    self.fault(f"MLflow still says RUNNING after exit code {code}: {log.read_text()[-1000:]}")
            return True
        self.check_success(pid, log)
        return False

    def phase(self, begun: float, fresh: bool) -> str:
        if not fresh:
            return read_phase(self.place.folder)
        logs = self.place.folder.rglob("train.log")  # Hydra opens it when everything is imported and accepted
        return "after imports" if any(log.stat().st_mtime >= begun for log in logs) else "imports"

    def send(self, number: signal.Signals, to: str, pid: int) -> str:
        if to == "child":
            mine = ("pmoe_lightning.train", "spawn_main")
            others = [p for p, name in self.nursery.alive().items() if p != pid and any(word in name for word in mine)]
            if others:
                os.kill(self.rng.choice(sorted(others)), number)
                return "child"
        if to == "group":
            os.killpg(pid, number)
            return "group"
        os.kill(pid, number)
        return "main"

    def wait_for_the_end_of(self, pid: int, log: Path) -> None:
        if not wait_while(lambda: is_alive(pid), PATIENCE_SECONDS):
            os.kill(pid, signal.SIGUSR2)
            time.sleep(2)
            for left in self.nursery.alive():
                os.kill(left, signal.SIGKILL)
            self.fault(f"it hangs: {log.read_text()[-6000:]}")
            raise self.failure()

    def wait_for_orphans(self) -> None:
        begun = time.monotonic()
        if not wait_while(self.nursery.alive, PATIENCE_SECONDS):
            self.fault(f"processes are left: {self.nursery.alive()}")
        self.longest_end = max(self.longest_end, time.monotonic() - begun)

    @property
    def has_lost_a_process(self) -> bool:
        """Whether a start of this training has failed, as one does whose worker or other process was killed."""
        return any(signal["to"] == "child" and signal["code"] == 1 for signal in self.given[self.given_before :])

    # -- what is right -------------------------------------------------------------------------------------------------
    def fault(self, what: str) -> None:
        self.faults.append(f"start {self.starts}: {what}")

    def failure(self) -> Fault:
        return Fault("\n".join([self.name, *self.faults, *map(str, self.given)]))

    def check_success(self, pid: int, log: Path) -> None:
        code = self.nursery.end_of(pid)
        if code != 0:
            self.fault(f"exit code {code} without a signal: {log.read_text()[-1500:]}")

    def check_the_end(self, code: int, number: signal.Signals, to: str, was_over: bool, log: Path) -> None:
        """The shell's code for the signal; success only where the run was over; one line for a process that died.

        A process that dies when its work is done is missed by nobody.
        """
        expected = {-number, 128 + number} if number != signal.SIGKILL else {1} if to == "child" else {-number}
        said = log.read_text()
        if code == 0 and not was_over and to != "child":
            self.fault(f"{number.name} was swallowed: {said[-1500:]}")
        elif code not in expected | {0}:
            self.fault(f"{number.name} to {to}: exit code {code}: {said[-2500:]}")
        if "Traceback" in said and self.given[-1]["phase"] != "imports":
            self.fault(f"{number.name} to {to}: a traceback: {said[-2500:]}")

    def check_what_is_left(self, name: str) -> None:
        """After the start that has finished it: no process, no shared memory, no temporary file."""
        self.wait_for_orphans()
        if shared := self.nursery.shared_memory():
            self.fault(f"shared memory is left: {shared}")
            self.nursery.clear_shared_memory()
        temporary = self.place.folder / "tmp"
        if left := sorted(os.listdir(temporary)):
            self.fault(f"temporary files are left: {left}")
            shutil.rmtree(temporary)
        for seed, folder in job_folders(self.kind, name).items():
            changed = files_in(self.place.folder / folder) ^ self.reference.files[seed]
            if changed:
                self.fault(f"other files than in the folder of an undisturbed run: {sorted(changed)}")
        if spools := [str(path) for path in self.place.folder.rglob("mlflow-spool*")]:
            self.fault(f"spools are left: {spools}")

    def check_results(self, name: str, experiment: str) -> None:
        """Weights and everything else in the checkpoint, curves, statuses, film and model."""
        for seed, folder in job_folders(self.kind, name).items():
            if where := differing(self.reference.states[seed], state_of(self.place.folder / folder) | NAMES):
                self.fault(f"seed {seed} is another run: {where[:10]}")
            if (best := best_of(self.place.folder / folder)) != self.reference.best[seed]:
                self.fault(f"the best policy of seed {seed} is of {best} frames, not {self.reference.best[seed]}")
        runs, finished = self.place.runs(experiment), Counter()
        for run, status in runs.items():
            seed, points = self.place.seed_of(run), self.place.points(run)
            # One without a checkpoint that has lost a process has failed, and is not gone on with.
            if status not in ("FINISHED", "KILLED") and not (status == "FAILED" and self.has_lost_a_process):
                self.fault(f"run {run} is {status} at the end")
            if status == "FINISHED" and seed is not None:
                finished[seed] += 1
                self.check_run(run, seed, points)
            elif points:
                self.check_points(f"{status} run {run}", points, self.reference.points[seed or "0"])
        if finished != Counter(self.reference.states.keys()):
            self.fault(f"finished runs: {dict(finished)} of {runs}")

    def check_run(self, run: str, seed: str, points: dict) -> None:
        expected = self.reference.points[seed]
        self.check_points(f"run {run}", points, expected)
        if missing := expected.keys() - points.keys():
            self.fault(f"{len(missing)} points of run {run} are missing: {sorted(missing)[:5]}")
        artifacts = self.place.artifacts_of(run)
        if missing := self.reference.artifacts[seed] - artifacts:
            self.fault(f"artifacts of run {run} are missing: {sorted(missing)}")
        if (models := self.place.models_of(run)) != [READY]:
            self.fault(f"models of run {run}: {models}")

    def check_points(self, run: str, points: dict, expected: dict) -> None:
        """Every point once, and with the value of the undisturbed run.

        A stop measures the mixture once more, and a run that fails says its last means.
        """
        more = "train/" if self.has_lost_a_process else "train/mixture/"
        if twice := [point for point, values in points.items() if len(values) > 1]:
            self.fault(f"{len(twice)} points of {run} are there twice: {sorted(twice)[:5]}")
        for point, values in points.items():
            if point not in expected and not point[0].startswith(more):
                self.fault(f"{run} has the point {point}, which an undisturbed run has not")
            elif point in expected and "time/" not in point[0] and values[0] != expected[point][0]:
                self.fault(f"{run} has {values[0]} at {point}, not {expected[point][0]}")


def measure_reference(kind: Kind, place: Place, nursery: Nursery) -> Reference:
    """An undisturbed run, in a store that is there: what it comes to, and how long it takes."""
    name, log, begun = "undisturbed", place.folder / "undisturbed.txt", time.monotonic()
    words = command(kind, name, place, name)
    pid = nursery.start(words, place.folder, log, module="pmoe_lightning.train", fresh=False)
    assert wait_while(lambda: is_alive(pid), HANG_SECONDS)
    assert nursery.end_of(pid) == 0, log.read_text()[-3000:]
    reference = Reference(seconds=time.monotonic() - begun)
    by_seed = {place.seed_of(run): run for run in place.runs(name)}
    for seed, folder in job_folders(kind, name).items():
        reference.states[seed] = state_of(place.folder / folder) | NAMES
        reference.points[seed] = place.points(by_seed[seed])
        reference.artifacts[seed] = place.artifacts_of(by_seed[seed])
        reference.files[seed] = files_in(place.folder / folder)
        reference.best[seed] = best_of(place.folder / folder)
        assert place.models_of(by_seed[seed]) == [READY]
        assert all(len(values) == 1 for values in reference.points[seed].values())
    return reference


def sqlite_place(folder: Path, store: Path | None) -> Place:
    folder.mkdir()
    if store is not None:
        shutil.copy(store, folder / "mlflow.db")
    return Place(folder, folder / "mlflow.db", f"sqlite:///{folder / 'mlflow.db'}")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def reference(nursery: Nursery, empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """``reference(kind)``, measured once."""
    known: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in known:
            place = sqlite_place(tmp_path_factory.mktemp("reference") / name, empty_store)
            known[name] = measure_reference(KINDS[name], place, nursery)
            print(f"an undisturbed {name}: {known[name].seconds:.1f} s")
        return known[name]

    return get


@pytest.fixture(scope="module")
def server(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """``server()`` starts an MLflow server when it is first needed."""
    running: list[Server] = []

    def get() -> Server:
        if not running:
            running.append(Server(tmp_path_factory.mktemp("server"), empty_store))
        return running[0]

    yield get
    for one in running:
        one.kill()


@pytest.fixture(scope="module")
def overheads(clean_environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Seconds that a fresh process takes to where a forked one begins, and that a new store takes to be made."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", "import pmoe_lightning.run.sweep"], env=clean_environ, check=True)
    imported = time.monotonic()
    make_database(f"sqlite:///{tmp_path_factory.mktemp('new') / 'mlflow.db'}")
    return {"imports": imported - begun, "store": time.monotonic() - imported}


def place_of(name: str, seed: int, folder: Path, server: Any, empty_store: Path) -> Place:
    """By the seed: a server, a SQLite store that is there, or one that the first start makes."""
    if seed % 4 != 3:
        return sqlite_place(folder / name, empty_store if seed % 2 else None)
    (folder / name).mkdir()
    return Place(folder / name, server().database, server().uri, server().folder / "artifacts")


@pytest.mark.torture
@pytest.mark.parametrize(("name", "seed"), [(name, seed) for name, number in CASES.items() for seed in range(number)])
def test_a_signal_at_any_moment(name, seed, tmp_path_factory, nursery, reference, server, empty_store, overheads):
    def measure() -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("m")  # a socket's address has 107 bytes
        place = place_of(name, seed, folder, server, empty_store)
        rng = random.Random(f"{name}-{seed}")
        try:
            return Torture(f"{name}-{seed}", KINDS[name], place, nursery, reference(name), overheads, rng).run()
        except Fault as fault:
            print(f"{fault}\nagain: make torture-moments CASE='[{name}-{seed}]'\nsee    {folder}")
            raise

    figures = cell(f"moments-{name}-{seed}", measure)
    assert len(figures["signals"]) == SIGNALS_PER_CASE


@pytest.mark.slow
def test_a_few_signals_to_a_short_run(tmp_path, nursery, empty_store):
    """The short form, among the slow tests: one kind of run, forked alone, and four signals."""
    short = Kind([*KINDS["ppo"].words, "total_frames=256", "data.frames_per_epoch=128"])
    undisturbed = measure_reference(short, sqlite_place(tmp_path / "undisturbed", empty_store), nursery)
    place = sqlite_place(tmp_path / "signalled", empty_store)
    Torture("short", short, place, nursery, undisturbed, {}, random.Random(0), signals=4, fresh=0.0).run()
