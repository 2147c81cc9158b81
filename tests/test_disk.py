"""A disk that is full, read-only or gone costs no run: the old files stay, the new ones follow when
they can."""

import errno
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import GPT2, ROOT, TINY_FLAGS, assert_same_run, log_text, rows

from parts.flags import Config
from parts.run import directory
from parts.run.checkpoint import load_checkpoint
from parts.run.directory import RunDir, replacing, temporary
from parts.run.layout import STATE_BYTES, WEIGHT_BYTES

FLAGS = [*TINY_FLAGS, "--log_every=1", "--threads=1", "--amp=off", "--steps=32"]
removes_what_is_in_use = pytest.mark.skipif(
    os.name == "nt", reason="Windows removes no folder that is in use"
)


def test_too_little_room_is_refused_before_training(small_disk, launch, capsys):
    disk = small_disk(40, "tmpfs")
    assert launch(f"{disk}/run", *FLAGS, GPT2) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(
        r"train\.py: error: --out_dir \S+run: checkpoints need 0\.07 GB more \(last, prev and "
        r"one being written: "
        r"0\.02 GB each, best: 0\.01 GB\), and that disk has 0\.04 GB: free 0\.02 GB on it or "
        r"choose another "
        r"--out_dir\n",
        error,
    )
    assert list(disk.iterdir()) == []


@pytest.mark.slow
def test_the_estimate_is_what_a_run_takes(launch):
    assert launch("run", GPT2, "--amp=fp16") == 0
    config = Config.from_dict(load_checkpoint(Path("run/checkpoints/last.pt"))["config"])
    for name, per_parameter in (("last", 12), ("prev", 12), ("best", 4)):
        size = Path(f"run/checkpoints/{name}.pt").stat().st_size
        assert size == pytest.approx(per_parameter * config.n_params, rel=0.01)


def test_resuming_counts_what_it_will_replace(launch, monkeypatch):
    """Beside last, prev and best there has to be room for one more checkpoint only."""
    assert launch("run", GPT2, "--steps=8") == 0
    run = RunDir(Path("run"))
    config = Config.from_dict(load_checkpoint(run.last)["config"])
    monkeypatch.setattr(run, "free_bytes", lambda: 13 * config.n_params)
    room = (STATE_BYTES * config.n_params, WEIGHT_BYTES * config.n_params)
    run.check_room(*room, fresh=False)
    with pytest.raises(OSError, match="checkpoints need"):
        run.check_room(*room, fresh=True)
    monkeypatch.setattr(run, "free_bytes", lambda: 11 * config.n_params)
    with pytest.raises(OSError, match="checkpoints need"):
        run.check_room(*room, fresh=False)


@pytest.mark.slow
def test_a_disk_that_fills_up_and_is_cleared(small_disk, before_step, launch, plots):
    """No file is lost: the plot, too, is there in the end."""
    disk = small_disk(90, "tmpfs")
    filler = disk / "filler"

    def fill() -> None:
        with open(filler, "wb", buffering=0) as file:
            while file.write(b"x" * 4096) == 4096:
                pass

    def fill_up() -> None:
        with pytest.raises(OSError, match="No space left"):
            fill()

    flags = [*FLAGS, "--save_every=8"]
    assert launch("whole", *flags) == 0
    before_step({10: fill_up, 22: filler.unlink})
    assert launch(str(disk / "run"), *flags) == 0
    log = log_text(disk / "run")
    assert log.count("| ERROR |") == 1 and log.count("Could not write") == 1, "reported once"
    assert re.search(
        r"Could not write .*No space left on device.* \(0\.\d\d GB free\)\. Training goes on", log
    )
    assert_same_run(Path("whole"), disk / "run")
    assert (disk / "run/logs/loss_curve.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_disk_that_stays_full(small_disk, before_step, launch, prompt_disk):
    """The run ends with exit code 1 and the old checkpoint; with room again, the same command goes
    on from there."""
    disk = small_disk(90, "tmpfs")
    filler, flags = disk / "filler", [*FLAGS, GPT2]
    assert launch("whole", *flags) == 0
    before_step({10: lambda: filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - 5_000_000))})
    assert launch(str(disk / "run"), *flags) == 1
    assert load_checkpoint(disk / "run/checkpoints/last.pt")["step"] == 8
    assert "At the end, step 32, these could not be written: " in log_text(disk / "run")
    assert "Training complete" not in log_text(disk / "run")
    filler.unlink()
    assert launch(str(disk / "run"), *flags) == 0
    assert_same_run(Path("whole"), disk / "run")


