"""A number that is not finite never reaches a weight; a run that cannot learn says so."""

import copy
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import log_text, rows, unequal

import train
from parts.text.corpus import Corpus


@pytest.fixture
def corpus() -> Corpus:
    tokens = np.random.default_rng(0).integers(0, 500, 300).astype(np.uint16)
    return Corpus(tokens, "made up", len(tokens))


def states(trainer: train.Trainer) -> dict:
    """Of every optimizer, copied."""
    return copy.deepcopy(
        {name: one.state_dict()["state"] for name, one in trainer.optimizers.items()}
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("amp", "value"), [("off", math.nan), ("bf16", math.inf), ("fp16", math.inf)]
)
@pytest.mark.parametrize(
    "name", ["wte.weight", "h.1.mlp.c_fc.weight", "h.0.ln_1.bias", "ln_f.weight"]
)
def test_one_bad_gradient_in_one_group_stops_the_update_of_all(
    config, corpus, optimizer, amp, name, value
):
    """Of matrices, embeddings, biases or LayerNorms: a step is skipped for all of them or for
    none."""
    trainer = train.Trainer(replace(config, amp=amp, lr=1e-2, optimizer=optimizer), corpus, None)
    trainer.update()
    parameter = trainer.model.get_parameter(name)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    moments = states(trainer)
    hook = parameter.register_hook(lambda grad: torch.full_like(grad, value))
    _, grad_norm, _ = trainer.update()
    hook.remove()
    assert not math.isfinite(grad_norm)
    assert (trainer.progress.step, trainer.progress.skipped_steps, trainer.progress.tokens) == (
        2,
        1,
        64,
    )
    assert all(torch.equal(found, before[key]) for key, found in trainer.model.state_dict().items())
    assert unequal(moments, states(trainer)) == []
    trainer.update()
    assert trainer.progress.skipped_in_a_row == 0
    assert not torch.equal(parameter, before[name]), "and the next step is one again"


@pytest.mark.slow
def test_a_skipped_step_still_counts(launch, monkeypatch):
    """Step, data and rate move on as in a run without the skip; its row has no number that is not
    one."""
    flags = ["--log_every=1", "--amp=off"]
    assert launch("whole", *flags) == 0
    add_gradients = train.Trainer.add_gradients
    monkeypatch.setattr(
        train.Trainer,
        "add_gradients",
        lambda trainer, step, *args: add_gradients(trainer, step, *args) / (step != 3),
    )
    assert launch("run", *flags) == 0
    assert [row[0] for row in rows(Path("run"), "step")] == [str(step) for step in range(1, 9)]
    assert rows(Path("run"), "lr", "tokens") == rows(Path("whole"), "lr", "tokens")
    assert rows(Path("run"), "loss")[:2] == rows(Path("whole"), "loss")[:2]
    assert "WARNING | step 3 skipped: its loss or gradient is not finite (1 so far)" in log_text(
        Path("run")
    )
    assert json.loads(Path("run/results.json").read_text(encoding="utf-8"))["skipped_steps"] == 1


def test_a_run_that_diverges_exits_1_and_leaves_no_bad_checkpoint(launch, prompt_disk, monkeypatch):
    monkeypatch.setattr(train, "MAX_SKIPPED_IN_A_ROW", 3)
    forward = train.GPT.forward
    calls = []

    def diverging(self, tokens, targets=None):
        calls.append(1)
        return forward(self, tokens, targets) * (float("inf") if len(calls) > 4 else 1.0)

    monkeypatch.setattr(train.GPT, "forward", diverging)
    assert launch("run", "--save_every=2") == 1
    log = log_text(Path("run")).replace("\\", "/")
    assert "step 5 skipped" in log
    assert re.search(
        r"ERROR \| Training failed: loss or gradient was not finite in 3 steps in a row, the "
        r"last being step 7: go on "
        r"with a lower --lr, .*; the last good checkpoint, of step 4, is in run/checkpoints",
        log,
    )
    assert torch.load("run/checkpoints/last.pt", weights_only=True)["step"] == 4, (
        "none from inside the bad streak"
    )
    assert (
        json.loads(Path("run/results.json").read_text(encoding="utf-8"))["stop_reason"] == "failed"
    )


def test_a_run_that_diverges_before_its_first_checkpoint_is_kept_as_failed(launch, monkeypatch):
    monkeypatch.setattr(train, "MAX_SKIPPED_IN_A_ROW", 3)
    add_gradients = train.Trainer.add_gradients
    diverging = ["--save_every=100", "--target_window=2", "--log_every=1"]
    with monkeypatch.context() as patch:
        patch.setattr(
            train.Trainer,
            "add_gradients",
            lambda trainer, step, *args: add_gradients(trainer, step, *args) / (step <= 4),
        )
        assert launch("run", *diverging) == 1
    assert "there is no checkpoint yet" in log_text(Path("run"))
    assert (
        json.loads(Path("run/results.json").read_text(encoding="utf-8"))["stop_reason"] == "failed"
    )
    best, table = Path("run/checkpoints/best.pt").read_bytes(), rows(Path("run"))
    for kept in (
        "run/earlier-1",
        "run/earlier-2",
    ):  # of a run killed before its results the best weights are kept, too
        assert launch("run", *diverging, "--steps=2", "--lr=0.001") == 0
        assert Path(kept, "checkpoints/best.pt").read_bytes() == best and rows(Path(kept)) == table
        shutil.rmtree("run/checkpoints")
        shutil.copytree("run/earlier-1/checkpoints", "run/checkpoints")
        shutil.copy("run/earlier-1/logs/train_metrics.csv", "run/logs")
        Path("run/results.json").unlink()


@pytest.mark.slow
def test_a_loss_that_stays_at_ln_v_is_pointed_out_once(launch, monkeypatch):
    monkeypatch.setattr("parts.report.words.STUCK_AFTER", 10)
    flags = [
        "--log_every=1",
        "--warmup_steps=4",
        "--decay_steps=20",
        "--steps=20",
        "--save_every=50",
    ]
    assert launch("stuck", *flags, "--lr=1e-7", "--min_lr=0") == 0
    (line,) = [
        line
        for line in log_text(Path("stuck")).splitlines()
        if "ln V = 5.549, that of guessing" in line
    ]
    assert "WARNING" in line and "--lr 1e-07 is far too low or too high" in line
    assert log_text(Path("stuck")).split(line)[0].count("| loss ") == 14, "ten steps after warm-up"
    assert launch("learning", *flags, "--lr=0.01") == 0
    assert "that of guessing" not in log_text(Path("learning"))


def test_a_save_that_a_skipped_step_prevented_follows_at_the_next(launch, monkeypatch):
    add_gradients = train.Trainer.add_gradients
    monkeypatch.setattr(
        train.Trainer,
        "add_gradients",
        lambda trainer, step, *args: add_gradients(trainer, step, *args) / (step != 4),
    )
    saved = []
    save = train.Saver.save

    def recorded(saver: train.Saver) -> None:
        saved.append(saver.trainer.progress.step)
        save(saver)

    monkeypatch.setattr(train.Saver, "save", recorded)
    assert launch("run", "--steps=10", "--save_every=4") == 0
    assert saved[0] == 5 and saved[-1] == 10
    assert saved[-2:] == [10, 10], "before what only tells, and after it"
    assert set(saved[1:-2]) <= {8, 9}, "at 9 when the one before was still being written"
