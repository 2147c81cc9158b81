"""What is told of the steps of a run: a bar, lines of the log, rows of the CSV, the ETA."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from parts.flags import Config
from parts.progress import Progress
from parts.report import words
from parts.run.directory import RunDir
from parts.run.layout import step_line
from parts.run.screen import ticking
from parts.text.corpus import Corpus

log = logging.getLogger("train")
# Without tqdm's own estimate, which counts the first step and the pauses before this start.
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]"


class StepLog:
    """Tells of one start of a run, and knows how long the run has taken."""

    def __init__(self, config: Config, progress: Progress, corpus: Corpus, run: RunDir, bar: tqdm):
        self.config, self.progress, self.corpus = config, progress, corpus
        self.run, self.bar = run, bar
        # An untold step was made by the start before: this one only tells of it.
        self.first_step = progress.step + 1 - progress.untold
        self.line_tokens = progress.tokens
        self.elapsed_before = progress.elapsed_sec
        self.started = self.line_time = self.first_done = time.perf_counter()
        self.hinted = False
        self.eta_step = 0  # of the latest ETA

    def elapsed_sec(self) -> float:
        """Seconds that the run has taken, all its starts together."""
        return self.elapsed_before + time.perf_counter() - self.started

    def step(self, val_loss: float | None) -> None:
        """Tell of the step just done, with its validation loss if measured. Raises OSError."""
        config, p, now = self.config, self.progress, time.perf_counter()
        tokens, seconds = p.tokens - self.line_tokens, now - self.line_time
        if tokens == 0:  # a step of the start before, whose time is not known: the whole run's rate
            tokens, seconds = p.tokens, p.elapsed_sec
        tokens_per_sec = tokens / seconds
        if p.step == self.first_step:
            self.first_done = now
        text = words.bar_text(p.loss, tokens_per_sec, self.seconds_left())
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if p.skipped_in_a_row:
            so_far = f"{p.skipped_steps} so far"
            log.warning(f"step {p.step} skipped: its loss or gradient is not finite ({so_far})")
        is_regular = p.step == 1 or p.step % config.log_every == 0
        if is_regular or p.stop_reason(config) or val_loss is not None:
            self.line_time, self.line_tokens = now, p.tokens
            row = words.step_row(config, p, self.corpus, tokens_per_sec, val_loss)
            self.run.append_metrics(row)
            log.info(step_line(row, config.steps))
            hint = None if self.hinted else words.stuck_hint(p, config)
            if hint:
                log.warning(hint)
                self.hinted = True
        if p.step in (self.first_step + 1, self.first_step + 9):
            self.eta()

    def seconds_left(self) -> float | None:
        """How long the run still takes at most; None before the second step of this start.

        The first step does not count: in it a GPU gets ready.
        """
        steps = self.progress.step - self.first_step
        if steps < 1:
            return None
        sec_per_step = (time.perf_counter() - self.first_done) / steps
        return (self.config.steps - self.progress.step) * sec_per_step

    def eta(self) -> None:
        """Log how long the run still takes at most, once for each step."""
        seconds, step = self.seconds_left(), self.progress.step
        if seconds is None or step == self.eta_step or self.progress.stop_reason(self.config):
            return
        log.info(words.eta_line(self.config, seconds))
        self.eta_step = step


@contextmanager
def step_log(config: Config, progress: Progress, corpus: Corpus, run: RunDir) -> Iterator[StepLog]:
    """A StepLog whose bar lasts as long as the block; lines of the log stand above the bar."""
    done = progress.step - progress.untold
    look = dict(bar_format=BAR, dynamic_ncols=True, leave=False)
    bar = tqdm(total=config.steps, initial=done, disable=None, **look)  # None: at terminals only
    with ticking(bar):
        yield StepLog(config, progress, corpus, run, bar)
