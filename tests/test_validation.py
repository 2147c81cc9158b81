"""A held-out split: never trained on, measured the same way every time, and it decides what is
best."""

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GPT2, TINY_FLAGS, log_text

import train
import update_readme
from parts.flags import VOCAB_SIZE, Config
from parts.progress import Progress
from parts.recipe import decide
from parts.report.reader import overfitting, read_run, validation
from parts.report.words import plan
from parts.run.checkpoint import load_checkpoint
from parts.text.corpus import Corpus, load_corpus
from parts.text.vocabulary import load_tokenizer

FLAGS = [*TINY_FLAGS, "--val_fraction=0.2", "--eval_every=3", "--input_file=input.txt", "--amp=off"]


@pytest.fixture
def here(text_file, monkeypatch):
    monkeypatch.chdir(text_file.parent)
    return text_file.parent


def table(run: str) -> list[dict[str, str]]:
    with open(Path(run, "logs/train_metrics.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def results(run: str) -> dict:
    return json.loads(Path(run, "results.json").read_text(encoding="utf-8"))


def test_the_tail_is_held_out(config, text_file, tokenizer):
    whole = load_corpus(replace(config, input_file=(text_file,)), tokenizer)
    split = load_corpus(replace(config, input_file=(text_file,), val_fraction=0.25), tokenizer)
    assert np.array_equal(np.concatenate([split.tokens, split.val_tokens]), whole.tokens)
    assert len(split.val_tokens) == round(len(whole.tokens) / 4)
    text = tokenizer.decode(split.val_tokens.tolist())
    assert split.val_bytes_per_token == len(text.encode()) / len(split.val_tokens)
    assert whole.bytes_per_token == text_file.stat().st_size / len(whole.tokens)
    trainer = train.Trainer(
        replace(config, val_fraction=0.25, input_file=(text_file,)), split, None
    )
    windows = {
        tuple(window)
        for window in np.lib.stride_tricks.sliding_window_view(split.tokens, config.seq_len + 1)
    }
    for step in range(1, 60):
        assert {tuple(row) for row in trainer.slices(step)[0].tolist()} <= windows


def test_another_text_can_be_the_split(config, text_file, tokenizer):
    other = text_file.with_name("other.txt")
    other.write_text(
        "Quite another text, long enough for a slice or two of it, is held here. " * 3,
        encoding="utf-8",
    )
    corpus = load_corpus(replace(config, input_file=(text_file,), val_file=(other,)), tokenizer)
    assert tokenizer.decode(corpus.val_tokens.tolist()) == other.read_text(encoding="utf-8")
    assert len(corpus.tokens) == len(
        load_corpus(replace(config, input_file=(text_file,)), tokenizer).tokens
    )


def test_the_loss_is_the_mean_over_evenly_spread_slices(config):
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, 1000).astype(np.uint16)
    model = train.GPT(config)
    found, error = train.validation_loss(model, tokens, config)
    T = config.seq_len
    starts = np.linspace(0, len(tokens) - 1 - T, (len(tokens) - 1) // T).astype(int)
    assert starts[0] == 0 and starts[-1] == len(tokens) - 1 - T and (np.diff(starts) >= T).all(), (
        "no overlap"
    )
    with torch.no_grad():
        losses = []
        for start in starts:
            ids = torch.tensor(tokens[start : start + T + 1].astype(int))[None]
            losses.append(F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:]).item())
    assert found == pytest.approx(np.mean(losses), rel=1e-5)
    assert error == pytest.approx(np.std(losses, ddof=1) / len(losses) ** 0.5, rel=1e-4)
    assert train.validation_loss(model, tokens, config) == (found, error) and model.training
    assert train.validation_loss(model, tokens[: T + 1], config)[1] == 0, (
        "of one slice it is unknown"
    )


def test_large_splits_are_measured_in_part(config, monkeypatch):
    monkeypatch.setattr(train, "VAL_TOKENS", 64)
    seen = []
    monkeypatch.setattr(
        train, "slice_losses", lambda model, slices, config: seen.append(slices) or torch.zeros(1)
    )
    train.validation_loss(None, np.arange(10_000, dtype=np.uint16), config)
    assert seen[0][:, 0].tolist() == [0, 3327, 6655, 9983]


def test_it_stands_in_rows_lines_and_results(here):
    assert train.main([*FLAGS, GPT2, "--out_dir=run"]) == 0
    measured = {row["step"]: float(row["val_loss"]) for row in table("run") if row["val_loss"]}
    assert list(measured) == ["3", "6", "8"], "every eval_every steps, and the last"
    for row in table("run"):
        if row["val_loss"]:
            assert float(row["val_perplexity"]) == pytest.approx(
                math.exp(measured[row["step"]]), rel=1e-4
            )
        assert bool(row["bits_per_byte"]) == bool(row["window_loss"])
    log = Path("run/logs/train.log").read_text(encoding="utf-8")
    assert re.findall(r"step (\d+)/8 .*\| val_loss ([\d.]+)", log) == [
        (s, f"{v:.6f}") for s, v in measured.items()
    ]
    found = results("run")
    assert (
        found["val_loss"] == pytest.approx(measured["8"], abs=1e-7)
        and found["best_metric"] == "val_loss"
    )
    assert found["best_loss"] == pytest.approx(min(measured.values()), abs=1e-7)
    assert "Validation: " in log and "never trained on" in log
    expected = (
        found["val_loss"]
        / math.log(2)
        / load_corpus(
            Config.from_dict(load_checkpoint(Path("run/checkpoints/last.pt"))["config"]),
            load_tokenizer(),
        ).val_bytes_per_token
    )
    assert found["val_bits_per_byte"] == pytest.approx(expected)


