"""Pictures of a replay buffer, each stored once; observations of pixels are made of them when a minibatch is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from pmoe_lightning.checkpoints.blocks import read_block, write_block
from pmoe_lightning.errors import ConfigurationError

__all__ = ["FrameStore", "check_memory", "pictures_of", "random_shift"]

_BLOCK_BYTES = 16 * 2**20


class FrameStore:
    """The last M pictures uint8 [C, H, W] that N environments have shown, numbered in the order they came.

    In a rollout every observation is a stack of S pictures [S C, H, W], of which S - 1 were there before. ``number``
    puts those that are new into the store and says of every observation which it is made of; ``look_up`` makes
    observations of such numbers. A picture is gone once M others have come.

    In a checkpoint the pictures are blocks of some megabytes, which are written once, beside it, and which it names by
    their digests (``checkpoints.blocks``). Only the last, which is not full, is in the checkpoint itself.

    Args:
        capacity: M.
        shape: of an observation, [S C, H, W].
        stack: S.
        num_envs: N.
        device: where the pictures lie.
    """

    def __init__(
        self, capacity: int, shape: tuple[int, ...], *, stack: int, num_envs: int, device: torch.device | str = "cpu"
    ) -> None:
        self.shape, self.stack = tuple(shape), stack
        self.capacity, self.channels = capacity, shape[0] // stack
        self._frames = torch.empty(capacity, self.channels, *shape[1:], dtype=torch.uint8, device=device)
        self.count = 0  # of the pictures that have come
        #: Of every environment the numbers of what it shows now, None where a new episode begins.
        self._current: list[list[int] | None] = [None] * num_envs
        self._written: dict[int, str] = {}  # names of blocks by their first picture

    @property
    def oldest(self) -> int:
        """The number of the oldest picture that is still there."""
        return max(0, self.count - self.capacity)

    @property
    def block(self) -> int:
        """Pictures in a block."""
        return max(1, _BLOCK_BYTES // self._frames[0].numel())

    def number(self, rollout: TensorDictBase) -> TensorDictBase:
        """The rollout [N, T] with ``observation`` int64 [N, T, S] in place of ``pixels``, here and in ``next``."""
        pixels, following = rollout.get("pixels"), rollout.get(("next", "pixels"))
        here = torch.empty(*rollout.shape, self.stack, dtype=torch.int64)
        after = torch.empty_like(here)
        done = rollout.get(("next", "done")).squeeze(-1).tolist()
        for t in range(rollout.shape[1]):
            for i in range(rollout.shape[0]):
                current = self._current[i]
                if current is None or (t == 0 and not self._shows(current, pixels[i, t])):
                    current = self._begin(pixels[i, t])
                here[i, t] = torch.tensor(current)
                current = [*current[1:], self._put(following[i, t, -self.channels :])]
                after[i, t] = torch.tensor(current)
                self._current[i] = None if done[i][t] else current
        numbered = rollout.exclude("pixels", ("next", "pixels"))
        return numbered.set("observation", here).set(("next", "observation"), after)

    def look_up(self, numbers: Tensor) -> Tensor:
        """The observations uint8 [M, S C, H, W] that are made of pictures of these numbers [M, S]."""
        places = numbers.to(self._frames.device).remainder(self.capacity)
        return self._frames.index_select(0, places.reshape(-1)).view(-1, *self.shape)

    def _shows(self, numbers: list[int], pixels: Tensor) -> bool:
        """Whether the environment goes on where it was: one made anew, as after a worker was lost, does not."""
        return torch.equal(self.look_up(torch.tensor([numbers]))[0], pixels.to(self._frames.device))

    def _begin(self, pixels: Tensor) -> list[int]:
        """The numbers of an observation none of whose pictures is there; the equal ones have one number."""
        numbers: list[int] = []
        pictures = pixels.unflatten(0, (self.stack, self.channels))
        for k in range(self.stack):
            is_same = k > 0 and torch.equal(pictures[k], pictures[k - 1])
            numbers.append(numbers[-1] if is_same else self._put(pictures[k]))
        return numbers

    def _put(self, picture: Tensor) -> int:
        self._frames[self.count % self.capacity] = picture
        self.count += 1
        return self.count - 1

    def state_dict(self, folder: Path | None) -> dict[str, Any]:
        """What a checkpoint holds: the blocks by name, where there is a ``folder`` to write them to, and the rest.

        Raises:
            RunError: a block cannot be written.
        """
        first, blocks = self.oldest, {}
        while folder is not None and first + self.block <= self.count:
            end = (first // self.block + 1) * self.block  # blocks lie at multiples, so that they are the same next time
            if end > self.count:
                break
            start = end - self.block
            name = self._written.get(start)
            if name is None or not (folder / name).is_file():
                start = max(start, self.oldest)
                name = self._written[start] = write_block(self._between(start, end), folder)
            blocks[start] = name
            first = end
        self._written = dict(blocks)
        current = [numbers or [] for numbers in self._current]
        return {"count": self.count, "blocks": blocks, "rest": self._between(first, self.count), "current": current}

    def load_state_dict(self, state: dict[str, Any], folder: Path | None) -> None:
        """Go on from a :meth:`state_dict`, whose blocks are in ``folder``; a smaller store keeps the newest.

        Raises:
            RunError: a block is missing or damaged.
        """
        self.count = state["count"]
        self._current = [list(numbers) or None for numbers in state["current"]]
        rest = state["rest"]
        self._fill(self.count - len(rest), rest)
        for start, name in state["blocks"].items():
            assert folder is not None  # whoever has read the checkpoint knows where it lies
            self._fill(start, read_block(folder / name).view(-1, *self._frames.shape[1:]))
        self._written = dict(state["blocks"])

    def _fill(self, start: int, pictures: Tensor) -> None:
        first = max(start, self.oldest)
        places = torch.arange(first, start + len(pictures), device=self._frames.device).remainder(self.capacity)
        self._frames[places] = pictures[first - start :].to(self._frames.device)

    def _between(self, start: int, end: int) -> Tensor:
        """The pictures of these numbers, a copy on the CPU."""
        places = torch.arange(start, end, device=self._frames.device).remainder(self.capacity)
        return self._frames[places].cpu()


def pictures_of(buffer_size: int, total_frames: int) -> int:
    """How many pictures a buffer stores: one for each of its transitions, or all that a run of so many frames can show.

    Those are at most two a frame, where every episode is a step long. So a run that is to go on to more frames has lost
    nothing that it would have kept.
    """
    return min(buffer_size, 2 * total_frames)


def random_shift(pixels: Tensor, pad: int = 4) -> Tensor:
    """Every observation [M, C, H, W] moved by up to ``pad`` pixels either way, both ways alike in all channels.

    What comes in from outside repeats the border: the random crop of DrQ (Kostrikov et al. 2021, arXiv 2004.13649).
    """
    m, channels, height, width = pixels.shape
    down, right = torch.randint(-pad, pad + 1, (2, m), device=pixels.device)
    rows = (torch.arange(height, device=pixels.device) + down.unsqueeze(1)).clamp(0, height - 1)
    # Whole rows are copied by their numbers, then columns in as many strokes as there are shifts: a gather of single
    # pixels takes ten times as long.
    images = torch.arange(m * channels, device=pixels.device).view(m, channels, 1) * height
    moved = pixels.reshape(-1, width).index_select(0, (images + rows.unsqueeze(1)).reshape(-1)).view_as(pixels)
    shifted = torch.empty_like(moved)
    for shift in range(-pad, pad + 1):
        chosen = (right == shift).nonzero().squeeze(1)
        if len(chosen):
            part, low, high = moved.index_select(0, chosen), max(0, -shift), max(0, shift)
            left, right_edge = (
                edge.expand(-1, -1, -1, n) for edge, n in ((part[..., :1], low), (part[..., -1:], high))
            )
            shifted.index_copy_(0, chosen, torch.cat([left, part[..., high : width - low], right_edge], -1))
    return shifted


def check_memory(number: int, shape: tuple[int, ...], stack: int, device: torch.device, *, refuse: bool = True) -> str:
    """What so many pictures take, said in a line, before any is there.

    Raises:
        ConfigurationError: it is more than this device has free; not unless it is to ``refuse``.
    """
    size = number * (shape[0] // stack) * shape[1] * shape[2]
    free = free_memory(device)
    said = f"data.buffer_size: {number:,} pictures of {shape[0] // stack} x {shape[1]} x {shape[2]} take"
    said = f"{said} {_amount(size)}"
    if refuse and free is not None and size > free:
        raise ConfigurationError(
            f"{said}, and {device.type} has {_amount(free)} free: lower data.buffer_size, or env.pixels.size"
        )
    return said


def _amount(size: int) -> str:
    """Bytes in the largest unit of which there is one."""
    unit, name = next((each for each in ((2**30, "GiB"), (2**20, "MiB")) if size >= each[0]), (2**10, "KiB"))
    return f"{size / unit:.2f} {name}"


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024)
    except (OSError, StopIteration, ValueError):
        pass
    try:  # of a container
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        free.append(int(limit) - int(used))
    except (OSError, ValueError):  # there is no limit
        pass
    return min(free, default=None)