@pytest.mark.slow
@pytest.mark.xdist_group("kills")
def test_a_disk_that_turns_read_only(small_disk, tmp_path, text_file, launch):
    """As ext4 does after an error of the disk."""
    disk = small_disk(150, "ext4")
    flags = [
        *FLAGS,
        "--steps=150",
        "--save_every=10",
        f"--input_file={text_file}",
        f"--out_dir={disk}/run",
    ]
    command = [sys.executable, ROOT / "train.py", *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
    process = subprocess.Popen(command, **pipes)
    prev, deadline = disk / "run/checkpoints/prev.pt", time.monotonic() + 60
    while time.monotonic() < deadline and not prev.exists():
        time.sleep(0.02)
    subprocess.run(["mount", "-o", "remount,abort", disk], capture_output=True)
    output = process.communicate(timeout=100)[0]
    if "Read-only file system" not in output:
        pytest.skip("this kernel does not let go of the disk")
    assert process.returncode == 1 and "Traceback" not in output
    assert "these could not be written" in output
    assert output.count("Could not write") <= 2, "a sync that failed, and then what is read-only"
    step = load_checkpoint(disk / "run/checkpoints/last.pt")["step"]
    assert 10 <= load_checkpoint(prev)["step"] <= step < 150, (
        "one file, if it was between two renames"
    )


def test_a_disk_that_does_not_tell_its_room_is_no_full_one(launch, monkeypatch, capsys):
    """As some mounts: a total of 0 bytes, or no answer at all."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: (0, 0, 0))
    assert launch("run", "--dry_run") == 0
    assert "; an unknown number of GB are free\n" in capsys.readouterr().out

    def refuse(_path):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(shutil, "disk_usage", refuse)
    assert launch("run", "--steps=2", "--num_prompts=0") == 0


def test_only_of_a_full_disk_the_room_is_told(tmp_path, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr("parts.run.directory.log.error", told.append)
    run = RunDir(tmp_path)
    run.note("the plot", OSError("ValueError: Key backend"))
    run.note("last.pt", OSError(28, "No space left on device"))
    assert told[0].startswith("Could not write the plot: ValueError: Key backend. Training goes on")
    assert " GB free). Training goes on" in told[1]


def test_at_the_end_what_is_there_is_named(launch):
    run = RunDir(Path("run"))
    assert launch("run", "--steps=2") == 0
    assert f"| INFO | See {run.samples_txt}\n" in log_text(run.root), "and no plot"


def test_each_cause_is_told_once(tmp_path, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr("parts.run.directory.log.error", told.append)
    run = RunDir(tmp_path)
    full, no_owner = (
        OSError(28, "No space left on device"),
        OSError("run was taken over by another train.py"),
    )
    for what, error in (
        ("the plot", OSError("ParseError: $")),
        ("last.pt", full),
        ("best.pt", full),
        ("lines", no_owner),
        ("best.pt", no_owner),
        ("last.pt", None),
        ("best.pt", None),
        ("last.pt", full),
    ):
        with run.attempt(what):
            if error is not None:
                raise error
    causes = [
        "the plot: ParseError",
        "last.pt: [Errno 28]",
        "lines: run was taken over",
        "last.pt: [Errno 28]",
    ]
    assert len(told) == len(causes)
    for message, cause in zip(told, causes, strict=True):
        assert message.startswith(f"Could not write {cause}")


@pytest.mark.slow
@removes_what_is_in_use
def test_a_directory_that_is_removed_during_the_run(before_step, launch, prompt_disk):
    assert launch("whole", *FLAGS) == 0
    before_step({10: lambda: shutil.rmtree("run")})
    assert launch("run", *FLAGS) == 0
    assert log_text(Path("run")).count("Could not write") == 1
    assert rows(Path("run")) == rows(Path("whole"))[9:], "the rows from there on, below a header"
    last, whole = (load_checkpoint(Path(name) / "checkpoints/last.pt") for name in ("run", "whole"))
    assert all(torch.equal(last["model"][key], value) for key, value in whole["model"].items())
    assert (Path("run") / "checkpoints/prev.pt").exists() and (Path("run") / "config.json").exists()


@pytest.mark.slow
@removes_what_is_in_use
def test_the_place_of_a_directory_is_not_made_again(before_step, launch, prompt_disk):
    """A disk that was unplugged must not get a double in the folder it was mounted on."""
    before_step({10: lambda: shutil.rmtree("mounted")})
    assert launch("mounted/run", *FLAGS) == 1
    assert not Path("mounted").exists()


@pytest.mark.slow
def test_a_csv_that_another_program_keeps(before_step, launch, prompt_disk, monkeypatch):
    """As Excel does under Windows, where others may read it then: checkpoints go on, and its rows
    wait, in the checkpoint too."""
    append, kept = directory.append_whole, []

    def refuse(path: Path, data: bytes) -> None:
        if path.name in kept:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        append(path, data)

    def keep() -> None:
        kept.append("train_metrics.csv")

    monkeypatch.setattr(directory, "append_whole", refuse)
    assert launch("whole", *FLAGS) == 0
    before_step({10: keep, 21: kept.clear})
    assert launch("run", *FLAGS) == 0
    assert log_text(Path("run")).count("Could not write lines of ") == 1
    assert_same_run(Path("whole"), Path("run"))

    shutil.rmtree("run")
    before_step({10: keep})
    assert launch("run", *FLAGS) == 1, "not all of it could be written"
    assert load_checkpoint(Path("run/checkpoints/last.pt"))["step"] == 32
    assert [row[0] for row in rows(Path("run"), "step")][-1] == "9"
    kept.clear()
    assert launch("run", *FLAGS) == 0, "and the rows are there after the next start"
    assert_same_run(Path("whole"), Path("run"))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="RLIMIT_FSIZE is POSIX")
def test_a_limit_on_the_size_of_files(launch, tmp_path, text_file):
    flags = [*TINY_FLAGS, GPT2, "--input_file", text_file, "--out_dir", "run", "--amp=off"]
    assert launch("run", GPT2, "--amp=off", "--steps=4") == 0
    before = (tmp_path / "run/checkpoints/last.pt").read_bytes()
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)); "
        f"sys.path.insert(0, {str(ROOT)!r}); import train; sys.exit(train.main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 1 and result.stderr == ""
    assert (
        result.stdout.count("File too large") == 1
        and "no file is left half written" in result.stdout
    )
    assert (tmp_path / "run/checkpoints/last.pt").read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_a_full_disk_with_a_run_on_it_is_refused_with_numbers(small_disk, launch, capsys):
    disk = small_disk(90, "tmpfs")
    assert launch(str(disk / "run"), *FLAGS, GPT2, "--steps=8") == 0
    (disk / "filler").write_bytes(b"x" * (shutil.disk_usage(disk).free - 4096))
    with open(disk / "rest", "wb", buffering=0) as file, pytest.raises(OSError):
        while file.write(b"x" * 4096) == 4096:
            pass
    assert launch(str(disk / "run"), *FLAGS, GPT2) == 2
    assert re.search(
        r"checkpoints need 0\.02 GB more .* and that disk has 0\.00 GB", capsys.readouterr().err
    )


def test_room_is_that_where_the_checkpoints_go(small_disk, launch):
    """A link from the run directory to a larger, or smaller, disk."""
    disk = small_disk(4, "tmpfs")
    Path("run").mkdir()
    Path("run/checkpoints").symlink_to(disk, target_is_directory=True)
    assert launch("run", *FLAGS, GPT2) == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fsync of folders")
def test_a_rename_is_brought_to_the_disk(tmp_path, monkeypatch):
    """First the contents, then the rename, then the folder that holds the name: else a power cut
    may undo it."""
    done, fsync, replace_file = [], os.fsync, os.replace

    def recorded_fsync(number: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "contents")
        fsync(number)

    def recorded_replace(*paths) -> None:
        done.append("rename")
        replace_file(*paths)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    with replacing(tmp_path / "file") as file:
        file.write(b"whole")
    assert done == ["contents", "rename", "folder"] and (tmp_path / "file").read_bytes() == b"whole"


@pytest.mark.slow
def test_programs_that_write_one_file_do_not_share_a_temporary_one(tmp_path):
    path, other = (
        tmp_path / "plot.png",
        "from parts.run.directory import temporary; from pathlib import Path; ",
    )
    program = other + f"print(temporary(Path({str(path)!r}), shared=True))"
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    ).stdout.strip()
    assert Path(found).parent == tmp_path and Path(found) != temporary(path, shared=True)
    Path(found).write_bytes(b"left by a kill")
    run = RunDir(tmp_path)
    run.files.append(path)
    run.clean()
    assert not Path(found).exists()
