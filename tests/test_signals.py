"""Ctrl-C and SIGTERM finish the step, save, and say how to continue; a second one leaves at
once."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import KILLS, ROOT, TINY_FLAGS, log_text

import train
from parts.compute.signals import Interruption, terminating
from parts.run.checkpoint import load_checkpoint

pytestmark = KILLS
posix = pytest.mark.skipif(os.name == "nt", reason="Windows delivers no POSIX signals")
ANNOUNCEMENTS = {
    signal.SIGINT: "Finishing this step, then saving. Ctrl-C again quits without saving.",
    signal.SIGTERM: "SIGTERM: finishing this step, then saving.",
}

MAIN = f"sys.path.insert(0, {str(ROOT)!r}); import train; sys.exit(train.main(sys.argv[1:]))"
SLOW_SIXTH_STEP = f"""
import pathlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
update = train.Trainer.update
def slow(trainer):
    if trainer.progress.step == 5:
        pathlib.Path("asleep").touch()
        time.sleep(30)
    return update(trainer)
train.Trainer.update = slow
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture
def start(tmp_path, text_file):
    """Start a run and wait until its CSV has so many rows, or until it has made the file `sign`."""

    def run(*program: str, steps: int, rows: int = 0, sign: str = "") -> subprocess.Popen:
        flags = [
            *TINY_FLAGS,
            f"--input_file={text_file}",
            "--out_dir=run",
            f"--steps={steps}",
            "--log_every=1",
        ]
        process = subprocess.Popen(
            [sys.executable, *program, *flags],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # tests in a shell's background ignore it
        )
        file, deadline = tmp_path / (sign or "run/logs/train_metrics.csv"), time.monotonic() + 60
        while time.monotonic() < deadline and not (
            file.exists() and file.read_bytes().count(b"\n") >= (rows and rows + 1)
        ):
            time.sleep(0.05)
        return process

    return run


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_finishes_the_step_saves_and_says_how_to_continue(start, tmp_path, number, code):
    process = start(str(ROOT / "train.py"), steps=100_000, rows=3)
    process.send_signal(number)
    process.send_signal(number)  # as `timeout` does: not a second wish
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert err.strip() == ANNOUNCEMENTS[number]
    step = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["step"]
    assert f"after step {step}. To continue: python train.py --out_dir run\n" in out
    sampled = out.count(f"Sample at step {step}: ")
    assert sampled == 1 if number == signal.SIGINT else sampled <= (step % 4 == 0), (
        "for who is there"
    )
    assert (
        json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))["stop_reason"]
        == "interrupted"
    )


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_leaves_at_once(start, tmp_path, number, code):
    process = start("-c", SLOW_SIXTH_STEP, steps=8, sign="asleep")
    process.send_signal(number)
    time.sleep(1.3)
    assert process.poll() is None
    for _ in range(
        8
    ):  # a busy machine may deliver the first so late that the second seems to be the same
        process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            out, err = process.communicate(timeout=2.5)
            break
    assert process.returncode == code and err.strip() == ANNOUNCEMENTS[number]
    told = (
        "Broken off; what was saved before is whole. To continue from the last checkpoint: "
        "python train.py --out_dir run\n"
    )
    assert told in out
    assert load_checkpoint(tmp_path / "run/checkpoints/last.pt")["step"] == 4


BATCH = ["SIGUSR1", "SIGUSR2", "SIGXCPU"]


@posix
@pytest.mark.parametrize("name", BATCH)
def test_a_warning_of_a_batch_system_ends_the_run_as_sigterm_does(launch, before_step, name):
    before_step({3: lambda: signal.raise_signal(getattr(signal, name))})
    assert launch("run", "--num_prompts=0") == 143
    assert load_checkpoint(Path("run/checkpoints/last.pt"))["step"] == 3
    assert f"Interrupted by {name} after step 3. To continue: " in log_text(Path("run"))


@pytest.mark.skipif(os.name != "nt", reason="Ctrl-Break is a key of Windows alone")
def test_ctrl_break_ends_the_run_as_ctrl_c_does(launch, before_step):
    before_step({3: lambda: signal.raise_signal(signal.SIGBREAK)})
    assert launch("run", "--num_prompts=0") == 130
    assert load_checkpoint(Path("run/checkpoints/last.pt"))["step"] == 3
    assert "Interrupted by SIGBREAK after step 3. To continue: " in log_text(Path("run"))


@posix
@pytest.mark.parametrize("name", BATCH)
def test_a_warning_may_come_again_and_before_the_first_step(name):
    """The kernel sends SIGXCPU every second."""
    number = getattr(signal, name)
    with Interruption(silent=True) as interruption:
        signal.raise_signal(number)
        interruption.time -= 2
        signal.raise_signal(number)
        assert interruption.signal_name == signal.Signals(number).name
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in (number, signal.SIGTERM)}
    with pytest.raises(KeyboardInterrupt, match=name), terminating():
        signal.raise_signal(number)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_in_the_middle_of_a_save_the_old_checkpoint_stays(launch, monkeypatch):
    assert launch("run", "--steps=4") == 0
    before = Path("run/checkpoints/last.pt").read_bytes()
    save = torch.save

    def interrupted(checkpoint: dict, file) -> None:
        if "optimizer" not in checkpoint:
            return save(checkpoint, file)
        file.write(before[:1_000_000])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    assert launch("run", "--steps=8") == 130
    assert Path("run/checkpoints/last.pt").read_bytes() == before
    assert not list(Path("run").rglob("*.tmp"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_terminal_that_is_gone_keeps_no_run_from_saving(start, tmp_path):
    """Its end is a SIGHUP, and nothing can be said any more."""
    # Also where the tests run under nohup.
    heard = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    program = (
        f"{heard}; import os, sys; os.dup2(os.open('/dev/full', os.O_WRONLY), 2); os.dup2(2, 1); "
        f"{MAIN}"
    )
    process = start("-c", program, steps=100_000, rows=5)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 143
    assert load_checkpoint(tmp_path / "run/checkpoints/last.pt")["step"] >= 5


@posix
def test_nohup_keeps_the_run_at_work(tmp_path, text_file):
    flags = [
        *TINY_FLAGS,
        f"--input_file={text_file}",
        "--out_dir=run",
        "--steps=60",
        "--save_every=30",
    ]
    command = ["nohup", sys.executable, ROOT / "train.py", *flags]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        process.send_signal(signal.SIGHUP) if (tmp_path / "run/logs").exists() else None
        time.sleep(0.2)
    assert process.returncode == 0


def test_a_run_interrupted_before_its_first_step_leaves_no_trace_in_the_way(launch, monkeypatch):
    """Again and again: nothing is moved aside."""
    enter = Interruption.__enter__

    def at_once(interruption):
        enter(interruption)
        interruption.signal_name = "SIGTERM"
        return interruption

    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "__enter__", at_once)
        assert [launch("run") for _ in range(3)] == [143] * 3
    assert launch("run") == 0 and not list(Path("run").glob("earlier-*"))


def test_the_sample_after_the_save_can_be_left_out(launch, before_step, monkeypatch):
    def second(*_arguments):
        time.sleep(1.1)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train.Trainer, "sample", second)
    before_step({3: lambda: signal.raise_signal(signal.SIGINT)})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert launch("run", "--sample_every=100") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    log = log_text(Path("run"))
    assert "Interrupted by SIGINT after step 3. To continue: " in log and "Broken off" not in log
    assert load_checkpoint(Path("run/checkpoints/last.pt"))["step"] == 3
    assert (
        json.loads(Path("run/results.json").read_text(encoding="utf-8"))["stop_reason"]
        == "interrupted"
    )
