"""--seq_len_warmup: the first steps train on the same tokens in shorter slices."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import log_text, rows

import train
from parts.checkpoint import load_checkpoint, write_checkpoint
from parts.commandline import parse_config
from parts.config import PRESETS, Config
from parts.corpus import Corpus


@pytest.fixture
def corpus() -> Corpus:
    tokens = np.random.default_rng(0).integers(0, 500, 300).astype(np.uint16)
    return Corpus(tokens, "made up", len(tokens))


@pytest.mark.parametrize("length", [16, 8, 4])
def test_cut_slices_hold_the_same_inputs_and_targets(length):
    slices = torch.arange(3 * 17).view(3, 17)
    cut = train.cut(slices, length)
    assert cut.shape == (3 * 16 // length, length + 1)
    assert torch.equal(cut[:, :-1].reshape(3, 16), slices[:, :-1])
    assert torch.equal(cut[:, 1:].reshape(3, 16), slices[:, 1:])


def test_quarters_then_halves_then_whole(config, corpus):
    config = replace(config, seq_len=16, block_size=16, seq_len_warmup=5, target_window=2)
    trainer, seen = train.Trainer(config, corpus, None), []
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    contexts, windows = [], []
    for _ in range(8):
        trainer.update()
        contexts.append(trainer.progress.trained_context)
        windows.append(len(trainer.progress.recent_losses))
    batch = config.micro_batch
    assert seen == [(4 * batch, 4)] * 2 + [(2 * batch, 8)] * 3 + [(batch, 16)] * 3
    assert contexts == [4] * 2 + [8] * 3 + [16] * 3, "samples may use no more"
    assert windows == [1, 2, 1, 2, 2, 1, 2, 2], "no window has losses of two lengths"


def test_a_run_says_it_and_stops_by_whole_slices_only(launch):
    flags = ["--seq_len=16", "--block_size=16", "--seq_len_warmup=4", "--steps=12", "--target_loss=50", "--log_every=1"]
    assert launch("run", *flags) == 0
    text = log_text(Path("run"))
    assert "Slices: of 4 tokens from step 1 on" in text and "Slices: of 16 tokens from step 5 on" in text
    assert "From step 5 on, slices of 16 tokens; window_loss begins anew" in text
    results = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    assert (results["stop_reason"], results["final_step"], results["best_step"]) == ("target", 7, 7)
    assert [loss != "" for (loss,) in rows(Path("run"), "window_loss")] == [False] * 6 + [True]


def test_the_best_of_short_slices_is_not_said_to_know_longer_ones(launch, prompt_disk, monkeypatch):
    """That of step 4, of slices of 4 tokens, is written after step 5, when longer ones have been trained."""
    written = []

    def noting(path: Path, checkpoint: dict, previous: Path | None = None) -> None:
        written.append((path.name, checkpoint["step"], checkpoint["trained_context"]))
        write_checkpoint(path, checkpoint, previous)

    monkeypatch.setattr(train, "write_checkpoint", noting)
    flags = ["--seq_len=16", "--block_size=16", "--seq_len_warmup=8", "--target_window=2", "--save_every=5"]
    assert launch("run", *flags) == 0
    assert written[:2] == [("best.pt", 4, 4), ("last.pt", 5, 8)]


def test_another_seq_len_later_begins_a_new_window_and_best(launch):
    flags = ["--seq_len=8", "--block_size=16", "--steps=6", "--decay_steps=6", "--warmup_steps=0"]
    assert launch("run", *flags) == 0
    before = load_checkpoint(Path("run/checkpoints/last.pt"))["progress"]
    assert launch("run", *flags, "--seq_len=16", "--steps=10") == 0
    after = load_checkpoint(Path("run/checkpoints/last.pt"))["progress"]
    assert "--seq_len 8 -> 16" in log_text(Path("run"))
    assert not set(before["recent_losses"]) & set(after["recent_losses"])
    assert after["best_step"] > 6


def test_a_preset_has_it_for_its_own_steps_and_slices():
    assert parse_config([]).seq_len_warmup == PRESETS["gpt2"]["seq_len_warmup"] > 0
    for flag in ("--steps=900", "--seq_len=130", "--val_fraction=0.1", "--preset=demo"):
        assert parse_config([flag]).seq_len_warmup == 0
    assert parse_config(["--steps=900", "--seq_len_warmup=80"]).seq_len_warmup == 80


def test_a_checkpoint_of_before_the_flag_has_none():
    values = Config().resolved().as_dict()
    del values["seq_len_warmup"]
    assert Config.from_dict(values).seq_len_warmup == 0
