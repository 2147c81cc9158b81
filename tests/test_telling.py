"""What only tells of a run costs it nothing: it is saved before, a signal breaks it off, and a
failure is a warning."""

import json
import re
import signal
from pathlib import Path

import pytest
from conftest import assert_same_run, log_text, rows

import train
import update_readme
from parts.compute.signals import look_for_signals
from parts.run.checkpoint import load_checkpoint


def step_on_disk() -> int:
    path = Path("run/checkpoints/last.pt")
    return load_checkpoint(path)["step"] if path.exists() else 0


def results(run: str) -> dict:
    return json.loads(Path(run, "results.json").read_text(encoding="utf-8"))


@pytest.fixture
def failing(monkeypatch):
    """Have samples and measurements fail, and tell what was on the disk then."""
    found: list[tuple[str, int]] = []

    def fails(name: str):
        def call(*_arguments, **_options):
            found.append((name, step_on_disk()))
            raise RuntimeError("CUDA error: out of memory\nmore words")

        return call

    monkeypatch.setattr(train.Trainer, "sample", fails("sample"))
    monkeypatch.setattr(train, "validation_loss", fails("validation"))
    monkeypatch.setattr(train, "corpus_losses", fails("corpus loss"))
    return found


@pytest.mark.parametrize("flags", [["--val_fraction=0.2", "--eval_every=3"], ["--target_loss=99"]])
def test_what_fails_is_a_warning_and_the_run_is_saved_before(launch, prompt_disk, failing, flags):
    assert launch("run", "--save_every=100", *flags) == 0
    at_the_end = dict(failing[-3:] if "--target_loss=99" not in flags else failing[-2:])
    assert set(at_the_end.values()) == {8} and {"sample", "corpus loss"} <= at_the_end.keys()
    assert ("sample", 0) in failing, "in mid-run, too"
    log = log_text(Path("run"))
    assert (
        "The sample failed at step 8, the run goes on without: RuntimeError: CUDA error: out of "
        "memory more" in log
    )
    assert log.count(" failed at step ") == len(failing) and "inf" not in log.replace(
        "INFO", ""
    ).replace("info", "")
    assert (step_on_disk(), results("run")["stop_reason"], results("run")["corpus_loss"]) == (
        8,
        "steps",
        None,
    )
    if "--target_loss=99" in flags:
        assert log.count("The check of the target failed") == 2, "each time that a window is full"
        assert (
            "whether the target was reached is unknown: the loss on random slices could not be "
            "measured" in log
        )
    Path("README.md").write_text(
        "<!--AUTO:SUMMARY:START-->\n<!--AUTO:SUMMARY:END-->\n", encoding="utf-8"
    )
    assert update_readme.main(["--out_dir=run"]) == 0 and launch("run", *flags) == 0
    assert len(failing) == log.count(" failed at step "), "the second start has nothing to do"


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["--val_fraction=0.1 --eval_every=2 --patience=9", "--target_loss=5.37 --lr=0.02"]
)
def test_a_signal_at_any_look_is_heeded_and_nothing_is_lost(launch, prompt_disk, monkeypatch, case):
    """Between two tokens or two parts of a measurement, in mid-run and at the end; the next start
    does it anew."""
    looks, last = [], [10**9]

    def look() -> None:
        looks.append(None)
        if len(looks) == last[0]:
            signal.raise_signal(signal.SIGTERM)
        look_for_signals()
        assert len(looks) < last[0], "it goes on behind a signal"

    flags = [*case.split(), "--steps=6", "--sample_every=3", "--max_new_tokens=4", "--save_every=4"]
    monkeypatch.setattr(train, "look_for_signals", look)
    assert launch("whole", *flags) == 0
    codes = []
    for last[0] in (1, 2, 4, 7, 11, 13, 18, 24, 31, 40, 10**9):
        looks.clear()
        codes.append(launch("run", *flags))
        if codes[-1]:
            told = [
                line
                for line in log_text(Path("run")).splitlines()
                if "Interrupted by SIGTERM after step" in line
            ]
            assert f"after step {step_on_disk()}." in told[-1]
            assert results("run")["stop_reason"] == "interrupted"
            if results("run")["best_step"]:
                best = load_checkpoint(Path("run/checkpoints/best.pt"))
                assert best["step"] == results("run")["best_step"], "what is told is on disk"
    assert codes[:3] == [143] * 3 and set(codes) == {143, 0}
    assert_same_run(Path("whole"), Path("run"))


def test_a_step_that_the_next_start_tells_has_its_own_rate(launch, monkeypatch):
    """The learning rate is that of the flags it was made with; the tokens per second are a mean."""
    tell = train.tell

    def broken_off(trainer, *rest) -> None:
        if trainer.progress.step == 6:
            signal.raise_signal(signal.SIGTERM)
            look_for_signals()
        tell(trainer, *rest)

    flags = ["--log_every=1", "--num_prompts=0"]
    assert launch("whole", *flags, "--steps=40") == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "tell", broken_off)
        assert launch("run", *flags, "--steps=40") == 143
    assert launch("run", *flags, "--steps=10") == 0
    told = rows(Path("run"), "step", "lr", "loss")
    assert told[:6] == rows(Path("whole"), "step", "lr", "loss")[:6]
    assert float(told[6][1]) < float(told[5][1]), "from here on the shorter schedule"
    ((tokens, seconds, rate),) = rows(Path("run"), "tokens", "elapsed_sec", "tokens_per_sec")[5:6]
    assert float(seconds) == pytest.approx(float(tokens) / float(rate), abs=0.006), "as rounded"


def test_an_estimate_is_told_once_for_a_step_and_no_empty_file_is_named(launch, prompt_disk):
    assert launch("run", "--steps=20", "--save_every=10", "--num_prompts=0") == 0
    log = log_text(Path("run"))
    assert log.count("ETA ") == 2, "after the second and the tenth step, where a save is due, too"
    assert re.findall(r"See (.+)", log) == [str(Path("run/logs/train.log"))]
