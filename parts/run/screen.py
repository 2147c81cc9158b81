"""What is seen while a script runs: its log lines, and at a terminal what is waited for."""

import errno
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger("train")
TICK_SEC = 1.0  # between two redraws, and before a line appears at all
COUNTING = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}]"


class Form(logging.Formatter):
    """How a line looks: `03:38:36 | step 1250/...` for train.py, with the level if it is a warning
    or an error; `SCRIPT: warning: ...` for the others, before each line of a message."""

    def __init__(self, script: str):
        super().__init__()
        self.script = script

    def format(self, record: logging.LogRecord) -> str:
        """The text to print."""
        text = record.getMessage()
        if self.script != "train.py":
            start = f"{self.script}: {record.levelname.lower()}: "
            return "\n".join(start + line for line in text.splitlines())
        level = "" if record.levelno == logging.INFO else f"{record.levelname} | "
        return f"{self.formatTime(record, '%H:%M:%S')} | {level}{text}"


@contextmanager
def logging_to(handler: logging.Handler) -> Iterator[None]:
    """Send log lines to this handler as well."""
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


@contextmanager
def speaking(script: str, silent: bool = False, encoding: str | None = None) -> Iterator[None]:
    """Show log lines in the block: on stdout for train.py, on stderr for the other scripts. A
    `silent` process shows none. What a console cannot show is replaced."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows code page lacks most of Unicode
            stream.reconfigure(encoding=encoding, errors="replace")
    shown = logging.StreamHandler(sys.stdout if script == "train.py" else sys.stderr)
    handler = logging.NullHandler() if silent else shown
    handler.setFormatter(Form(script))
    with logging_to(handler):
        yield


def say(text: str, end: str = "\n") -> bool:
    """Write to stdout at once. Returns whether anybody reads it. Raises OSError."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would fail once more at its end
        if isinstance(error, BrokenPipeError) or error.errno == errno.EINVAL:  # Windows' word
            return False
        raise OSError(f"stdout cannot be written: {error.strerror}") from error
    return True


@contextmanager
def ticking(bar: tqdm) -> Iterator[None]:
    """Draw the bar anew every second until the block ends, and then remove it."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(TICK_SEC):
            bar.delay = 0  # from now on it can be seen, and `close` has to remove it
            bar.refresh()

    if bar.disable:
        yield
        return
    thread = threading.Thread(target=tick, name="ticking", daemon=True)
    with logging_redirect_tqdm([log]), bar:
        with suppress(RuntimeError):  # no memory for a thread: nothing ticks
            thread.start()
        try:
            yield
        finally:
            done.set()
            if thread.is_alive():
                thread.join()


@contextmanager
def waiting(
    what: str, total: int | None = None, unit: str = "", shown: bool = True
) -> Iterator[tqdm]:
    """A line at a terminal: what is waited for, and how long so far; the log stands above it. With
    a total, the bar's `update` counts up to it. Of several processes the first has it `shown`."""
    form = "{desc} ... {elapsed}" if total is None else COUNTING
    look = dict(bar_format=form, delay=TICK_SEC, leave=False, dynamic_ncols=True)
    disable = None if shown else True  # None: only where stderr is no terminal
    bar = tqdm(desc=what, total=total, unit=unit, unit_scale=unit == "B", disable=disable, **look)
    with ticking(bar):
        yield bar
