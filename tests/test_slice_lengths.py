"""--mixed_steps: the first steps train on the same tokens, half of them in shorter slices."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import log_text, rows

import train
from parts.checkpoint import load_checkpoint
from parts.commandline import parse_config
from parts.config import PRESETS, Config
from parts.corpus import Corpus


@pytest.fixture
def corpus() -> Corpus:
    tokens = np.random.default_rng(0).integers(0, 500, 300).astype(np.uint16)
    return Corpus(tokens, "made up", len(tokens))


def test_quarters_hold_the_same_inputs_and_targets():
    slices = torch.arange(3 * 17).view(3, 17)
    cut = train.quarters(slices)
    assert cut.shape == (3 * 4, 4 + 1)
    assert torch.equal(cut[:, :-1].reshape(3, 16), slices[:, :-1])
    assert torch.equal(cut[:, 1:].reshape(3, 16), slices[:, 1:])


@pytest.mark.parametrize("at_once", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("processes", [1, 2, 4, 12])
def test_odd_slices_are_cut_however_the_step_is_shared(at_once, processes):
    """However many processes and slices at once: the same slices whole, the same in quarters, each once."""
    slices, share, whole, short = torch.arange(12 * 17).view(12, 17), 12 // processes, [], []
    for rank in range(processes):
        for part in train.micro_batches(slices[rank * share :][:share], at_once, rank * share):
            (whole if part.shape[1] == 17 else short).append(part)
            assert len(part) <= at_once * (1 if part.shape[1] == 17 else 4)
    assert torch.equal(torch.cat(whole), slices[::2])
    assert torch.equal(torch.cat(short), train.quarters(slices[1::2]))


def test_the_loss_and_its_gradient_are_of_the_mean_over_all_tokens(config, corpus):
    config = replace(config, seq_len=16, block_size=16, batch_size=6, micro_batch=6, mixed_steps=5)
    trainer = train.Trainer(config, corpus, None)
    slices = trainer.slices(1)
    loss = trainer.accumulate(1, slices)
    found = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad(set_to_none=True)
    parts = [slices[::2], train.quarters(slices[1::2])]
    losses = [trainer.model(part[:, :-1], part[:, 1:]) for part in parts]
    (sum(losses) / 2).backward()
    torch.testing.assert_close(loss, sum(losses).detach() / 2)
    torch.testing.assert_close(found, [p.grad for p in trainer.model.parameters()], rtol=1e-4, atol=1e-6)


def test_quarters_beside_whole_slices_then_whole_ones(config, corpus):
    config = replace(config, seq_len=16, block_size=16, mixed_steps=3, target_window=2)
    trainer, seen = train.Trainer(config, corpus, None), []
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    windows = []
    for _ in range(5):
        trainer.update()
        windows.append(len(trainer.progress.recent_losses))
    batch = config.micro_batch
    assert seen == [(batch // 2, 16), (2 * batch, 4)] * 3 + [(batch, 16)] * 2
    assert windows == [1, 2, 2, 1, 2], "no window has losses of both kinds of step"


def test_a_run_says_it_and_stops_by_whole_slices_only(launch):
    flags = ["--seq_len=16", "--block_size=16", "--mixed_steps=4", "--steps=12", "--target_loss=50", "--log_every=1"]
    assert launch("run", *flags) == 0
    text = log_text(Path("run"))
    assert "Slices: of 4 and 16 tokens from step 1 on" in text and "Slices: of 16 tokens from step 5 on" in text
    assert "From step 5 on, slices of 16 tokens; window_loss begins anew" in text
    results = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    assert (results["stop_reason"], results["final_step"], results["best_step"]) == ("target", 7, 7)
    assert [loss != "" for (loss,) in rows(Path("run"), "window_loss")] == [
        False,
        False,
        True,
        True,
        False,
        False,
        True,
    ]


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
    assert parse_config([]).mixed_steps == PRESETS["gpt2"]["mixed_steps"] > 0
    for flag in ("--steps=900", "--seq_len=130", "--val_fraction=0.1", "--preset=demo"):
        assert parse_config([flag]).mixed_steps == 0
    assert parse_config(["--steps=900", "--mixed_steps=80"]).mixed_steps == 80


def test_a_checkpoint_of_before_the_flag_has_none():
    values = Config().resolved().as_dict()
    del values["mixed_steps"]
    assert Config.from_dict(values).mixed_steps == 0
