"""How far a run is, what is best, and when it stops."""

import math
import statistics
from dataclasses import dataclass, field
from enum import StrEnum

from parts.flags import Config


class StopReason(StrEnum):
    """Why a run stopped, or that it has not: `stop_reason` in results.json."""

    TARGET = "target"
    PATIENCE = "patience"
    STEPS = "steps"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    RUNNING = "running"


COMPLETE = (StopReason.TARGET, StopReason.PATIENCE, StopReason.STEPS)  # these end a run


def overfits(latest: float, lowest: float, training: float) -> bool:
    """Whether the validation loss rose since its lowest by more than a hundredth, while the
    training loss went on falling."""
    return latest > 1.01 * lowest and training < lowest


@dataclass
class Progress:
    """How far a run has come: all of its state beside weights, optimizer and gradient scale.

    Each method that changes it says what happened; the trainer calls them, and nothing else does.
    """

    step: int = 0
    tokens: int = 0
    elapsed_sec: float = 0.0
    loss: float = math.nan  # of the latest step's whole slices
    grad_norm: float = math.nan  # of the latest step, before clipping
    lr: float = math.nan  # learning rate of the latest step
    untold: bool = False  # whether the latest step still has to be measured and logged
    recent_losses: list[float] = field(default_factory=list)  # at most target_window, oldest first
    best_loss: float = math.inf
    best_step: int = 0
    best_error: float = 0.0  # standard error of best_loss, if a validation loss; 0: not measured
    skipped_steps: int = 0  # because of a non-finite loss or gradient
    skipped_in_a_row: int = 0
    trained_context: int = 0  # the longest slices trained
    sampled_step: int = 0  # at which text was last sampled
    val_loss: float = math.inf  # of the latest measurement
    val_step: int = 0  # of the latest measurement; 0: none yet
    val_error: float = 0.0  # its standard error over the slices
    validations_since_best: int = 0
    corpus_loss: float = math.inf  # on random slices, of the latest measurement
    corpus_loss_error: float = 0.0  # its standard error
    corpus_loss_slices: int = 0
    corpus_step: int = 0  # of the latest measurement; 0: none yet
    checked_window: float = math.inf  # window_loss at the latest check of the target that failed
    checked_step: int = 0  # of that check; 0: none yet

    # What is asked

    def window_loss(self, config: Config) -> float | None:
        """Mean of the last target_window step losses, None before there are so many."""
        if len(self.recent_losses) < config.target_window:
            return None
        return statistics.fmean(self.recent_losses[-config.target_window :])

    def stop_reason(self, config: Config) -> StopReason | None:
        """One of `COMPLETE` when the run is over, else None."""
        if self.corpus_reached(config) or self.step_reached(config):
            return StopReason.TARGET
        if 0 < config.patience <= self.validations_since_best:
            return StopReason.PATIENCE
        return StopReason.STEPS if self.step >= config.steps else None

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
        window_loss = self.window_loss(config)
        if window_loss is None or not self.window_reached(config):
            return False
        if config.one_low_step_is_enough or self.step >= config.steps:  # then it is measured anyway
            return False
        in_full = self.step >= self.checked_step + config.target_window
        return in_full and window_loss < self.checked_window

    def possible_best(self, config: Config, at_end: bool) -> float | None:
        """The window_loss if it is the lowest so far, else None.

        A run that ends before its first window is full has the mean of what there is; a full
        window does not compare with that, and replaces it.
        """
        window_loss = self.window_loss(config)
        if window_loss is None and at_end and self.recent_losses:
            window_loss = statistics.fmean(self.recent_losses)
        if window_loss is None:
            return None
        is_first = self.best_step < config.target_window
        return window_loss if is_first or window_loss < self.best_loss else None

    # What happened

    def made_step(
        self, config: Config, loss: float, grad_norm: float, lr: float, finite: bool
    ) -> None:
        """Count a step, whose update was left out if its loss or gradient was not finite."""
        self.step += 1
        self.tokens += config.tokens_per_step
        self.loss = loss
        self.grad_norm = grad_norm
        self.lr = lr
        self.untold = True
        self.trained_context = max(self.trained_context, config.seq_len)
        if finite:
            self.skipped_in_a_row = 0
            self.recent_losses = [*self.recent_losses, loss][-config.target_window :]
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1

    def told(self, elapsed_sec: float) -> None:
        """Note that this step is measured, and the seconds of all starts together."""
        self.untold = False
        self.elapsed_sec = elapsed_sec

    def sampled(self) -> None:
        """Note that text was sampled at this step."""
        self.sampled_step = self.step

    def validated(self, loss: float, error: float) -> None:
        """Note the validation loss of this step, and its standard error."""
        self.val_step = self.step
        self.val_loss = loss
        self.val_error = error
        self.validations_since_best += 1

    def measured_corpus(self, loss: float, error: float, n_slices: int) -> None:
        """Note the loss on random slices at this step, and its standard error."""
        self.corpus_step = self.step
        self.corpus_loss = loss
        self.corpus_loss_error = error
        self.corpus_loss_slices = n_slices

    def failed_check(self, config: Config) -> None:
        """Note that window_loss was at the target, and the loss on random slices was not."""
        window_loss = self.window_loss(config)
        assert window_loss is not None, "without it there is no check"
        self.checked_step = self.step
        self.checked_window = window_loss

    def found_best(self, loss: float) -> None:
        """Note that the weights of this step are the best so far, and are kept."""
        self.best_step = self.step
        self.best_loss = loss
        self.best_error = self.val_error if self.val_step == self.step else 0.0
        self.validations_since_best = 0

    def forget_best(self) -> None:
        """Note that what the best was does not compare with what comes."""
        self.best_step = 0
        self.best_loss = math.inf
        self.best_error = 0.0
        self.validations_since_best = 0

    def resumed(self, before: Config, config: Config) -> None:
        """Note a start from a checkpoint: losses of slices of another length do not compare, nor
        checks of another target."""
        self.skipped_in_a_row = 0
        if before.seq_len != config.seq_len:
            self.recent_losses = []
            self.corpus_step = 0
        target = ("seq_len", "target_loss", "target_window")
        if any(getattr(before, name) != getattr(config, name) for name in target):
            self.checked_step = 0
            self.checked_window = math.inf

    def began_from(self, trained_context: int) -> None:
        """Note a start from weights that know so many positions."""
        self.trained_context = max(self.trained_context, trained_context)