OVERFITTING = [
    *FLAGS,
    GPT2,
    "--lr=0.05",
    "--warmup_steps=0",
    "--max_tokens=120",
    "--eval_every=5",
    "--log_every=50",
]
OVERFITTING += ["--save_every=1000", "--sample_every=1000"]


@pytest.mark.slow
def test_the_best_is_the_one_with_the_lowest_validation_loss(here):
    assert train.main([*OVERFITTING, "--steps=150", "--out_dir=run"]) == 0
    measured = {int(row["step"]): float(row["val_loss"]) for row in table("run") if row["val_loss"]}
    lowest = min(measured, key=measured.get)
    assert lowest < 150 and measured[150] > 1.01 * measured[lowest], "it should overfit"
    best = load_checkpoint(Path("run/checkpoints/best.pt"))
    assert best["step"] == lowest == results("run")["best_step"]
    assert best["loss"] == pytest.approx(measured[lowest], abs=1e-7)
    config = Config.from_dict(best["config"])
    model = train.GPT(config)
    model.load_state_dict(best["model"])
    corpus = load_corpus(config, load_tokenizer())
    loss, error = train.validation_loss(model, corpus.val_tokens, config)
    assert loss == pytest.approx(best["loss"], rel=1e-6)
    assert error == (results("run")["best_loss_standard_error"] or 0), (
        "of one slice it is not known"
    )
    log = Path("run/logs/train.log").read_text(encoding="utf-8")
    assert (
        f"best.pt has the weights of step {lowest}, with the lowest validation loss: "
        f"{measured[lowest]:.6f}, " in log
    )
    assert f"Verdict: the model overfits since step {lowest}, " in log
    assert "slices of the training part, with the last weights), " in log
    assert overfitting(read_run(Path("run"))) == lowest
    summary = update_readme.summary_section(read_run(Path("run")), Path("README.md"))
    assert "| best val_loss | **" in summary and f"| overfitting | from step {lowest} on" in summary


@pytest.mark.slow
def test_patience_ends_the_run(here):
    flags = [*OVERFITTING, "--steps=500", "--out_dir=run"]
    assert train.main([*flags, "--patience=3"]) == 0
    found, steps = results("run"), [int(row["step"]) for row in table("run") if row["val_loss"]]
    assert (
        found["stop_reason"] == "patience"
        and found["final_step"] == steps[-1] == found["best_step"] + 15
    )
    assert train.main([*flags, "--patience=3"]) == 0
    assert results("run")["final_step"] == found["final_step"], "nothing left to do"
    assert train.main([*flags, "--patience=5"]) == 0
    assert results("run")["final_step"] >= found["final_step"] + 10


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(here):
    flags = [*FLAGS, "--dropout=0.1", "--patience=50"]
    assert train.main([*flags, "--steps=12", "--out_dir=whole"]) == 0
    for steps in (5, 9, 12):
        assert (
            train.main(
                [
                    *flags,
                    f"--steps={steps}",
                    "--decay_steps=12",
                    "--warmup_steps=0",
                    "--out_dir=parts",
                ]
            )
            == 0
        )
    first, second = (
        [row for row in table(run) if int(row["step"]) % 3 == 0] for run in ("whole", "parts")
    )
    for name in ("step", "loss", "val_loss"):
        assert [row[name] for row in first] == [row[name] for row in second]
    last = [
        load_checkpoint(Path(run, "checkpoints/last.pt"))["model"] for run in ("whole", "parts")
    ]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


@pytest.mark.slow
def test_a_best_of_another_measure_does_not_count(here):
    without = [flag for flag in FLAGS if "val_fraction" not in flag]
    Path("other.txt").write_text(
        "Some other text to look at, and then again some more of it. " * 5, encoding="utf-8"
    )
    assert train.main([*without, "--out_dir=run"]) == 0
    assert results("run")["best_metric"] == "window_loss"
    assert train.main([*without, "--out_dir=run", "--steps=12", "--val_file=other.txt"]) == 0
    found = results("run")
    assert found["best_metric"] == "val_loss" and found["best_step"] > 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val_file=input.txt"], "choose one"),
        (["--val_fraction=0.6"], "--val_fraction 0.6 is outside"),
        (["--val_fraction=0.001"], "the validation split has"),
        (["--val_fraction=0", "--patience=2"], "--patience 2 needs a validation split"),
        (["--val_fraction=0", "--val_file=none.txt"], "none.txt does not exist"),
    ],
)
def test_what_cannot_be_validated_is_refused(here, capsys, flags, message):
    assert train.main([*FLAGS, *flags, "--out_dir=run"]) == 2
    assert message in capsys.readouterr().err and not Path("run").exists()


