"""One run directory, one trainer at a time."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import KILLS, ROOT, TINY_FLAGS, run_script

import train
from parts.run.checkpoint import load_checkpoint
from parts.run.directory import RunDir

pytestmark = KILLS


@pytest.fixture
def running(tmp_path, text_file):
    """A trainer at work in tmp_path/run."""
    command = [
        sys.executable,
        ROOT / "train.py",
        *TINY_FLAGS,
        f"--input_file={text_file}",
        "--out_dir=run",
    ]
    process = subprocess.Popen(
        [*command, "--steps=100000"], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (tmp_path / "run/checkpoints/prev.pt").exists():
        time.sleep(0.05)
    yield process
    process.kill()
    process.wait()


def test_the_second_is_refused_with_the_pid_of_the_first(
    running, tmp_path, text_file, monkeypatch, capsys
):
    """Also one that would start anew, and one that would find nothing to do."""
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--resume=never"], ["--steps=1"], ["--seed=7"]):
        assert train.main([*TINY_FLAGS, f"--input_file={text_file}", "--out_dir=run", *flags]) == 2
        out, error = capsys.readouterr()
        assert f"--out_dir run is in use by another train.py (pid {running.pid} on " in error
        assert error.count("\n") == 1 and out == ""
    assert running.poll() is None


def test_the_lock_of_a_dead_process_stops_nobody(running, tmp_path, text_file, monkeypatch):
    running.kill()
    running.wait()
    monkeypatch.chdir(tmp_path)
    assert (tmp_path / "run/run.lock").read_text(encoding="utf-8").startswith(f"{running.pid} on ")
    step = load_checkpoint(tmp_path / "run/checkpoints/last.pt")["step"] + 4
    assert (
        train.main([*TINY_FLAGS, f"--input_file={text_file}", "--out_dir=run", f"--steps={step}"])
        == 0
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no folder that is in use")
@pytest.mark.parametrize("finished", [True, False], ids=["a finished run", "a run at work"])
def test_a_run_whose_place_was_taken_does_not_write_there(
    launch, monkeypatch, text_file, prompt_disk, capsys, finished
):
    """Somebody removes the directory of a run at work and starts another in its place: the run
    ends at its next save."""
    update, others = train.Trainer.update, []
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *TINY_FLAGS,
        f"--input_file={text_file}",
        "--out_dir=run",
    ]

    def taken(trainer: train.Trainer):
        if trainer.progress.step == 5 and not others:
            shutil.rmtree("run")
            others.append(
                subprocess.Popen([*command, "--seed=7", f"--steps={8 if finished else 10**6}"])
            )
            while others[0].poll() is None and (
                finished or not Path("run/checkpoints/prev.pt").exists()
            ):
                time.sleep(0.05)
            if not finished:
                others[0].send_signal(signal.SIGSTOP)
                os.waitpid(others[0].pid, os.WUNTRACED)  # all its threads stand still now
            others.append(files("run"))
        return update(trainer)

    monkeypatch.setattr(train.Trainer, "update", taken)
    try:
        assert launch("run", "--steps=20") == 1
        assert " step 8/20 " in (out := capsys.readouterr().out) and " step 10/20 " not in out
        assert files("run") == others[1]
    finally:
        others[0].kill()
        others[0].wait()


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no folder that is in use")
def test_a_directory_made_again_is_locked_again(
    launch, monkeypatch, tmp_path, text_file, prompt_disk
):
    update, answers = train.Trainer.update, []

    def removed(trainer: train.Trainer):
        if trainer.progress.step == 5:
            shutil.rmtree("run")
        if trainer.progress.step == 10:
            answers.append(
                run_script(*TINY_FLAGS, f"--input_file={text_file}", "--out_dir=run", cwd=tmp_path)
            )
        return update(trainer)

    monkeypatch.setattr(train.Trainer, "update", removed)
    assert launch("run", "--steps=12") == 0
    assert (
        answers[0].returncode == 2
        and f"in use by another train.py (pid {os.getpid()} on" in answers[0].stderr
    )


def files(folder: str) -> dict[Path, bytes]:
    """All files below the folder."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_refused_command_changes_nothing(launch, tmp_path):
    assert launch("run", "--steps=4") == 0
    run = RunDir(Path("run"))
    with run.locked():
        before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
        assert launch("run", "--steps=8") == 2
        assert before == {
            path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()
        }
    assert launch("run", "--steps=8") == 0
    assert json.loads(Path("run/results.json").read_text(encoding="utf-8"))["final_step"] == 8
