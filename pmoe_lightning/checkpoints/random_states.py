"""The states of all global random generators as plain values: Python's, NumPy's and torch's on every device."""

import random
from typing import Any

import numpy as np
import torch


def capture_random_states() -> dict[str, Any]:
    """The present states, as a checkpoint can hold them."""
    legacy = np.random.get_state(legacy=False)
    words = legacy["state"]["key"]
    return {
        "python": random.getstate(),
        "numpy": {**legacy, "state": {**legacy["state"], "key": torch.from_numpy(words.astype(np.int64))}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Go on with the random numbers that would have come next. GPUs that were not there then keep their own state."""
    random.setstate(states["python"])
    legacy = states["numpy"]
    key = legacy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**legacy, "state": {**legacy["state"], "key": key}})
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
