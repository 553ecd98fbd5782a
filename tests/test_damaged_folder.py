"""No damage to a file of a run's folder is accepted by ``resume`` without a word; `make torture` has more of them."""

from __future__ import annotations

import random

from damaged_folder import DamagedFolder


def test_no_damage_to_a_run_is_accepted_without_a_word(tmp_path, empty_store):
    root = tmp_path / "root"
    root.mkdir()
    folder, rng = DamagedFolder(root, "killed behind its last checkpoint", empty_store), random.Random(0)
    kinds = [kind for kind in folder.kinds if not kind.startswith(".hydra/")]  # written anew, never read
    outcomes = {kind: folder.damage(kind, rng) for kind in kinds}
    assert [outcome for outcome in outcomes.values() if outcome.wrong] == []
    for file in ("checkpoints/last.ckpt", "checkpoints/best.ckpt", ".run.json", "mlflow-spool/*.entry"):
        assert outcomes[file].how == "said", outcomes
