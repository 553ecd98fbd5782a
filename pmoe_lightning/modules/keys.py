"""Names of TensorDict entries that belong together."""

from __future__ import annotations

from tensordict.utils import NestedKey


def beside(key: NestedKey, suffix: str) -> NestedKey:
    """The entry next to another one, named after it.

    Example:
        >>> beside(("agent", "action"), "_log_prob")
        ('agent', 'action_log_prob')
    """
    return f"{key}{suffix}" if isinstance(key, str) else (*key[:-1], f"{key[-1]}{suffix}")
