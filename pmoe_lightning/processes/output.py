"""Output that cannot be written is lost, and nothing else: the program goes on, and ends as it would have."""

from __future__ import annotations

import io
import logging
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from pmoe_lightning.errors import ConfigurationError, RunError, error_line
from pmoe_lightning.processes.stopping import stop

#: So much, a pipe that takes anything takes without waiting.
_PIECE = getattr(select, "PIPE_BUF", 512)
_LOOK_SECONDS = 0.2


def outlive_output() -> None:
    """From now on standard output and standard error may go away: a pipe nobody reads, a full disk, a closed terminal.

    What cannot be written then goes to the null device, also that of child processes and of libraries in C, and what
    Python would still like to write as it exits. A stream that was closed from the start is opened there, so that no
    file takes its number. A reader that has stopped reading is waited for, until a signal asks this process to end.
    """
    if os.name != "posix":
        return
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _discard(descriptor)
    sys.stdout, sys.stderr = _lenient(sys.stdout, 1), _lenient(sys.stderr, 2)
    logging.raiseExceptions = False  # a line that cannot be written is not worth the lines that would say so


def lost_result() -> OSError | None:
    """Why standard output has lost what was written to it, for a command whose result that is.

    None also where its reader has had enough, as ``head`` has.
    """
    with suppress(OSError):
        sys.stdout.flush()
    error = getattr(_raw(sys.stdout), "error", None) if hasattr(sys.stdout, "buffer") else None
    return None if isinstance(error, BrokenPipeError) else error


def exit_code_of(command: Callable[[], object]) -> int:
    """Run a command whose result is what it prints: 0, 1 for what failed, 2 for wrong words, 130 for Ctrl-C.

    What the user can mend is one line on standard error, and so is a result that nobody could read.
    """
    outlive_output()
    try:
        command()
    except (ConfigurationError, RunError) as error:
        print(f"error: {error_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    except KeyboardInterrupt:
        return 130
    if lost := lost_result():
        print(f"error: the result could not be written to standard output: {lost.strerror}", file=sys.stderr)
        return 1
    return 0


class _Lenient(io.FileIO):
    """A descriptor to which one can always write."""

    error: OSError | None = None

    def write(self, content: Any, /) -> int:
        """All of it, in pieces that no reader can make wait once the system has said that they can be written."""
        left = memoryview(content)
        try:
            while left:
                while not select.select([], [self], [], _LOOK_SECONDS)[1]:
                    if stop.is_asked:
                        _discard(self.fileno())
                left = left[super().write(left[:_PIECE]) :]
        except OSError as error:
            self.error = error
            _discard(self.fileno())
        return len(content)


def _lenient(stream: TextIO | None, descriptor: int) -> TextIO:
    """The stream on its descriptor, if that is where it writes to: what somebody else has put there is theirs."""
    kept: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
    if stream is not None:
        try:
            if stream.fileno() != descriptor or isinstance(_raw(stream), _Lenient):
                return stream
            kept = {name: getattr(stream, name) for name in ("encoding", "errors", "line_buffering", "write_through")}
        except (AttributeError, ValueError, OSError):
            return stream
        with suppress(OSError):
            stream.flush()
    raw = _Lenient(descriptor, "w", closefd=False)
    return io.TextIOWrapper(raw if kept.get("write_through") else io.BufferedWriter(raw), **kept)


def _raw(stream: TextIO) -> Any:
    return getattr(stream.buffer, "raw", stream.buffer)  # Python may be told not to buffer


def _discard(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
    os.set_inheritable(descriptor, True)
