"""Ctrl-C and its kin: the step is finished, then saved; a second one breaks off."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class BrokenOff(KeyboardInterrupt):
    """A signal that is not waited for; named in its argument."""


class Interrupted(KeyboardInterrupt):
    """A signal came that waits for the step to be done, and not for what only tells of it; named in its argument."""


def look_for_signals() -> None:
    """Raises Interrupted: between two tokens of a sample, and two parts of a measurement."""
    if Interruption.current is not None and Interruption.current.signal:
        raise Interrupted(signal.Signals(Interruption.current.signal).name)


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


OF_BATCH_SYSTEMS = ("SIGUSR1", "SIGUSR2", "SIGXCPU")  # warnings, perhaps repeated, of a SIGKILL


def numbers(*names: str) -> list[int]:
    """Of these signals, those that the system has."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


class Interruption:
    """Remembers a signal until the step is done: Ctrl-C, Ctrl-Break, SIGTERM, a closed terminal, a
    batch system's warning. A second one breaks off, unless it is a warning."""

    current: "Interruption | None" = None  # at which `look_for_signals` looks

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self.signal = 0
        self.time = math.inf
        self._handlers: dict[int, Callable | int | None] = {}

    def __enter__(self) -> "Interruption":
        Interruption.current = self
        for number in numbers("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP", *OF_BATCH_SYSTEMS):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                self._handlers[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, _frame) -> None:
        again = time.monotonic() - self.time > 1  # or `timeout` or a terminal sent one signal twice
        if again and number not in numbers(*OF_BATCH_SYSTEMS):
            raise BrokenOff(signal.Signals(number).name)
        if self.signal == 0:
            self.signal, self.time = number, time.monotonic()
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
