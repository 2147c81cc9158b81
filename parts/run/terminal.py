"""Signs of life at a terminal: what takes long ticks there once a second, and only there."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger("train")
TICK_SEC = 1.0  # also what something takes before its line appears


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
    """A line at a terminal: what is waited for, and how long so far; the log stands above it.

    With a total, the bar's `update` counts up to it. Of several processes the first has it `shown`.
    """
    form = "{desc} ... {elapsed}"
    if total is not None:
        form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}]"
    look = dict(bar_format=form, delay=TICK_SEC, leave=False, dynamic_ncols=True)
    disable = None if shown else True  # None: only where stderr is no terminal
    bar = tqdm(desc=what, total=total, unit=unit, disable=disable, **look)
    with ticking(bar):
        yield bar
