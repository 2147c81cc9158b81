"""SIGKILL at any instant: there is always a whole checkpoint, and the run ends as if nothing had
been."""

import os
import time
from pathlib import Path

import pytest
import torch
from conftest import assert_same_run

from benchmarks import torture
from parts.run.checkpoint import load_checkpoint
from parts.run.directory import RunDir, replacing, temporary


@pytest.mark.slow
@pytest.mark.xdist_group("kills")
def test_torture(tmp_path):
    """The benchmark in short."""
    arguments = torture.Arguments(kills=4, steps=120, work=tmp_path)
    trainer = torture.OurTrainer(arguments)
    startup_sec, write_sec = torture.undisturbed(trainer, tmp_path / "whole")
    tally = torture.torture(arguments, trainer, startup_sec, write_sec)
    assert tally.kills == 4 and tally.resumed >= 1 and tally.inside_a_write >= 1, (
        "more on an idle machine"
    )
    assert tally.inside_the_first_save + tally.in_the_last_sample >= 1, "both on an idle machine"
    assert tally.checkpoints_lost == tally.lost_runs == 0, tally.complaints
    # Those since the save and those during its writing, which takes long on a busy machine.
    assert tally.steps_repeated_at_most <= 4 * arguments.save_every
    assert not any(torture.differences(tmp_path / "whole", tmp_path / "killed").values())
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_the_torture_notices(tmp_path, launch):
    """A lost row, a doubled row, another weight and a leftover are each found."""
    for name in ("whole", "killed"):
        assert launch(name, "--steps=4") == 0
    assert not any(torture.differences(Path("whole"), Path("killed")).values())
    metrics = Path("killed/logs/train_metrics.csv")
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    metrics.write_text("".join([lines[0], lines[2], *lines[2:]]), encoding="utf-8")
    checkpoint = load_checkpoint(Path("killed/checkpoints/last.pt"))
    checkpoint["model"]["ln_f.bias"][3] += 1e-6
    torch.save(checkpoint, "killed/checkpoints/last.pt")
    Path("killed/checkpoints/last.pt.tmp").touch()
    found = {
        name: value
        for name, value in torture.differences(Path("whole"), Path("killed")).items()
        if value
    }
    assert found == {
        "rows lost": 1,
        "rows doubled": 1,
        "rows that differ": 1,
        "weights of last.pt that differ": 1,
        "leftovers": ["last.pt.tmp"],
    }


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="a process that dies at a chosen system call needs fork"
)
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links, as on FAT"])
def test_death_at_every_system_call_of_a_save(tmp_path, links):
    """Each time there is a whole last.pt (without links a whole prev.pt at least), and the next
    save works."""
    last, prev = tmp_path / "last.pt", tmp_path / "prev.pt"
    for deadly in range(1, 20):
        for path in tmp_path.iterdir():
            path.unlink()
        prev.write_bytes(b"first")
        last.write_bytes(b"second")
        child = os.fork()
        if child == 0:
            die_at(deadly, links)
            with replacing(last, prev) as file:
                file.write(b"third")
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        whole = {path.name: path.read_bytes() for path in (last, prev) if path.exists()}
        assert set(whole.values()) <= {b"first", b"second", b"third"}
        if links:
            assert "last.pt" in whole
        assert {b"second", b"third"} & set(whole.values()), "the newest there was is never lost"
        if not died:
            assert whole == {"last.pt": b"third", "prev.pt": b"second"}
            break
        with replacing(last, prev) as file:
            file.write(b"fourth")
        assert last.read_bytes() == b"fourth" and prev.read_bytes() in (
            b"first",
            b"second",
            b"third",
        )
    assert deadly >= 5


def die_at(number: int, links: bool) -> None:
    """Kill this process in front of its `number`-th system call that changes a file."""
    calls = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == number:
                os._exit(9)
            return function(*arguments, **options)

        return call

    def no_links(*_arguments):
        raise OSError(95, "Operation not supported")

    os.link = counted(os.link) if links else no_links
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


def test_what_a_kill_left_half_written_is_cleaned_up(launch):
    assert launch("run", "--steps=4") == 0
    run = RunDir(Path("run"))
    leftovers = [temporary(path) for path in run.files]
    for path in leftovers:
        path.write_bytes(b"half")
    assert launch("run") == 0
    assert not list(Path("run").rglob("*.tmp"))


@pytest.mark.parametrize("held", [2, 99])
def test_a_file_that_another_program_holds(launch, monkeypatch, held):
    """As under Windows: the rename is refused for a while, or for good."""
    replace, sleeps, refusals = os.replace, [], []

    def refused(source, target):
        if Path(target).name == "last.pt" and len(refusals) < held:
            refusals.append(target)
            raise PermissionError(
                13, "The process cannot access the file because it is being used", str(target)
            )
        return replace(source, target)

    assert launch("run", "--steps=4") == 0
    before = Path("run/checkpoints/last.pt").read_bytes()
    monkeypatch.setattr(os, "replace", refused)
    monkeypatch.setattr(time, "sleep", sleeps.append)
    assert launch("run", "--steps=8") == (0 if held == 2 else 1)
    assert (Path("run/checkpoints/last.pt").read_bytes() == before) is (held == 99)
    assert 0.1 < sum(sleeps) < 8 and not list(Path("run").rglob("*.tmp"))
