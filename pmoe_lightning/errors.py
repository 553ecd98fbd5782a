"""Errors that a user can mend. Their message is one line: what was wrong, where, and what to do."""

import signal


class ConfigurationError(ValueError):
    """The request itself is wrong (unknown key, impossible value, incompatible pair); commands exit with 2."""


class RunError(RuntimeError):
    """The request is right but cannot be carried out here (missing file, dead server); commands exit with 1."""


class NonFiniteError(RunError):
    """A number that must be finite is NaN or infinite, and was kept out of environment, replay and weights."""


def error_line(error: BaseException, *, named: bool = False) -> str:
    """What an error says, for people: its message folded into one line, its class where it has none.

    Args:
        error: any; of what caused it nothing is said, because a message for people repeats what matters of that.
        named: its class stands before the message too, for whoever wrote the code that raised it.
    """
    name, said = type(error).__name__, " ".join(str(error).split())
    return (f"{name}: {said}" if named else said) if said else name


def is_exit(error: BaseException) -> bool:
    """Whether it is ``sys.exit()`` of somebody's code; how a signal ends a run is a subclass of ``SystemExit``."""
    return type(error) is SystemExit


def first_line(error: BaseException) -> str:
    """As :func:`error_line`, of libraries whose further lines are for their developers: OmegaConf, Ray, torch."""
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split()) if lines else type(error).__name__


def describe_end(code: int) -> str:
    """How a process ended, from its exit code, which is minus a signal where one killed it."""
    return f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
