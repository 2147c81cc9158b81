"""What TensorBoard shows is the run: each row and each sample once, whatever broke it off."""

import csv
import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, TINY_FLAGS, log_text

from parts.flags import Config
from parts.report.tensorboard import GROUPS
from parts.run.checkpoint import load_checkpoint
from parts.run.layout import METRICS

needs_tensorboard = pytest.mark.skipif(
    find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
FLAGS = ["--lr=0.01", "--decay_steps=10", "--warmup_steps=2", "--amp=off"]
ON = [*FLAGS, "--tensorboard"]
SAMPLES = "samples/text_summary"


def events(run: str) -> list:
    """Every event in the files of a run, as they stand there."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    files = sorted(Path(run, "tensorboard").iterdir())
    return [event for path in files for event in LegacyEventFileLoader(str(path)).Load()]


def told(run: str) -> dict[str, dict[int, object]]:
    """What they say: steps and values of each tag; no step of a tag is told twice."""
    found: dict[str, dict[int, object]] = {}
    for event in events(run):
        for value in event.summary.value:
            steps = found.setdefault(value.tag, {})
            assert event.step not in steps, (value.tag, event.step)
            text = b"".join(value.tensor.string_val).decode()
            steps[event.step] = text if value.HasField("tensor") else value.simple_value
    return found


def columns(run: str) -> dict[str, dict[int, float]]:
    """The same of the CSV, a tag for each column."""
    with open(Path(run, "logs/train_metrics.csv"), encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    names = [name for name in METRICS if name != "step" and any(row[name] for row in table)]
    tags = {name: f"{GROUPS.get(name, 'loss')}/{name}" for name in names}
    return {
        tags[name]: {int(row["step"]): float(row[name]) for row in table if row[name]}
        for name in names
    }


def assert_the_whole_run_is_shown(run: str) -> None:
    """All of CSV and samples, and nothing else but flags and results."""
    found, expected = told(run), columns(run)
    for name, steps in expected.items():
        assert found.pop(name) == pytest.approx(steps, rel=1e-6), name
    blocks = Path(run, "samples/samples.txt").read_bytes().decode().split("=" * 80 + "\nSTEP ")[1:]
    code = {
        int(step): "\n" + block
        for step, _, block in (block.strip("\n").partition("\n\n") for block in blocks)
    }
    assert found.pop(SAMPLES) == {
        step: block.replace("\n", "\n    ")[1:] for step, block in code.items()
    }
    assert all(tag.startswith(("_hparams_/", "results/")) for tag in found), found.keys()


def die() -> None:
    """As after SIGKILL: nothing is saved."""
    raise KeyboardInterrupt


@needs_tensorboard
def test_a_run_is_shown_row_by_row_with_samples_flags_and_results(launch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    assert launch("run", *ON, "--val_fraction=0.2", "--eval_every=4") == 0
    assert_the_whole_run_is_shown("run")
    reader = EventAccumulator("run/tensorboard").Reload()
    for name, steps in columns("run").items():
        assert {one.step: one.value for one in reader.Scalars(name)} == pytest.approx(
            steps, rel=1e-6
        )
    losses = {
        "loss/loss",
        "loss/window_loss",
        "loss/val_loss",
    }  # the first group, which is open when the page opens
    others = {"optimizer/lr", "optimizer/grad_norm", "speed/tokens_per_sec"}
    assert losses | others <= set(reader.Tags()["scalars"]) and min(
        reader.Tags()["scalars"]
    ).startswith("loss/")

    results = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    found = told("run")
    for name in ("best_loss", "corpus_loss", "perplexity", "val_loss"):
        assert found[f"results/{name}"] == {8: pytest.approx(results[name], rel=1e-6)}
    contents = {
        value.tag: value.metadata.plugin_data.content
        for event in events("run")
        for value in event.summary.value
    }
    flags = metadata.parse_session_start_info_plugin_data(
        contents["_hparams_/session_start_info"]
    ).hparams
    config = Config.from_dict(load_checkpoint(Path("run/checkpoints/last.pt"))["config"])
    assert (
        flags["lr"].number_value == config.lr == 0.01 and flags["optimizer"].string_value == "muon"
    )
    assert flags["input_file"].string_value == config.input_file[0].as_posix()
    experiment = metadata.parse_experiment_plugin_data(contents["_hparams_/experiment"])
    assert "results/best_loss" in {info.name.tag for info in experiment.metric_infos}
    assert not [path for path in Path("run/tensorboard").iterdir() if path.is_dir()], (
        "one run, not two"
    )


@needs_tensorboard
@pytest.mark.slow
def test_a_run_broken_off_again_and_again_shows_what_the_whole_run_shows(
    launch, prompt_disk, before_step
):
    assert launch("whole", *ON, "--steps=10") == 0
    before_step({3: lambda: signal.raise_signal(signal.SIGTERM), 6: die, 9: die})
    assert [launch("parts", *ON, "--steps=10") for _ in range(4)] == [143, 130, 130, 0]
    assert_the_whole_run_is_shown("parts")
    whole, parts = told("whole"), told("parts")
    assert {tag: list(steps) for tag, steps in parts.items()} == {
        tag: list(steps) for tag, steps in whole.items()
    }
    for tag in whole.keys() - {
        "speed/tokens_per_sec",
        "speed/elapsed_sec",
        "_hparams_/session_start_info",
    }:
        assert parts[tag] == whole[tag], tag


@needs_tensorboard
@pytest.mark.slow
def test_an_interrupted_run_has_its_results_so_far_at_hand(launch, before_step):
    before_step({6: lambda: signal.raise_signal(signal.SIGTERM)})
    assert launch("run", *ON) == 143
    found = told("run")
    assert list(found["results/best_loss"]) == [6] and "_hparams_/session_end_info" not in found
    assert launch("run", *ON) == 0
    assert list(told("run")["results/best_loss"]) == [8]


@needs_tensorboard
@pytest.mark.slow
@pytest.mark.xdist_group("kills")
def test_a_killed_run_loses_nothing(launch, tmp_path, text_file):
    flags = [
        *TINY_FLAGS,
        *ON,
        f"--input_file={text_file}",
        "--out_dir=run",
        "--steps=100000",
        "--log_every=1",
    ]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *flags], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    metrics, last = tmp_path / "run/logs/train_metrics.csv", tmp_path / "run/checkpoints/last.pt"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (
        last.exists() and metrics.read_bytes().count(b"\n") > 12
    ):
        time.sleep(0.02)
    process.kill()
    process.wait()
    rows = set(columns("run")["loss/loss"])
    assert len(rows) >= 12 and len(rows ^ set(told("run")["loss/loss"])) <= 1, (
        "the row of the last instant"
    )
    step = load_checkpoint(last)["step"]
    assert launch("run", *ON, "--log_every=1", f"--steps={step + 3}") == 0
    assert_the_whole_run_is_shown("run")
    assert list(told("run")["loss/loss"]) == list(range(1, step + 4))


@needs_tensorboard
@pytest.mark.slow
def test_turned_on_and_off_at_any_time(launch, capsys):
    assert launch("run", *FLAGS, "--steps=4") == 0
    assert not Path("run/tensorboard").exists()
    assert launch("run", *ON, "--steps=6") == 0
    assert_the_whole_run_is_shown("run")
    times = {event.step: event.wall_time for event in events("run") if event.summary.value[:1]}
    elapsed = columns("run")["speed/elapsed_sec"]
    assert times[4] - times[1] == pytest.approx(elapsed[4] - elapsed[1], abs=1e-3), (
        "the relative axis is right"
    )
    assert launch("run", *FLAGS, "--steps=8") == 0
    assert events("run") == [], "rather than a run that seems to have ended at step 6"
    capsys.readouterr()
    assert launch("run", *ON, "--steps=8") == 0 and "Already finished" in capsys.readouterr().out
    assert_the_whole_run_is_shown("run")
    assert list(told("run")["results/best_loss"]) == [8]


@pytest.mark.parametrize("hidden", ["tensorboard", "protobuf"])
def test_without_the_package_the_run_goes_on(launch, monkeypatch, hidden):
    """Neither where it is missing nor where what it needs is."""
    package = {"tensorboard": "tensorboard", "protobuf": "google.protobuf"}[hidden]
    loaded = [
        name
        for name in sys.modules
        if name.startswith((package, "tensorboard", "torch.utils.tensorboard"))
    ]
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert launch("run", *ON, "--steps=4") == 0
    warnings = [line for line in log_text(Path("run")).splitlines() if "WARNING" in line]
    assert len(warnings) == 1 and "pip install tensorboard" in warnings[0]
    assert not Path("run/tensorboard").exists()


@needs_tensorboard
@pytest.mark.slow
def test_a_fresh_start_leaves_the_old_events_to_the_old_run(launch):
    assert launch("run", *ON, "--steps=4") == 0
    old = told("run")
    assert launch("run", *ON, "--steps=2", "--resume=never", "--seed=2") == 0
    assert told("run/earlier-1") == old
    assert_the_whole_run_is_shown("run")
    assert list(told("run")["loss/loss"]) == [1, 2]
    assert launch("run", *FLAGS, "--steps=2", "--resume=never") == 0
    assert list(told("run/earlier-2")["loss/loss"]) == [1, 2] and events("run") == []


@pytest.mark.slow
def test_events_of_other_programs_are_left_alone(launch):
    foreign = Path("run/tensorboard/events.out.tfevents.1795295316.host.4711.0")
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"of another program")
    assert launch("run", *FLAGS, "--steps=2") == 0
    assert launch("run", *ON, "--steps=2", "--resume=never") == 0
    assert foreign.read_bytes() == b"of another program"


@needs_tensorboard
@pytest.mark.slow
def test_a_tensorboard_that_is_open_shows_no_step_twice(launch, prompt_disk, before_step):
    """TensorBoard's own reader, which keeps what it has read and looks for more."""
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

    reader, name = EventMultiplexer(), str(Path("run/tensorboard"))

    def seen() -> list[int]:
        reader.AddRunsFromDirectory(".")
        reader.Reload()
        return [one.step for one in reader.Tensors(name, "loss/loss")]

    before_step({4: lambda: looked.append(seen()), 7: die})
    looked: list[list[int]] = []
    assert launch("run", *ON, "--log_every=1") == 130
    assert looked == [[1, 2, 3]], "each row at once"
    assert seen() == [1, 2, 3, 4, 5, 6]
    assert launch("run", *ON, "--log_every=1") == 0
    assert seen() == list(range(1, 9))
    assert [one.step for one in reader.Tensors(name, SAMPLES)] == [2, 4, 8]
    assert launch("run", *ON, "--steps=2", "--resume=never") == 0
    assert seen() == [1, 2]


@needs_tensorboard
@pytest.mark.slow
@pytest.mark.parametrize("for_good", [False, True])
def test_a_place_that_cannot_be_written_costs_the_run_nothing(launch, before_step, for_good):
    folder, aside = Path("run/tensorboard"), Path("run/aside")

    def take_away() -> None:
        folder.rename(aside)
        folder.write_text("in the way", encoding="utf-8")

    def give_back() -> None:
        folder.unlink()
        aside.rename(folder)

    before_step({3: take_away} | ({} if for_good else {6: give_back}))
    assert launch("run", *ON) == 0
    log = log_text(Path("run"))
    assert log.count("Could not write TensorBoard's events") == log.count("ERROR") == 1
    assert "Training complete." in log and list(columns("run")["loss/loss"]) == [1, 2, 4, 6, 8]
    if for_good:
        give_back()
        assert launch("run", *ON, "--steps=9") == 0
    assert_the_whole_run_is_shown("run")
