"""A run has reached its target when the loss on random slices says so, drawn for this alone."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_run, log_text, rows

import train
from parts.compute.signals import look_for_signals
from parts.progress import Progress
from parts.run.checkpoint import load_checkpoint
from parts.text.corpus import Corpus

AIM = ["--target_loss=99", "--lr=0.01", "--steps=12", "--log_every=1"]  # each window is below it


@pytest.fixture
def corpus() -> Corpus:
    tokens = np.random.default_rng(0).integers(0, 500, 300).astype(np.uint16)
    return Corpus(tokens, "made up", len(tokens))


@pytest.fixture
def random_slices(monkeypatch):
    """Give random slices these losses, by the step, and tell which were asked for."""
    asked = []

    def measured(losses: dict[int, float], otherwise: float = 150.0, spread: float = 0.01) -> list:
        def losses_of(_model, _tokens, _config, step: int, first: int, end: int) -> torch.Tensor:
            look_for_signals()  # as the measurement does
            asked.append((step, end - first))
            sides = torch.tensor([-spread, spread], dtype=torch.float64).repeat(end)[first:end]
            return losses.get(step, otherwise) + sides

        monkeypatch.setattr(train, "corpus_losses", losses_of)
        return asked

    return measured


def results(run: str) -> dict:
    return json.loads(Path(run, "results.json").read_text(encoding="utf-8"))


def test_a_low_window_alone_goes_on_and_says_so_and_a_later_one_stops(launch, random_slices):
    asked = random_slices({6: 50.0})
    assert launch("run", *AIM) == 0
    assert list(dict.fromkeys(step for step, _ in asked)) == [3, 6], (
        "once a window, and the last not again at the end"
    )
    found, text = results("run"), log_text(Path("run"))
    assert (found["stop_reason"], found["final_step"]) == ("target", 6)
    assert found["corpus_loss"] == pytest.approx(50) and found["window_loss"] < 10
    assert found["corpus_loss_slices"] == 64 and found["corpus_loss_standard_error"] > 0
    assert text.count("Going on.") == 1 and "INFO | Step 3: window_loss " in text
    measured = "16 random slices is 150.000000 (standard error 0.002582)"
    assert f" is at or below the target 99.0, but the loss on {measured}. Going on.\n" in text
    assert "Target reached: loss 50.000000 <= 99.0. Stopping." in text
    error = f"{found['corpus_loss_standard_error']:.6f}"
    assert f"Corpus loss 50.000000 +- {error} (mean and standard error of 64 random" in text


@pytest.mark.parametrize(
    ("step", "window", "checked", "due"),
    [
        (5, 0.25, {}, True),
        (5, 0.26, {}, False),
        (7, 0.20, dict(checked_step=5, checked_window=0.25), False),
        (8, 0.20, dict(checked_step=5, checked_window=0.25), True),
        (8, 0.25, dict(checked_step=5, checked_window=0.25), False),
        (9, 0.20, dict(checked_step=5, checked_window=0.25), False),
    ],
)
def test_when_a_check_is_due(config, step, window, checked, due):
    """After one that failed only with a full new window, and a lower one. At the last step it is
    measured anyway."""
    config = replace(config, target_loss=0.25, steps=9)
    progress = Progress(step=step, recent_losses=[window] * 3, **checked)
    assert progress.check_is_due(config) is due
    assert not progress.check_is_due(replace(config, target_loss=0.0))
    assert not progress.check_is_due(replace(config, target_window=1))


@pytest.mark.parametrize(("loss", "reason"), [(4.0, "target"), (4.5, "steps")])
def test_the_last_step_decides_whatever_the_window(launch, random_slices, loss, reason, capsys):
    asked = random_slices({8: loss})
    assert launch("run", "--target_loss=4.2") == 0
    assert {step for step, _ in asked} == {8}
    found = results("run")
    assert found["stop_reason"] == reason and found["window_loss"] > 5 and found["final_step"] == 8
    missed = "All 8 steps done."
    reached = "Target reached: loss 4.000000 <= 4.2. Stopping."
    text = log_text(Path("run"))
    assert (reached in text, missed in text) == (reason == "target", reason == "steps")
    capsys.readouterr()
    assert launch("run", "--target_loss=4.2") == 0
    answers = {
        "target": "the target was reached at step 8. Lower --target_loss",
        "steps": "all steps up to 8 are done",
    }
    assert f"Already finished: {answers[reason]}" in capsys.readouterr().out
    assert launch("run", "--target_loss=3", "--steps=10") == 0
    assert results("run")["final_step"] == 10, "a lower target goes on"


def test_a_window_that_is_never_full_can_reach_the_target_at_the_last_step(launch, random_slices):
    random_slices({2: 4.0})
    assert launch("run", "--target_loss=4.2", "--steps=2") == 0
    assert results("run")["stop_reason"] == "target"
    assert results("run")["window_loss"] is None


@pytest.mark.parametrize("killed_at", [[4], [5, 7], [6, 8]])
def test_resumed_after_a_failed_check_it_is_the_same_run(
    launch,
    prompt_disk,
    random_slices,
    before_step,
    killed_at,
):
    asked = random_slices({12: 50.0})
    flags = [*AIM, "--save_every=2", "--target_window=4"]
    assert launch("whole", *flags) == 0
    steps = [step for step, _ in asked]
    assert steps == [4, 8, 12] and results("whole")["stop_reason"] == "target"

    def killed() -> None:
        raise KeyboardInterrupt

    before_step(dict.fromkeys(killed_at, killed))
    codes = [launch("parts", *flags) for _ in range(len(killed_at) + 1)]
    assert codes == [130] * len(killed_at) + [0]
    assert_same_run(Path("whole"), Path("parts"))
    progress = load_checkpoint(Path("parts/checkpoints/last.pt"))["progress"]
    assert (progress["checked_step"], progress["corpus_step"]) == (8, 12)
    windows = dict(rows(Path("whole"), "step", "window_loss"))
    assert progress["checked_window"] == pytest.approx(float(windows["8"]))


def test_another_target_forgets_the_checks_of_the_one_before(launch, random_slices):
    asked = random_slices({})
    assert launch("run", *AIM, "--steps=4", "--decay_steps=12") == 0
    del asked[:]
    assert launch("run", *AIM, "--target_loss=98", "--steps=6", "--decay_steps=12") == 0
    assert [step for step, _ in asked] == [5, 6]


def test_a_checkpoint_of_before_the_checks_goes_on(launch, random_slices):
    random_slices({7: 50.0})
    flags = [*AIM, "--decay_steps=12"]
    assert launch("run", *flags, "--target_loss=0", "--steps=6") == 0
    last = Path("run/checkpoints/last.pt")
    checkpoint = torch.load(last, weights_only=True)
    progress = checkpoint["progress"]
    younger = [name for name in progress if name.startswith(("corpus_", "checked_"))]
    assert len(younger) == 6
    for name in younger:
        del progress[name]
    torch.save(checkpoint, last)
    assert launch("run", *flags) == 0
    assert (results("run")["stop_reason"], results("run")["final_step"]) == ("target", 7)


def test_the_slices_are_new_ones_each_time_and_the_same_for_a_step(config, corpus, monkeypatch):
    trainer, seen = train.Trainer(replace(config, target_loss=0.1), corpus, None), []

    def losses_of(_model, slices, _config) -> torch.Tensor:
        seen.append(slices)
        return torch.linspace(0.0, 0.2, len(slices), dtype=torch.float64)

    monkeypatch.setattr(train, "slice_losses", losses_of)
    trainer.progress.tokens = 10 * 600 * config.seq_len
    drawn = []
    for step in (3, 6, 6):
        seen.clear()
        trainer.progress.step = step
        trainer.measure_corpus_loss()
        drawn.append(torch.cat(seen))
        assert trainer.progress.corpus_step == step
    assert len(drawn[0]) == 600, "each look goes on where the one before ended"
    n_starts = len(corpus.tokens) - config.seq_len
    starts = train.slice_starts(config.seed, train.EVALUATION_STREAM + 3, 600, n_starts)
    assert torch.equal(drawn[0], train.take_slices(corpus.tokens, starts, config.seq_len))
    assert not torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2])


@pytest.mark.parametrize(
    ("loss", "spread", "trained", "at_end", "target", "slices"),
    [
        (0.15, 0.04, 10**6, False, 0.1, 16),  # clearly above: the least
        (0.126, 0.04, 900, False, 0.1, 32),  # at 16 by 2.5 standard errors only
        (0.106, 0.04, 10**6, False, 0.1, 256),  # a little above: 0.04 / 16 is the error
        (0.09, 0.001, 10**6, False, 0.1, 128),  # exact at once
        (0.1, 0.04, 10**6, False, 0.1, 1024),  # 0.04 / 32 < 0.0015
        (0.09, 0.2, 10**6, False, 0.1, 4096),  # never exact
        (0.09, 0.2, 20_000, False, 0.1, 2000),  # a tenth of those trained
        (0.09, 0.2, 900, False, 0.1, 90),
        (0.15, 0.2, 0, False, 0.1, 64),
        (0.15, 0.04, 10**6, True, 0.1, 1024),  # what is published is as exact as without a target
        (0.09, 0.2, 10**6, True, 0.1, 4096),
        (0.09, 0.2, 10**6, True, 0.0, 1024),
        (0.09, 0.2, 900, True, 0.0, 90),
    ],
)
def test_how_many_slices_it_takes(
    config,
    corpus,
    random_slices,
    loss,
    spread,
    trained,
    at_end,
    target,
    slices,
):
    asked = random_slices({5: loss}, spread=spread)
    trainer = train.Trainer(replace(config, target_loss=target), corpus, None)
    trainer.progress.step, trainer.progress.tokens = 5, trained * config.seq_len
    trainer.measure_corpus_loss(at_end)
    p = trainer.progress
    assert sum(count for _, count in asked) == p.corpus_loss_slices == slices
    assert p.corpus_loss == pytest.approx(loss)
    assert p.corpus_loss_error == pytest.approx(spread / (slices - 1) ** 0.5, rel=0.02)


def test_an_early_end_has_the_verdict_of_all_slices(config, corpus, monkeypatch):
    """With a real model, whose loss is ln V: far above the target, and below it."""
    found = {}
    for target, first_look in [(3.0, 16), (3.0, 4096), (11.0, 16), (11.0, 128)]:
        monkeypatch.setattr(train, "FIRST_LOOK", first_look)
        trainer = train.Trainer(replace(config, target_loss=target), corpus, None)
        trainer.progress.step, trainer.progress.tokens = 5, 5000 * config.seq_len
        trainer.progress.recent_losses = [target] * config.target_window
        trainer.check_target()
        p = trainer.progress
        found[target, first_look] = p.corpus_reached(trainer.config), p.corpus_loss_slices
    assert found[3.0, 4096] == (False, 500) and found[3.0, 16] == (False, 16)
    assert found[11.0, 16] == found[11.0, 128] == (True, 128)


def test_a_window_of_one_step_is_the_classic_rule_and_is_called_so(launch, random_slices):
    asked = random_slices({})
    assert launch("run", *AIM, "--target_window=1") == 0
    assert asked == [(1, 64)], "afterwards, and never before"
    found, text = results("run"), log_text(Path("run"))
    assert (found["stop_reason"], found["final_step"]) == ("target", 1)
    assert found["corpus_loss"] == pytest.approx(150)
    assert "target 99, by the classic rule: the first step at or below it, one alone" in text
    loss = found["window_loss"]
    assert f"Target reached: loss {loss:.6f} <= 99.0. Stopping. (the classic rule" in text
    assert "Corpus loss 150.000000 " in text


def test_a_signal_breaks_off_the_last_measurement_and_saves(
    launch,
    prompt_disk,
    random_slices,
    before_step,
):
    asked = random_slices({})
    assert launch("whole", "--sample_every=100", "--num_prompts=0") == 0
    del asked[:]
    before_step({8: lambda: signal.raise_signal(signal.SIGINT)})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert launch("parts", "--sample_every=100", "--num_prompts=0") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert asked == [] and results("parts")["stop_reason"] == "interrupted"
    assert load_checkpoint(Path("parts/checkpoints/last.pt"))["step"] == 8
    assert launch("parts", "--sample_every=100", "--num_prompts=0") == 0
    assert_same_run(Path("whole"), Path("parts"))
