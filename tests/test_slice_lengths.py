"""--mixed_steps: the first steps train on the same tokens, three of four slices cut into
quarters."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import log_text, rows

import train
from parts.commandline import parse_config
from parts.compute.device import largest_divisor
from parts.compute.ranks import Ranks
from parts.flags import Config
from parts.run.checkpoint import load_checkpoint
from parts.text.corpus import Corpus

SHORT = ["--seq_len=16", "--block_size=16", "--batch_size=4"]


@pytest.fixture
def corpus() -> Corpus:
    tokens = np.random.default_rng(0).integers(0, 500, 300).astype(np.uint16)
    return Corpus(tokens, "made up", len(tokens))


@pytest.mark.parametrize("processes", [1, 2, 4, 12])
def test_every_fourth_slice_is_whole_and_the_others_are_quarters_however_they_are_shared(processes):
    """The same inputs and targets, each once."""
    slices, share, whole, short = torch.arange(12 * 17).view(12, 17), 12 // processes, [], []
    for rank in range(processes):
        for part in train.whole_and_quarters(slices[rank * share :][:share], rank * share):
            (whole if part.shape[1] == 17 else short).append(part)
    assert torch.equal(torch.cat(whole), slices[::4])
    others, quarters = slices[torch.arange(12) % 4 > 0], torch.cat(short)
    assert quarters.shape == (9 * 4, 4 + 1)
    assert torch.equal(quarters[:, :-1].reshape(9, 16), others[:, :-1])
    assert torch.equal(quarters[:, 1:].reshape(9, 16), others[:, 1:])


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_loss_and_gradient_are_of_the_mean_over_all_tokens(config, corpus, micro_batch):
    config = replace(
        config, seq_len=16, block_size=16, batch_size=8, micro_batch=micro_batch, mixed_steps=5
    )
    trainer = train.Trainer(config, corpus, None)
    whole, quarters = trainer.slices(1)
    loss, _ = trainer.accumulate(1, [whole, quarters], trainer.model)
    found = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad(set_to_none=True)
    losses = [trainer.model(part[:, :-1], part[:, 1:]) for part in (whole, quarters)]
    (losses[0] / 4 + losses[1] * 3 / 4).backward()
    torch.testing.assert_close(loss, losses[0].detach())
    torch.testing.assert_close(
        found, [p.grad for p in trainer.model.parameters()], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("mixed_steps", [0, 5])
@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_which_loss_is_told_changes_no_bit_of_the_gradients(
    config, corpus, micro_batch, mixed_steps
):
    """Nor of the loss of a step without mixed slices: as when it was the mean over all pieces."""
    config = replace(config, seq_len=16, block_size=16, batch_size=8, mixed_steps=mixed_steps)
    trainer = train.Trainer(replace(config, micro_batch=micro_batch), corpus, None)
    parts = trainer.slices(1)
    loss, _ = trainer.accumulate(1, parts, trainer.model)
    found = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad(set_to_none=True)
    mean = torch.zeros(())
    for part in parts:
        for piece in train.micro_batches(part, micro_batch * 16):
            share = trainer.model(piece[:, :-1], piece[:, 1:]) / (8 * 16 / piece[:, 1:].numel())
            share.backward()
            mean += share.detach()
    assert all(map(torch.equal, found, [p.grad for p in trainer.model.parameters()]))
    assert torch.equal(loss, mean) is (mixed_steps == 0)


@pytest.fixture
def on_ranks(monkeypatch):
    """Loss and gradients of the first step, as so many ranks compute them: the mean of theirs."""

    def compute(config: Config, corpus: Corpus, processes: int) -> list[torch.Tensor]:
        found = []

        def average(_ranks: Ranks, tensors: list[torch.Tensor]) -> None:
            found.append([tensor.clone() for tensor in tensors])

        monkeypatch.setattr(Ranks, "average", average)
        fits = largest_divisor(config.global_batch // processes, config.micro_batch)
        config = replace(config, processes=processes, micro_batch=fits)
        for rank in range(processes):
            train.Trainer(config, corpus, None, Ranks(rank, processes)).update()
        return [torch.stack(tensors).mean(0) for tensors in zip(*found, strict=True)]

    return compute


@pytest.mark.parametrize(
    ("processes", "batch_size", "grad_accum", "micro_batch"),
    [
        (1, 8, 1, 8),
        (1, 8, 1, 2),
        (1, 2, 3, 2),
        (2, 8, 1, 4),
        (2, 5, 2, 1),
        (4, 4, 2, 2),
        (8, 8, 1, 1),
    ],
)
def test_the_loss_of_a_mixed_step_is_that_of_its_whole_slices(
    config, corpus, on_ranks, processes, batch_size, grad_accum, micro_batch
):
    """However they are accumulated and shared: of eight ranks six have none, of two one has
    more."""
    config = replace(config, batch_size=batch_size, grad_accum=grad_accum, micro_batch=micro_batch)
    config = replace(config, seq_len=16, block_size=16, mixed_steps=5)
    n_slices, n_starts = config.global_batch, len(corpus.tokens) - 16
    starts = train.covering_starts(config.seed, 0, n_slices, n_starts, 16)
    whole = train.take_slices(corpus.tokens, starts, 16)[::4]
    assert len(whole) == config.whole_slices(1) == -(-n_slices // 4)
    with torch.no_grad():
        expected = train.GPT(config)(whole[:, :-1], whole[:, 1:])
    loss, *gradients = on_ranks(config, corpus, processes)
    torch.testing.assert_close(loss, expected)
    alone = on_ranks(config, corpus, 1)
    torch.testing.assert_close(gradients, alone[1:], rtol=1e-3, atol=1e-6)
    if processes == 1:
        assert train.Trainer(config, corpus, None).update()[0] == loss.item()


def test_quarters_beside_whole_slices_then_whole_ones(config, corpus):
    config = replace(
        config,
        seq_len=16,
        block_size=16,
        batch_size=8,
        micro_batch=4,
        mixed_steps=3,
        target_window=2,
    )
    trainer, seen, windows = train.Trainer(config, corpus, None), [], []
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    for _ in range(5):
        trainer.update()
        windows.append(len(trainer.progress.recent_losses))
    assert seen == [(2, 16), (12, 4), (12, 4)] * 3 + [(4, 16)] * 4
    assert windows == [1, 2, 2, 2, 2], "one window for both kinds of step"


def test_a_run_says_it_and_stops_at_its_target_while_slices_are_mixed(launch):
    flags = [*SHORT, "--mixed_steps=4", "--steps=12", "--target_loss=50", "--log_every=1"]
    assert launch("run", *flags) == 0
    text = log_text(Path("run"))
    assert "Slices: 4 and 16 tokens long up to step 4, then 16\n" in text
    results = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    assert (results["stop_reason"], results["final_step"], results["best_step"]) == ("target", 3, 3)


def test_window_and_best_go_on_from_mixed_to_whole_slices(launch):
    assert launch("run", *SHORT, "--mixed_steps=4", "--log_every=1", "--target_window=2") == 0
    full = [step for step, (loss,) in enumerate(rows(Path("run"), "window_loss"), 1) if loss]
    assert full == [2, 3, 4, 5, 6, 7, 8]
    assert launch("all", *SHORT, "--mixed_steps=8", "--val_fraction=0.2") == 0
    assert "Slices: 4 and 16 tokens long\n" in log_text(Path("all"))


def test_a_rehearsal_does_whole_slices_which_take_the_most_memory(launch, monkeypatch):
    shapes = []
    accumulate = train.Trainer.accumulate
    monkeypatch.setattr(
        train.Trainer,
        "accumulate",
        lambda trainer, step, slices, forward: (
            shapes.append([len(x[0]) for x in slices]),
            accumulate(trainer, step, slices, forward),
        )[1],
    )
    assert launch("run", *SHORT, "--mixed_steps=6", "--dry_run") == 0
    assert shapes == [[17], [17]]


def test_another_seq_len_later_begins_a_new_window_and_best(launch):
    flags = ["--seq_len=8", "--block_size=16", "--steps=6", "--decay_steps=6", "--warmup_steps=0"]
    assert launch("run", *flags) == 0
    before = load_checkpoint(Path("run/checkpoints/last.pt"))["progress"]
    assert launch("run", *flags, "--seq_len=16", "--steps=10") == 0
    after = load_checkpoint(Path("run/checkpoints/last.pt"))["progress"]
    assert "--seq_len 8 -> 16" in log_text(Path("run"))
    assert not set(before["recent_losses"]) & set(after["recent_losses"])
    assert after["best_step"] > 6


def test_it_is_a_part_of_the_steps_where_slices_can_be_cut():
    for flag in (
        "--steps=900",
        "--seq_len=64",
        "--val_fraction=0.1",
        "--preset=small",
        "--batch_size=4",
    ):
        config = parse_config([flag])
        assert config.mixed_steps == int(0.8 * config.steps) > 0
    for flag in ("--seq_len=130", "--batch_size=3"):
        assert parse_config([flag]).mixed_steps == 0
    assert parse_config(["--steps=900", "--mixed_steps=80"]).mixed_steps == 80
    assert parse_config(["--batch_size=2", "--grad_accum=2"]).mixed_steps > 0
