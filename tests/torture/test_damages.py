"""Five hundred flips and cuts over every file of a run's folder: ``resume`` accepts none without a word."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cells import cell
from damaged_folder import ENDS, DamagedFolder

pytestmark = pytest.mark.torture

DAMAGES = {"killed in training": 220, "killed behind its last checkpoint": 160, "finished": 120}
CELL = 20


def damage_again_and_again(root: Path, end: str, store: Path, seed: str) -> dict[str, Any]:
    """Every damage has a seed of its own: its number, behind that of its cell."""
    folder, counts, accepted = DamagedFolder(root, end, store), Counter(), []
    for number in range(CELL):
        rng = random.Random(f"{seed}-{number}")
        outcome = folder.damage(rng.choice(folder.kinds), rng)
        counts[f"{outcome.file}: {outcome.how}"] += 1
        accepted += [[number, outcome.file, *outcome.wrong]] * bool(outcome.wrong)
    return {"damaged": dict(counts), "accepted": accepted}


def numbered_cells() -> list[tuple[str, int]]:
    return [(end, number) for end in ENDS for number in range(DAMAGES[end] // CELL)]


@pytest.mark.parametrize(("end", "number"), numbered_cells())
def test_five_hundred_damages_are_not_accepted_without_a_word(end, number, tmp_path, empty_store):
    root, name = tmp_path / "root", f"damaged-folder-{end.replace(' ', '-')}-{number}"
    root.mkdir()
    figures = cell(name, lambda: damage_again_and_again(root, end, empty_store, name))
    assert sum(figures["damaged"].values()) == CELL
    assert figures["accepted"] == []
