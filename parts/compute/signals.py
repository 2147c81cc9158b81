"""Ctrl-C and its kin: the step is finished, then saved; a second one breaks off."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
OF_BATCH_SYSTEMS = SIGNALS[-3:]  # warnings, perhaps repeated, of a SIGKILL


class SignalCame(KeyboardInterrupt):
    """A signal, by its name."""

    def __init__(self, signal_name: str):
        super().__init__(signal_name)
        self.signal_name = signal_name


class BrokenOff(SignalCame):
    """A signal that is not waited for."""


class Interrupted(SignalCame):
    """A signal that waits for the step to be done, and not for what only tells of it."""


def name_of(error: KeyboardInterrupt) -> str:
    """The signal behind an exception; Python's own is that of Ctrl-C."""
    return error.signal_name if isinstance(error, SignalCame) else "SIGINT"


def look_for_signals() -> None:
    """Raises Interrupted: between two tokens of a sample, and two parts of a measurement."""
    if Interruption.current is not None and Interruption.current.signal_name:
        raise Interrupted(Interruption.current.signal_name)


@contextmanager
def terminating() -> Iterator[None]:
    """Have SIGTERM end the block by an exception, so that nothing half written is left behind."""

    def end(number: int, _frame) -> None:
        raise BrokenOff(signal.Signals(number).name)

    ends = numbers("SIGTERM", *OF_BATCH_SYSTEMS)
    before = {number: signal.signal(number, end) for number in ends}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)  # not after an error, which still has to be told


def numbers(*names: str) -> list[int]:
    """Of these signals, those that the system has."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


class Interruption:
    """Remembers a signal until the step is done: Ctrl-C, Ctrl-Break, SIGTERM, a closed terminal, a
    batch system's warning. A second one breaks off, unless it is a warning."""

    current: "Interruption | None" = None  # at which `look_for_signals` looks

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self.signal_name: str | None = None
        self.time = math.inf
        self._handlers: dict[int, Callable | int | None] = {}

    def __enter__(self) -> "Interruption":
        Interruption.current = self
        for number in numbers(*SIGNALS):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                self._handlers[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, _frame) -> None:
        again = time.monotonic() - self.time > 1  # or `timeout` or a terminal sent one signal twice
        if again and number not in numbers(*OF_BATCH_SYSTEMS):
            raise BrokenOff(signal.Signals(number).name)
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            self.time = time.monotonic()
            message = (
                b"\nFinishing this step, then saving. Ctrl-C once more breaks off without saving.\n"
            )
            with suppress(
                OSError, AttributeError
            ):  # the terminal may be gone, and `print` may not be entered twice
                os.write(sys.stderr.fileno(), b"" if self.silent else message)

    def __exit__(self, kind: type | None, *_exception) -> None:
        Interruption.current = None
        if kind is ConnectionError:
            return  # torchrun's SIGTERM comes next, and must not keep this process from saying what happened
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def exit_code(signal_name: str) -> int:
    """Of a run that a signal interrupted."""
    return 143 if signal_name in ("SIGTERM", "SIGHUP", *OF_BATCH_SYSTEMS) else 130
