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
    """Draw the bar anew every second as long as the block lasts, whatever the block does; then remove it."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(TICK_SEC):
            bar.delay = 0  # from now on it can be seen, and `close` has to remove it
            bar.refresh()

    thread = threading.Thread(target=tick, name="ticking", daemon=True)
    if bar.disable:
        yield
        return
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
    """A line at a terminal that says what is waited for, and for how long so far.

    With a total, what is done counts up to it by the bar's `update`. Lines of the log stand above.
    Of several processes only the first has it `shown`.
    """
    form = "{desc} ... {elapsed}"
    if total is not None:
        form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}]"
    bar = tqdm(
        desc=what,
        total=total,
        unit=unit,
        bar_format=form,
        delay=TICK_SEC,
        leave=False,
        dynamic_ncols=True,
        disable=None if shown else True,  # None: where stderr is no terminal
    )
    with ticking(bar):
        yield bar
