"""Signals that ask a command to end: one handler from its first line to its last, which takes a note.

An exception raised by a handler can vanish in whatever runs at that moment, a callback of a library in C for instance,
or cut in two what belongs together. So Ctrl-C, SIGTERM and SIGHUP only set a flag, which the program looks at wherever
it may end. Where it cannot look, in a stretch declared interruptible, the handler raises as well, but for places where
that is known to vanish; should it vanish all the same, the flag ends the run at the end of the stretch. Where an
exception would do harm, as in the middle of a compile, a thread ends the process.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from pmoe_lightning.processes.orphans import children, kill_descendants

#: The signals that ask for an end, those of them that this system has.
STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
#: The exit codes of a run that one of them has ended.
STOP_CODES = tuple(128 + number for number in STOPS)
#: How long an interruptible stretch may go on after a signal, in code that does not come back to Python.
_PATIENCE_SECONDS = 5.0
_RETRY_SECONDS = 0.1
_CLOSING_SECONDS = 3.0
#: Called from C, where an exception ends as a note on standard error or as another exception.
_CALLBACKS = ("__del__", "__torch_dispatch__", "__torch_function__", "_release_signals")


class Stopped(SystemExit):
    """A signal has ended the run; its exit code is the shell's."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class Stop:
    """What the signals have asked this process for. There is one, :data:`stop`.

    A second signal ends the process at once, and all it has started: what is on the disk is whole at any moment. One
    stop can be several signals: ``mlflow run`` adds a SIGTERM to Ctrl-C, and whoever closes a terminal or a session
    sends SIGHUP more than once. So it takes a second SIGTERM, or a Ctrl-C after whatever came first.

    Attributes:
        asked: the signal that came first, 0 before.
        when: words that say when the run will stop, for the line that answers the signal.
    """

    def __init__(self) -> None:
        self.asked, self.when = 0, ""
        self._unasked, self._seen = threading.Lock(), Counter[int]()
        self._stretches = self._unbreakable = self._echoes = 0
        self._raised = False
        self._kept: list[int] | None = None
        self._closers: list[Callable[[], None]] = []
        self._pid, self._forking = 0, threading.local()

    def listen(self) -> None:
        """Answer the signals from now on; what they have asked for before is forgotten.

        Only the main thread can listen. A SIGHUP that the process was started to ignore (``nohup``) stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        self.asked, self.when, self._raised = 0, "", False
        self._unasked, self._seen = threading.Lock(), Counter[int]()
        if self._pid != os.getpid():
            self._pid, self._stretches, self._unbreakable, self._closers = os.getpid(), 0, 0, []
            self._start_watch()
        for number in STOPS:
            if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._take_note)

    @property
    def is_asked(self) -> bool:
        """Whether a signal has asked this process to end."""
        return self.asked != 0

    def raise_if_asked(self) -> None:
        """The look at the flag, wherever a run may end.

        Raises:
            Stopped: a signal has come.
        """
        if self.asked:
            self._raised = True
            raise Stopped(self.asked)

    @contextmanager
    def interruptible(self, *, ends_children: bool = False) -> Iterator[None]:
        """A stretch that a signal breaks off wherever it is, within seconds; for what would be repeated as a whole.

        Args:
            ends_children: kill the processes that were started in it, such as an encoder of films, which would go on.

        Raises:
            Stopped: a signal has come, before or in it, whatever became of the exception that the handler has raised.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.raise_if_asked()
        outer = self._kept
        self._kept = children() if ends_children else outer
        self._stretches += 1
        try:
            yield
        except Exception:
            self.raise_if_asked()
            raise
        finally:
            self._stretches -= 1
            self._kept = outer
        self.raise_if_asked()

    @contextmanager
    def unbreakable(self) -> Iterator[None]:
        """A stretch in which a signal ends the process at once, from another thread, with all that it has started.

        For a compile: a compiler of Python is in the middle of something at every moment, and an exception there can
        end in an abort of the process, with nothing closed.

        Raises:
            Stopped: a signal has come before.
        """
        self.raise_if_asked()
        self._unbreakable += 1
        try:
            yield
        finally:
            self._unbreakable -= 1

    @contextmanager
    def closing(self, close: Callable[[], None]) -> Iterator[None]:
        """What is to be called, in another thread, where the process is ended while this one hangs."""
        self._closers.append(close)
        try:
            yield
        finally:
            self._closers.remove(close)

    def end(self, code: int) -> None:
        """Close what is open, kill what was started and exit, from another thread than the one that hangs."""
        closing = threading.Thread(target=lambda: [close() for close in reversed(self._closers)], daemon=True)
        closing.start()
        closing.join(_CLOSING_SECONDS)
        kill_descendants()
        os._exit(code)

    def _ask(self, number: int) -> None:
        """Called for every signal by the handler and by the thread, whichever comes first."""
        if self._unasked.acquire(blocking=False):
            self.asked = number
            again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            _say(f"stopping{'' if self._stretches or self._unbreakable else self.when}{again}\n")

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        self._ask(number)
        if self._stretches and not (self._raised or self._unbreakable or _is_in_callback(frame)):
            self._raised = True
            if self._kept is not None:
                kill_descendants(keep=self._kept)
            raise Stopped(self.asked or number)

    def _start_watch(self) -> None:
        """A thread to which the system itself reports signals: it sees them also while the main thread is in C."""
        reports, self._reporting = os.pipe()
        os.set_blocking(self._reporting, False)
        signal.set_wakeup_fd(self._reporting, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reports,), daemon=True, name="signal-watch").start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._hold_signals, after_in_parent=self._release_signals, after_in_child=self._leave_to_parent
            )
        atexit.register(_leave_nothing)

    def _watch(self, reports: int) -> None:
        patience_ends = None
        while True:
            if select.select([reports], [], [], None if patience_ends is None else _RETRY_SECONDS)[0]:
                for number in os.read(reports, 64):
                    if self._echoes:
                        self._echoes -= 1
                    # Whoever has taken the handler away answers the signal.
                    elif number in STOPS and signal.getsignal(number) == self._take_note and self._is_first(number):
                        patience_ends = time.monotonic() + _PATIENCE_SECONDS
            is_over = patience_ends is not None and time.monotonic() > patience_ends
            if self.asked and (self._unbreakable or (self._stretches and is_over)):
                self.end(128 + self.asked)
            if is_over:
                patience_ends = None
            elif patience_ends is not None and self._stretches and not self._raised:
                self._try_again()

    def _try_again(self) -> None:
        """The handler has found the main thread where it must not raise: let it look anew."""
        number, thread = self.asked, threading.main_thread().ident
        if number and thread is not None and signal.getsignal(number) == self._take_note:
            self._echoes += 1
            signal.pthread_kill(thread, number)

    def _is_first(self, number: int) -> bool:
        """Whether it is the first; a second one ends the process here."""
        self._seen[number] += 1
        self._ask(number)
        if self._seen.total() == 1:
            return True
        if number == signal.SIGINT or self._seen[signal.SIGTERM] > 1:
            kill_descendants()
            os._exit(128 + (self.asked or number))
        return False

    def _hold_signals(self) -> None:
        """A signal to a process that is just being forked would be reported to the parent, as one more of its own."""
        self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)

    def _release_signals(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._forking.mask)

    def _leave_to_parent(self) -> None:
        """A forked process is no command: it obeys signals as any other."""
        if self._pid == os.getppid() and signal.getsignal(signal.SIGTERM) == self._take_note:
            signal.set_wakeup_fd(-1)
            for number in STOPS:
                signal.signal(number, signal.SIG_DFL)
            self._release_signals()  # what has come meanwhile ends it here
            signal.signal(signal.SIGINT, signal.default_int_handler)
        else:
            self._release_signals()


def _is_in_callback(frame: FrameType | None) -> bool:
    while frame is not None:
        code = frame.f_code
        if code.co_name in _CALLBACKS or (code.co_filename == weakref.__file__ and code.co_name == "__call__"):
            return True
        frame = frame.f_back
    return False


def _say(line: str) -> None:
    """Write to standard error as the system does: what the main thread is writing may be under way."""
    with suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, line.encode())


def _leave_nothing() -> None:
    """The last thing before Python takes its handlers away: how the process ends is settled, and nobody goes on."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    kill_descendants()


#: Of this process.
stop = Stop()
