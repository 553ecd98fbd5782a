"""Errors that a user can mend. Their message is one line: what was wrong, where, and what to do."""

import signal


class ConfigurationError(ValueError):
    """The request itself is wrong (unknown key, impossible value, incompatible pair); commands exit with 2."""


class RunError(RuntimeError):
    """The request is right but cannot be carried out here (missing file, dead server); commands exit with 1."""


class NonFiniteError(RunError):
    """A number that must be finite is NaN or infinite, and was kept out of environment, replay and weights."""


def describe_end(code: int) -> str:
    """How a process ended, from its exit code, which is minus a signal where one killed it."""
    return f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
