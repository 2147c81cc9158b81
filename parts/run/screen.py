"""Every word to the user goes through here, from a script's first line on."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("train")


class Form(logging.Formatter):
    """How a line looks on the screen.

    `03:38:36 | step 1250/...` for train.py, which runs for hours, with the level if it is a warning
    or an error; `SCRIPT: warning: ...` for the others, at the start of each line of a message.
    """

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
    """Show log lines in the block: on stdout for train.py, on stderr for the other scripts.

    A `silent` process shows none. What a console cannot show is replaced.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows code page lacks most of Unicode
            stream.reconfigure(encoding=encoding, errors="replace")
    shown = logging.StreamHandler(sys.stdout if script == "train.py" else sys.stderr)
    handler = logging.NullHandler() if silent else shown
    handler.setFormatter(Form(script))
    with logging_to(handler):
        yield
