"""Updates of SAC and PPO on a GPU: milliseconds, memory and waits for the device, readable and as a CUDA graph.

    python benchmarks/gpu.py                 # or: make gpu
    python benchmarks/gpu.py --device cpu    # the same rows where there is no GPU; memory and waits are a GPU's alone

One table, in at most nine minutes: what has not begun by then is named as left out. No network is needed. A wait is
where the processor has to wait for the device inside an update, which nothing here should do: PyTorch makes it an
error, and the table shows the first. Written, not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from tensordict import TensorDict
from update import ACTION_DIM, ACTORS, ESTIMATORS, OBSERVATION_DIM, Case, make, minibatches, readable_form

from pmoe_lightning.algorithms import make_ppo
from pmoe_lightning.errors import first_line
from pmoe_lightning.modules.networks import set_matmul_precision
from pmoe_lightning.updates import OnPolicyUpdate, SACUpdate

SECONDS = 480.0  # no row begins later; the longest takes about one minute
UPDATES = 48  # of one call: whole turns of every policy_delay
FORMS = ("readable", "graph")
PRECISIONS = ("float32", "tf32", "bf16-hidden")
Update = Callable[[TensorDict], object]


class Row(NamedTuple):
    """What is measured: an algorithm as it is written, or as a compiled program, on a GPU a CUDA graph."""

    algorithm: str
    case: Case
    form: str

    def __str__(self) -> str:
        critic = self.case.critic if self.algorithm == "sac" else ""
        words = (self.algorithm, self.case.actor, critic, self.case.precision, self.form)
        return " ".join(filter(None, words))


def rows(device: str) -> Iterator[Row]:
    """The most telling first, because the time may end."""
    gaussian = Case("gaussian", "pathwise", components=1)
    cases = [("sac", Case()), ("ppo", Case()), ("sac", gaussian), ("ppo", gaussian)]
    cases += [("sac", Case(critic="crossq")), ("sac", gaussian._replace(critic="crossq"))]
    precisions = [precision for precision in PRECISIONS if device == "cuda" or precision != "tf32"]
    cases += [(name, case._replace(precision=other)) for other in precisions[1:] for name, case in cases[:2]]
    cases += [(name, gaussian._replace(actor=actor)) for actor in ("additive_moe", "mcp") for name in ("sac", "ppo")]
    return (Row(name, case, form) for name, case in cases for form in FORMS)


def prepare(row: Row, device: str) -> tuple[Update, TensorDict]:
    """The update and its minibatches [U, B]."""
    if row.algorithm == "ppo":
        return _prepare_ppo(row, device)
    algorithm = make(row.case).to(device)
    batch = minibatches(UPDATES, row.case.batch).to(device)
    if row.form == "readable":
        return readable_form(algorithm), batch
    delay = algorithm.policy_delay
    return SACUpdate(algorithm.loss, algorithm.configure_optimizers(), tau=0.005, policy_delay=delay), batch


def _prepare_ppo(row: Row, device: str) -> tuple[Update, TensorDict]:
    torch.manual_seed(0)
    case, bounds = row.case, ([-1.0] * ACTION_DIM, [1.0] * ACTION_DIM)
    components = {"num_components": case.components} if case.actor == "pmoe" else {}
    sizes = {"hidden_sizes": (case.width, case.width)}
    actor = ACTORS[case.actor](OBSERVATION_DIM, *bounds, return_log_prob=True, **sizes, **components)
    dims = {"observation_dim": OBSERVATION_DIM, "action_dim": ACTION_DIM}
    algorithm = make_ppo(actor, ESTIMATORS[case.estimator](), **dims, **sizes).to(device)
    batch = TensorDict({"observation": torch.randn(UPDATES, case.batch, OBSERVATION_DIM)}, [UPDATES, case.batch])
    batch = batch.to(device)
    with torch.no_grad():
        algorithm.policy(batch)
    for key in ("advantage", "value_target"):
        batch.set(key, torch.randn(UPDATES, case.batch, 1, device=device))
    batch = batch.select("observation", *algorithm.minibatch_keys)
    optimizer, norm = algorithm.configure_optimizers(), algorithm.max_grad_norm
    if row.form == "graph":
        return OnPolicyUpdate(algorithm.loss, optimizer, max_grad_norm=norm), batch

    def update(batch: TensorDict) -> None:
        for minibatch in batch.unbind(0):
            out = algorithm.loss(minibatch)
            optimizer.zero_grad()
            sum(value for name, value in out.items() if name.startswith("loss_")).backward()
            torch.nn.utils.clip_grad_norm_(algorithm.loss.parameters(), norm)
            optimizer.step()

    return update, batch


def measure(row: Row, device: str, rounds: int) -> str:
    """The line of the table."""
    set_matmul_precision(row.case.precision)
    update, batch = prepare(row, device)
    call = partial(update, batch)
    start = time.monotonic()
    for _ in range(3):  # compiles, records, replays
        call()
    _finish(device)
    prepared = time.monotonic() - start
    waits, memory = "-", "-"
    if device == "cuda":
        waits = _first_wait(call)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        memory = f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.1f}"
    seconds = []
    for _ in range(rounds):
        start = time.monotonic()
        call()
        _finish(device)
        seconds.append((time.monotonic() - start) / UPDATES)
    milliseconds = sorted(seconds)[len(seconds) // 2] * 1000
    if not all(math.isfinite(value) for value in (milliseconds, prepared)):
        raise ArithmeticError("a time that is not finite")
    return f"| {row} | {milliseconds:.3f} | {memory} | {waits} | {prepared:.0f} |"


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _first_wait(call: Callable[[], object]) -> str:
    """``0`` where the updates wait for nothing, else what PyTorch says of the first wait."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "0"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no row begins later")
    parser.add_argument("--only", default="", help="rows whose names hold this, for example 'sac pmoe'")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("make gpu: no CUDA device is there; --device cpu runs the rows without it", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", message="No target network updater")
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU, one thread"
    print(f"{where}, torch {torch.__version__}; HalfCheetah's sizes, two layers of 256, minibatches of 256\n")
    print("| row | ms per update | MiB of an update | waits | s to prepare |\n|---|---|---|---|---|")
    end, left_out, failed = time.monotonic() + arguments.seconds, [], 0
    for row in rows(arguments.device):
        if arguments.only not in str(row):
            continue
        if time.monotonic() > end:
            left_out.append(str(row))
            continue
        try:
            print(measure(row, arguments.device, arguments.rounds), flush=True)
        except Exception as error:  # the next rows are to be seen, whatever this one does
            failed += 1
            print(f"| {row} | {type(error).__name__}: {first_line(error)} | | | |", flush=True)
    if left_out:
        print(f"\nleft out, for want of time: {'; '.join(left_out)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