@pytest.mark.parametrize(
    ("n_tokens", "flags", "steps"),
    [
        (338_025, dict(), "82.5 steps"),
        (338_025, dict(batch_size=8, seq_len=128, grad_accum=16), "20.6 steps"),
        (116_944_985, dict(seq_len=1024, batch_size=4, grad_accum=8), "3,568.9 steps"),
    ],
)
def test_the_steps_of_a_pass(n_tokens, flags, steps):
    corpus = Corpus(np.broadcast_to(np.uint16(0), n_tokens), "made up", n_tokens, 3.3)
    config = decide(dict(**flags))
    text = "\n".join(plan(config, corpus, 0.1, Progress()))
    assert f"a pseudo-epoch of {n_tokens:,} tokens is {steps}" in text
    planned = config.steps * config.batch_size * config.grad_accum * config.seq_len
    assert f"{planned:,} tokens = {planned / n_tokens:,.1f} pseudo-epochs" in text


@pytest.mark.slow
def test_another_content_of_the_validation_text_is_another_measure(here):
    Path("other.txt").write_text(
        "Some other text to look at, and then again some more of it. " * 5, encoding="utf-8"
    )
    flags = [flag for flag in FLAGS if "val_fraction" not in flag] + [
        "--val_file=other.txt",
        "--out_dir=run",
    ]
    assert train.main(flags) == 0
    before = Path("run/checkpoints/best.pt").read_bytes()
    for steps, held_out in ((12, "0123456789 " * 60), (16, "9876543210 " * 60)):
        Path("other.txt").write_text(held_out, encoding="utf-8")
        assert train.main([*flags, f"--steps={steps}"]) == 0
        assert results("run")["best_step"] > steps - 4, "the best so far was of another text"
    assert Path("run/checkpoints/best-1.pt").read_bytes() == before, "and is kept"
    assert load_checkpoint(Path("run/checkpoints/best-2.pt"))["step"] <= 12
    log = log_text(Path("run"))
    kept = [Path(f"run/checkpoints/{name}.pt") for name in ("best", "best-1", "best-2")]
    assert all(
        f"{kept[0]} does not compare with the losses from here on: it will be kept as {one}" in log
        for one in kept[1:]
    )


def test_the_same_validation_text_under_another_name_is_the_same_measure(here):
    Path("other.txt").write_text(
        "Some other text to look at, and then again some more of it. " * 5, encoding="utf-8"
    )
    flags = [flag for flag in FLAGS if "val_fraction" not in flag] + ["--out_dir=run"]
    assert train.main([*flags, "--val_file=other.txt", "--patience=2"]) == 0
    best, before = Path("run/checkpoints/best.pt").read_bytes(), results("run")
    Path("other.txt").rename("moved.txt")
    worse = ["--steps=30", "--lr=9", "--min_lr=9", "--patience=2"]
    assert train.main([*flags, f"--val_file={Path('moved.txt').resolve()}", *worse]) == 0
    found = results("run")
    assert found["stop_reason"] == "patience" and found["val_loss"] > before["best_loss"], (
        "or nothing is shown"
    )
    assert [found[name] for name in ("best_loss", "best_step")] == [
        before[name] for name in ("best_loss", "best_step")
    ]
    assert Path("run/checkpoints/best.pt").read_bytes() == best and not list(
        Path("run").glob("*/best-*")
    )
    assert validation(read_run(Path("run")))["step"].iloc[0] == 3, (
        "nor did the measure change for who reads the run"
    )


def test_a_run_that_ends_as_it_is_resumed_is_measured_too(here, prompt_disk):
    flags = [*FLAGS, "--eval_every=1000", "--out_dir=run"]
    start = train.Trainer.update

    def stopped(trainer):
        if trainer.progress.step == 4:
            raise KeyboardInterrupt
        return start(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "update", stopped)
        assert train.main([*flags, "--steps=100", "--save_every=4"]) == 130
    assert train.main([*flags, "--steps=4", "--decay_steps=100"]) == 0
    found = results("run")
    assert (
        found["val_loss"] == found["best_loss"] and found["best_step"] == found["final_step"] == 4
    )
    assert Path("run/checkpoints/best.pt").exists()


@pytest.mark.slow
def test_a_run_that_diverges_does_not_overfit(here):
    flags = [
        *FLAGS,
        "--lr=5",
        "--min_lr=1",
        "--eval_every=1",
        "--steps=40",
        "--out_dir=run",
        "--optimizer=adamw",
    ]
    assert train.main(flags) in (0, 1)
    assert "overfits" not in Path("run/logs/train.log").read_text(encoding="utf-8")
    assert overfitting(read_run(Path("run"))) is None
