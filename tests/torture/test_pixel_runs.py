"""A run from pixels stopped, killed and damaged: its blocks of replay are as safe as its checkpoints.

Pictures are 32 x 32 and a block holds eight of them, so that an instant's run writes, names and removes many.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import cell
from forked import LAST, SMALL, Watched, count_frames, fork, run, save_slowly, train, wait, warm_up
from test_bitwise import stop_at
from test_kills import until
from test_resume import differing, state_of

from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.checkpoints.blocks import FOLDER, locate_blocks, named_blocks
from pmoe_lightning.checkpoints.files import previous_checkpoint
from pmoe_lightning.data import frames as frames_module
from pmoe_lightning.data.off_policy import OffPolicyData
from pmoe_lightning.errors import RunError
from pmoe_lightning.run.resume import read_newest

pytestmark = pytest.mark.torture

STOPS, KILLS, DAMAGES, INTERVAL, CAPACITY = 20, 50, 200, 32, 100
IN_A_BLOCK, SIDE = 8, 32
WORDS = ["algo=sac", "env=InvertedPendulum-v5", f"env.pixels.size={SIDE}", "env.pixels.grey=true"]
WORDS += ["env.pixels.look=fast", "encoder=drq", "encoder.channels=[4,4]", "encoder.strides=[2,2]"]
WORDS += ["encoder.features=6", "data.init_random_frames=32", "data.batch_size=4", "data.utd_ratio=0.25"]
WORDS += [*SMALL, f"data.buffer_size={CAPACITY}", "data.frames_per_batch=8", f"data.frames_per_epoch={INTERVAL}"]
WORDS += ["data.n_step=2", "logger=none", "callbacks=[nonfinite,metrics,evaluation,checkpoint_best,checkpoint_last]"]
WORDS += ["callbacks.evaluation.episodes=1", "callbacks.evaluation.every_epochs=5"]


def small_blocks() -> None:
    """In a child: blocks of a few pictures."""
    frames_module._BLOCK_BYTES = IN_A_BLOCK * SIDE * SIDE


def pictures_of(checkpoint: dict[str, Any], path: Path) -> torch.Tensor:
    """All that the replay buffer of a checkpoint holds, oldest first."""
    locate_blocks(checkpoint, path)
    state = checkpoint["experience"][0]["replay"]["frames"]
    store = frames_module.FrameStore(CAPACITY + 10, (3, SIDE, SIDE), stack=3, num_envs=2)
    store.load_state_dict(state, Path(state["folder"]))
    return store._between(store.oldest, store.count)


def stop_and_resume(folder: Path) -> dict[str, Any]:
    frames = 1280
    words = [*WORDS, f"total_frames={frames}", "hydra.run.dir=run"]
    whole, parts = folder / "whole", folder / "parts"
    whole.mkdir()
    parts.mkdir()
    assert run(words, whole, prepare=small_blocks) == 0, (whole / "log.txt").read_text()[-3000:]
    stops = sorted(random.Random(0).sample(range(64, frames, 8), STOPS))
    for at in stops:

        def prepare(at: int = at) -> None:
            small_blocks()
            stop_at(at)

        code = run([*words, "resume=auto"], parts, prepare=prepare)
        assert code == 128 + signal.SIGTERM, (parts / "log.txt").read_text()[-3000:]
        assert read_checkpoint(parts / "run" / LAST)["policy"]["env_frames"] == at
    assert run([*words, "resume=auto"], parts, prepare=small_blocks) == 0
    said = (parts / "log.txt").read_text()
    ends = [read_checkpoint(place / "run" / LAST) for place in (whole, parts)]
    pictures = [pictures_of(end, place / "run" / LAST) for end, place in zip(ends, (whole, parts), strict=True)]
    # Which pictures lie in blocks and which in the checkpoint may differ: the oldest block is cut where it was written.
    states = [state_of(place / "run") for place in (whole, parts)]
    for state in states:
        frames_of = state["experience"][0]["replay"]["frames"]
        del frames_of["blocks"], frames_of["rest"]
    return {
        "stops": stops,
        "tensors_and_values_that_differ": differing(*states),
        "pictures": len(pictures[0]),
        "pictures_that_differ": 0 if torch.equal(*pictures) else len(pictures[0]),
        "new_episodes": said.count("new episode"),
    }


def test_twenty_stops_of_a_run_from_pixels_leave_no_trace(tmp_path):
    figures = cell("pixels-bitwise", lambda: stop_and_resume(tmp_path))
    assert len(figures["stops"]) == STOPS and figures["pictures"] >= CAPACITY
    assert figures["tensors_and_values_that_differ"] == []
    assert figures["pictures_that_differ"] == figures["new_episodes"] == 0


def blocks_named(folder: Path) -> set[str]:
    """By any checkpoint there that can be read."""
    return {block.name for path in folder.glob("*.ckpt") for block in named_blocks(path)}


def kill_once(words: list[str], folder: Path, rng: random.Random, moment: str) -> Watched:
    """Start or resume the run and kill it at a random time: in a block, in a checkpoint, or anywhere else."""
    watched = Watched()

    def prepare() -> None:
        small_blocks()
        count_frames(watched)
        if moment != "training":
            save_slowly(watched, 0.001)
        if moment == "block":
            write_block = frames_module.write_block

            def slowly(*arguments: Any) -> str:
                watched.saving = 2
                name = write_block(*arguments)
                watched.saving = 0
                return name

            frames_module.write_block = slowly

    child = fork(train(words, folder, prepare=prepare), folder / "log.txt")
    until(lambda: watched.frames > 0, child)
    begun, ahead = watched.frames, rng.uniform(0, 3 * INTERVAL)
    reached = {"block": lambda: watched.saving == 2, "save": lambda: watched.saving == 1}
    # Sometimes the first save after the start, sometimes a later one.
    until(lambda: watched.frames >= begun + ahead, child)
    until(reached.get(moment, lambda: True), child)
    time.sleep(rng.uniform(0, {"block": 0.02, "save": 0.1, "training": 0.05}[moment]))
    os.kill(child, signal.SIGKILL)
    assert wait(child) == -signal.SIGKILL
    return watched


def kill_again_and_again(folder: Path) -> dict[str, Any]:
    rng, last, known = random.Random(1), folder / "run" / LAST, 0
    moments = ["block"] * 20 + ["save"] * 10 + ["training"] * (KILLS - 30)
    rng.shuffle(moments)
    figures = {"kills": 0, "in_a_block": 0, "in_a_save": 0, "unreadable": 0, "most_frames_lost": 0, "most_unnamed": 0}
    warm_up()
    for moment in moments:
        watched = kill_once([*WORDS, "total_frames=1000000", "resume=auto", "hydra.run.dir=run"], folder, rng, moment)
        figures["kills"] += 1
        figures["in_a_block"] += watched.saving == 2
        figures["in_a_save"] += watched.saving == 1
        saved = 0
        for path in (last, previous_checkpoint(last)):
            try:
                if path.exists():
                    checkpoint = read_checkpoint(path)
                    pictures_of(checkpoint, path)
                    saved = max(saved, checkpoint["policy"]["env_frames"])
            except RunError:
                figures["unreadable"] += 1
        if last.exists():
            there = {path.name for path in last.with_name(FOLDER).iterdir()}
            figures["most_unnamed"] = max(figures["most_unnamed"], len(there - blocks_named(last.parent)))
        assert saved >= known, "a newer checkpoint gave way to an older one"
        figures["most_frames_lost"] = max(figures["most_frames_lost"], watched.frames - saved)
        known = saved
    end = known + 3 * INTERVAL
    assert run([*WORDS, f"total_frames={end}", "resume=auto", "hydra.run.dir=run"], folder, prepare=small_blocks) == 0
    assert run([*WORDS, f"total_frames={end}", "hydra.run.dir=whole"], folder, prepare=small_blocks) == 0
    ends = [pictures_of(read_checkpoint(folder / name / LAST), folder / name / LAST) for name in ("run", "whole")]
    states = [state_of(folder / name) for name in ("run", "whole")]
    for state in states:
        frames_of = state["experience"][0]["replay"]["frames"]
        del frames_of["blocks"], frames_of["rest"]
    blocks = {
        name: {path.name for path in (folder / name / LAST).with_name(FOLDER).iterdir()} for name in ("run", "whole")
    }
    return figures | {
        "frames": end,
        "differs_from_a_run_without_kills": differing(*states) + (["pictures"] if not torch.equal(*ends) else []),
        "strays_at_the_end": len([name for name in blocks["run"] if len(name) != 64]),
        "blocks_at_the_end": len(blocks["run"]),
        "blocks_without_kills": len(blocks["whole"]),
    }


def test_fifty_kills_of_a_run_from_pixels_lose_no_picture(tmp_path):
    figures = cell("pixels-kills", lambda: kill_again_and_again(tmp_path))
    assert figures["kills"] == KILLS and figures["in_a_block"] >= 12 and figures["in_a_save"] >= 5
    assert figures["unreadable"] == 0 and figures["most_frames_lost"] <= INTERVAL + 8
    assert figures["differs_from_a_run_without_kills"] == [] and figures["strays_at_the_end"] == 0
    assert figures["blocks_at_the_end"] <= figures["blocks_without_kills"] + CAPACITY // IN_A_BLOCK


def flip_a_bit(block: Path, other: Path, rng: random.Random) -> None:
    content = bytearray(block.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    block.write_bytes(content)


def cut_short(block: Path, other: Path, rng: random.Random) -> None:
    content = block.read_bytes()
    block.write_bytes(content[: rng.randrange(len(content))])


def remove(block: Path, other: Path, rng: random.Random) -> None:
    block.unlink()


def swap(block: Path, other: Path, rng: random.Random) -> None:
    mine, others = block.read_bytes(), other.read_bytes()
    block.write_bytes(others)
    other.write_bytes(mine)


def lengthen(block: Path, other: Path, rng: random.Random) -> None:
    block.write_bytes(block.read_bytes() + bytes(1 + rng.randrange(100)))


def damage_and_read(folder: Path) -> dict[str, Any]:
    rng, last = random.Random(2), folder / "run" / LAST
    assert run([*WORDS, "total_frames=320", "hydra.run.dir=run"], folder, prepare=small_blocks) == 0
    names = sorted(set(read_checkpoint(last)["experience"][0]["replay"]["frames"]["blocks"].values()))
    older = set(read_checkpoint(previous_checkpoint(last))["experience"][0]["replay"]["frames"]["blocks"].values())
    blocks = {path: path.read_bytes() for path in last.with_name(FOLDER).iterdir()}
    figures = {"damaged": 0, "accepted": 0, "one_before_taken": 0, "refused": 0, "more_than_a_line": 0}
    for i in range(DAMAGES):
        name, other = rng.sample(names, 2)
        paths = [last.with_name(FOLDER) / each for each in (name, other)]
        damage = [flip_a_bit, cut_short, remove, swap, lengthen][i % 5]
        damage(*paths, rng)
        figures["damaged"] += 1
        try:
            path, _ = read_newest(last)
            touched = {name, other} if damage is swap else {name}
            figures["accepted"] += path == last or bool(touched & older)
            figures["one_before_taken"] += path != last
        except RunError as error:
            figures["refused"] += 1
            figures["more_than_a_line"] += "\n" in str(error)
        for block, content in blocks.items():
            block.write_bytes(content)
    assert read_newest(last)[0] == last
    return figures


def test_two_hundred_damaged_blocks_are_refused(tmp_path):
    figures = cell("pixels-corruption", lambda: damage_and_read(tmp_path))
    assert figures["damaged"] == DAMAGES == figures["one_before_taken"] + figures["refused"]
    assert figures["accepted"] == figures["more_than_a_line"] == 0
    assert figures["refused"] > 0 and figures["one_before_taken"] > 0


def memory_of_a_run(folder: Path) -> dict[str, Any]:
    """Resident megabytes, once the buffer is full and after three times as many frames."""
    full, watched = 3000, Watched()

    def prepare() -> None:
        small_blocks()
        draw = OffPolicyData.collect

        def measured(self: OffPolicyData) -> Any:
            rollout = draw(self)
            for at, cell_of in ((full, "frames"), (3 * full, "orphans")):
                if self.env_frames == at:
                    setattr(
                        watched,
                        cell_of,
                        int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
                    )
            return rollout

        OffPolicyData.collect = measured

    words = [*WORDS, f"total_frames={3 * full + 64}", "data.frames_per_epoch=600", "hydra.run.dir=run"]
    warm_up()
    assert wait(fork(train(words, folder, prepare=prepare), folder / "log.txt")) == 0
    blocks = list((folder / "run" / LAST).with_name(FOLDER).iterdir())
    return {
        "frames": [full, 3 * full],
        "megabytes": [round(at / 1e6, 1) for at in (watched.frames, watched.orphans)],
        "blocks_at_the_end": len(blocks),
    }


def test_the_memory_and_the_blocks_of_a_long_run_do_not_grow(tmp_path):
    figures = cell("pixels-memory", lambda: memory_of_a_run(tmp_path))
    early, late = figures["megabytes"]
    assert early > 100 and late - early < 15
    assert figures["blocks_at_the_end"] <= 4 * (CAPACITY // IN_A_BLOCK + 2)
