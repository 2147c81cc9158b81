"""Ctrl-C and other signals: the step is finished, then saved; a second one quits at once."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

KEYS = ("SIGINT", "SIGBREAK")
WARNINGS = ("SIGUSR1", "SIGUSR2", "SIGXCPU")  # of a batch system, of a SIGKILL; may repeat
ENDS = ("SIGTERM", "SIGHUP", *WARNINGS)
SIGNALS = (*KEYS, *ENDS)


class SignalCame(KeyboardInterrupt):
    """A signal, by its name."""

    def __init__(self, signal_name: str):
        super().__init__(signal_name)
        self.signal_name = signal_name


class BrokenOff(SignalCame):
    """A signal that ends the program at once."""


class Interrupted(SignalCame):
    """A signal during a measurement or a sample: this is broken off, and the run is saved."""


def name_of(error: KeyboardInterrupt) -> str:
    """The signal behind an exception; Python's own is that of Ctrl-C."""
    return error.signal_name if isinstance(error, SignalCame) else "SIGINT"


def exit_code(signal_name: str) -> int:
    """The exit code of a run that a signal interrupted."""
    return 143 if signal_name in ENDS else 130


def numbers(names: tuple[str, ...]) -> list[int]:
    """The numbers of those of these signals that the system has."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def look_for_signals() -> None:
    """Raises Interrupted: between two tokens of a sample, and two parts of a measurement."""
    if Interruption.current is not None and Interruption.current.signal_name:
        raise Interrupted(Interruption.current.signal_name)


@contextmanager
def terminating() -> Iterator[None]:
    """Have SIGTERM end the block by an exception, so that nothing half written is left behind."""

    def end(number: int, _frame) -> None:
        raise BrokenOff(signal.Signals(number).name)

    before = {number: signal.signal(number, end) for number in numbers(("SIGTERM", *WARNINGS))}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)  # not after an error, which still has to be told


class Interruption:
    """Remembers the first signal until the step is done. A second one quits, but a batch system's
    warning does not."""

    current: "Interruption | None" = None  # at which `look_for_signals` looks

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self.signal_name: str | None = None
        self.time = math.inf
        self._handlers: dict[int, Callable | int | None] = {}

    def __enter__(self) -> "Interruption":
        Interruption.current = self
        for number in numbers(SIGNALS):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                self._handlers[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, _frame) -> None:
        name = signal.Signals(number).name
        again = time.monotonic() - self.time > 1  # or `timeout` or a terminal sent one signal twice
        if again and name not in WARNINGS:
            raise BrokenOff(name)
        if self.signal_name is not None:
            return
        self.signal_name = name
        self.time = time.monotonic()
        message = f"\n{name}: finishing this step, then saving.\n"
        if name in KEYS:
            message = "\nFinishing this step, then saving. Ctrl-C again quits without saving.\n"
        # The terminal may be gone, and `print` may not be entered twice.
        with suppress(OSError, AttributeError):
            os.write(sys.stderr.fileno(), b"" if self.silent else message.encode())

    def __exit__(self, kind: type | None, *_exception) -> None:
        Interruption.current = None
        if kind is ConnectionError:  # torchrun's SIGTERM comes next; first say what happened
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
