"""Training does not wait for the disk, and what is written is the state of the step it is said to
be of."""

import json
import time
from pathlib import Path

import pytest
import torch
from conftest import GPT2, assert_same_run, log_text, unequal

import train
import update_readme
from parts.run.background import Snapshot
from parts.run.checkpoint import load_checkpoint, write_checkpoint


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_written(launch, monkeypatch):
    """And one save at a time: those that fall due meanwhile come when it is done."""
    write, update, spans, steps = write_checkpoint, train.Trainer.update, [], []

    def slow(path: Path, checkpoint: dict, previous: Path | None = None) -> None:
        began, deadline = len(steps), time.monotonic() + 20
        first = path.name == "last.pt" and all(name != path.name for name, *_ in spans)
        time.sleep(0.3)
        while first and len(steps) == began and time.monotonic() < deadline:
            time.sleep(0.01)  # a busy machine
        write(path, checkpoint, previous)
        spans.append((path.name, checkpoint["step"], began, len(steps)))

    monkeypatch.setattr(train, "write_checkpoint", slow)
    monkeypatch.setattr(
        train.Trainer, "update", lambda trainer: (steps.append(1), update(trainer))[1]
    )
    assert launch("run", "--steps=60", "--save_every=5", "--num_prompts=0") == 0
    first = next(span for span in spans if span[0] == "last.pt")
    assert first[1] == 5 and first[3] > first[2], "steps went by while it was written"
    *saved, at_end = [step for name, step, _, _ in spans if name == "last.pt"]
    assert saved == sorted(set(saved)) and saved[-1] == at_end == 60 and len(saved) < 12
    assert load_checkpoint(Path("run/checkpoints/last.pt"))["step"] == 60
    prev = load_checkpoint(Path("run/checkpoints/prev.pt"))
    assert prev["step"] == saved[-2]
    assert (
        launch(
            "short",
            f"--steps={prev['step']}",
            "--decay_steps=60",
            "--warmup_steps=2",
            "--num_prompts=0",
        )
        == 0
    )
    expected = load_checkpoint(Path("short/checkpoints/last.pt"))
    assert unequal(expected["model"], prev["model"]) == [], (
        "the last save did not reach into the one before"
    )


@pytest.mark.slow
def test_a_checkpoint_holds_its_own_step_however_late_it_is_written(launch, monkeypatch):
    """The same bits as one that was written at once, though the weights have moved on since."""
    assert launch("at_once", "--steps=4") == 0
    write = write_checkpoint

    def late(path: Path, checkpoint: dict, previous: Path | None = None) -> None:
        time.sleep(0.5)
        write(path, checkpoint, previous)
        if path.name == "last.pt" and checkpoint["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "write_checkpoint", late)
    assert launch("late", "--steps=5000", "--decay_steps=4", "--warmup_steps=0") == 130
    expected, found = (
        load_checkpoint(Path(run) / "checkpoints/last.pt") for run in ("at_once", "late")
    )
    assert found["step"] == 4 and all(
        torch.equal(found["model"][key], x) for key, x in expected["model"].items()
    )


def test_last_is_not_written_before_its_best(launch, monkeypatch):
    """A best that the disk refuses keeps last.pt back; both come at the next save."""
    write, refusals, order = write_checkpoint, [], []

    def refusing(path: Path, checkpoint: dict, previous: Path | None = None) -> None:
        if path.name == "best.pt" and not refusals:
            refusals.append(path)
            raise OSError(28, "No space left on device", str(path))
        order.append((path.name, checkpoint["step"]))
        write(path, checkpoint, previous)

    monkeypatch.setattr(train, "write_checkpoint", refusing)
    assert launch("run", "--steps=9", "--save_every=3") == 0
    assert order[0][0] == "best.pt" and order[1][0] == "last.pt" and order[1][1] > 3
    assert log_text(Path("run")).count("Could not write") == 1


def test_snapshots_are_copies_in_memory_allocated_once():
    snapshot = Snapshot()
    values = {"model": {"a": torch.ones(3), "b": torch.zeros(2, 2)}, "step": 7, "list": [1, 2]}
    first = snapshot.take(values)
    addresses = [tensor.data_ptr() for tensor in first["model"].values()]
    values["model"]["a"].fill_(5)
    assert (
        first["model"]["a"].tolist() == [1, 1, 1] and first["step"] == 7 and first["list"] == [1, 2]
    )
    second = snapshot.take(values)
    assert [tensor.data_ptr() for tensor in second["model"].values()] == addresses
    assert second["model"]["a"].tolist() == [5, 5, 5]


def no_memory(_snapshot, values: torch.Tensor) -> torch.Tensor:
    raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: {values.nbytes} bytes")


def no_thread(_thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("lacking", ["copies", "threads"])
def test_without_memory_for_copies_or_threads_training_waits(launch, monkeypatch, lacking):
    assert launch("whole") == 0
    if lacking == "copies":
        monkeypatch.setattr(Snapshot, "_buffer", no_memory)
    else:
        monkeypatch.setattr("threading.Thread.start", no_thread)
    assert launch("run") == 0
    assert_same_run(Path("whole"), Path("run"))
    said = "WARNING | No memory for a copy: training waits for saves (DefaultCPUAllocator: can't"
    assert (said in log_text(Path("run"))) == (lacking == "copies")


def test_a_best_that_was_neither_copied_nor_written_is_none(launch, monkeypatch):
    """Its weights have changed since: the next lower loss is the best that is known."""
    write, refused = write_checkpoint, []

    def refusing(path: Path, checkpoint: dict, previous: Path | None = None) -> None:
        if path.name == "best.pt" and not refused:
            refused.append(checkpoint["step"])
            raise OSError(28, "No space left on device", str(path))
        write(path, checkpoint, previous)

    monkeypatch.setattr(train, "write_checkpoint", refusing)
    monkeypatch.setattr(Snapshot, "_buffer", no_memory)
    assert launch("run", "--steps=9", "--target_window=3", "--save_every=100") == 0
    assert refused == [3]
    best = load_checkpoint(Path("run/checkpoints/best.pt"))
    results = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    assert results["best_step"] == best["step"] > 3 and results["best_loss"] == best["loss"]


@pytest.mark.cuda
def test_on_cuda_a_snapshot_is_that_of_its_step(launch):
    assert launch("run", GPT2, "--device=cuda", "--steps=4") == 0
    assert (
        launch("longer", GPT2, "--device=cuda", "--steps=8", "--decay_steps=4", "--warmup_steps=0")
        == 0
    )
    short, longer = (
        load_checkpoint(Path(name))
        for name in ("run/checkpoints/last.pt", "longer/checkpoints/prev.pt")
    )
    assert longer["step"] == 4
    torch.testing.assert_close(short["model"], longer["model"])


@pytest.mark.parametrize(
    ("redraw_sec", "expected"), [(0, [1, 2, 3, 4, 5, 6, 7, 8, 8, 8]), (10**6, [8])]
)
def test_results_and_plot_of_a_run_that_goes_on_are_there_before_its_first_save(
    launch, prompt_disk, monkeypatch, redraw_sec, expected
):
    drawn = []

    def draw(out_dir: Path) -> None:
        drawn.append(
            json.loads((out_dir / "results.json").read_text(encoding="utf-8"))["final_step"]
        )

    monkeypatch.setattr(update_readme, "draw_loss_curve", draw)
    monkeypatch.setattr(train, "REDRAW_SEC", redraw_sec)
    assert launch("run", "--save_every=100") == 0
    assert drawn == expected
