"""How far a run is, what is best, and when it stops."""

import math
import statistics
from dataclasses import dataclass, field

from parts.flags import Config

COMPLETE = (
    "target",
    "patience",
    "steps",
)  # reasons to stop that end a run; signals only interrupt it


@dataclass
class Progress:
    """How far a run has come: all of its state beside weights, optimizer and gradient scale."""

    step: int = 0
    tokens: int = 0
    elapsed_sec: float = 0.0
    loss: float = math.nan  # of the latest step's whole slices
    grad_norm: float = math.nan  # of the latest step, before clipping
    untold: bool = False  # whether the latest step still has to be measured and logged
    recent_losses: list[float] = field(default_factory=list)  # at most target_window, oldest first
    best_loss: float = math.inf
    best_step: int = 0
    best_error: float = (
        0.0  # standard error of best_loss, where that is a validation loss; 0: not measured
    )
    skipped_steps: int = 0  # because of a non-finite loss or gradient
    skipped_in_a_row: int = 0
    trained_context: int = 0  # the longest slices trained
    sampled_step: int = 0  # at which text was last sampled
    val_loss: float = math.inf  # of the latest measurement
    val_step: int = 0  # of the latest measurement; 0: none yet
    val_error: float = 0.0  # its standard error over the slices
    measured_in_vain: int = 0  # in a row, without a new lowest
    corpus_loss: float = math.inf  # on random slices, of the latest measurement
    corpus_loss_error: float = 0.0  # its standard error
    corpus_loss_slices: int = 0
    corpus_step: int = 0  # of the latest measurement; 0: none yet
    checked_window: float = math.inf  # window_loss at the latest check of the target that failed
    checked_step: int = 0  # of that check; 0: none yet

    def window_loss(self, config: Config) -> float | None:
        """Mean of the last target_window step losses, None before there are so many."""
        if len(self.recent_losses) < config.target_window:
            return None
        return statistics.fmean(self.recent_losses[-config.target_window :])

    def stop_reason(self, config: Config) -> str | None:
        """One of `COMPLETE` when the run is over, else None."""
        if self.corpus_reached(config) or self.step_reached(config):
            return "target"
        if 0 < config.patience <= self.measured_in_vain:
            return "patience"
        return "steps" if self.step >= config.steps else None

    def window_reached(self, config: Config) -> bool:
        """Whether window_loss is at or below the target."""
        window_loss = self.window_loss(config)
        return window_loss is not None and window_loss <= config.target_loss > 0

    def step_reached(self, config: Config) -> bool:
        """Whether the latest step is at or below the target, where no more is asked for."""
        return config.one_low_step_is_enough and self.window_reached(config)

    @property
    def corpus_measured(self) -> bool:
        """Whether the loss on random slices was measured at this step."""
        return 0 < self.corpus_step == self.step

    def corpus_reached(self, config: Config) -> bool:
        """Whether the loss on random slices, measured at this step, is at or below the target."""
        return self.corpus_measured and self.corpus_loss <= config.target_loss > 0

    def check_is_due(self, config: Config) -> bool:
        """Whether to measure now if the target is reached: window_loss says so, and after a check
        that failed there is a full new window, with a lower loss."""
        if config.one_low_step_is_enough or not self.window_reached(config):
            return False
        if self.step >= config.steps:  # it is measured anyway
            return False
        window_loss = self.window_loss(config)
        assert window_loss is not None, "it is at the target"
        in_full = self.step >= self.checked_step + config.target_window
        return in_full and window_loss < self.checked_window

    def note_failed_check(self, config: Config) -> None:
        """Remember where window_loss was at the target, and the loss on random slices was not."""
        window_loss = self.window_loss(config)
        assert window_loss is not None, "without it there is no check"
        self.checked_window, self.checked_step = window_loss, self.step

    def forget_incomparable(self, before: Config, config: Config) -> None:
        """Losses of slices of another length do not compare, nor checks of another target."""
        if before.seq_len != config.seq_len:
            self.recent_losses, self.corpus_step = [], 0
        target = ("seq_len", "target_loss", "target_window")
        if any(getattr(before, name) != getattr(config, name) for name in target):
            self.checked_window, self.checked_step = math.inf, 0

    def forget_best(self) -> None:
        """What the best was does not compare with what comes."""
        self.best_loss, self.best_step, self.best_error, self.measured_in_vain = math.inf, 0, 0.0, 0
