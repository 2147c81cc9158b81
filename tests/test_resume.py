"""A run that was broken off, however often, and started again is the run that would have been."""

import json
import os
import re
import shutil
import signal
import typing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import GPT2, assert_same_run, log_text, rows, unequal, weights

import train
import update_readme
from parts.compute.signals import Interruption
from parts.flags import Config
from parts.run.checkpoint import SavedRun, load_checkpoint
from parts.run.layout import AT_CTRL_C, drawn_at_ctrl_c, sample_block, sample_blocks
from parts.text.corpus import load_corpus
from parts.text.vocabulary import load_tokenizer

OPTIMIZERS = typing.get_args(typing.get_type_hints(Config)["optimizer"])


@pytest.fixture
def break_off(monkeypatch):
    """Make runs stop dead in the middle of these steps, each once, with nothing saved."""
    update, pending = train.Trainer.update, []

    def dying(trainer: train.Trainer):
        step = trainer.progress.step + 1
        if step in pending:
            pending.remove(step)
            trainer.accumulate(step, trainer.slices(step), trainer.forward)
            raise KeyboardInterrupt
        return update(trainer)

    monkeypatch.setattr(train.Trainer, "update", dying)
    return pending.extend


CASES = [  # with muon, embeddings and vectors have AdamW's states beside Muon's
    "--optimizer=muon --amp=off --seq_len=16 --batch_size=4 --mixed_steps=7",
    "--optimizer=muon --amp=bf16 --grad_accum=2 --dropout=0.2",
    "--optimizer=muon --amp=fp16",
    "--optimizer=adamw --amp=off --dropout=0.3",
]


def test_every_optimizer_is_broken_off():
    assert {case.split()[0].partition("=")[2] for case in CASES} == set(OPTIMIZERS)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_broken_off_anywhere_and_started_again(launch, prompt_disk, break_off, case):
    flags = [*case.split(), "--lr=0.01", "--steps=10", "--save_every=3", "--target_window=2"]
    assert launch("whole", *flags) == 0
    break_off([1, 3, 4, 5, 8, 10])
    codes = [launch("parts", *flags) for _ in range(7)]
    assert codes == [130] * 6 + [0]
    assert_same_run(Path("whole"), Path("parts"))
    log = log_text(Path("parts"))
    assert [log.count(f"Resuming from step {step} ") for step in (0, 3, 6, 9)] == [0, 2, 1, 1]
    launches = json.loads(Path("parts/config.json").read_text(encoding="utf-8"))["launches"]
    assert [launch["first_step"] for launch in launches] == [1, 4, 4, 7, 10]


@pytest.mark.slow
def test_a_compiled_run_broken_off_and_started_again(launch, compiler, prompt_disk, break_off):
    flags = [
        "--compile=on",
        "--amp=bf16",
        "--dropout=0.1",
        "--lr=0.01",
        "--save_every=3",
        "--target_window=2",
    ]
    flags += ["--n_layer=1"]  # half the time of the compiler
    assert launch("whole", *flags) == 0
    break_off([5])
    assert [launch("parts", *flags) for _ in range(2)] == [130, 0]
    assert_same_run(Path("whole"), Path("parts"))
    log = log_text(Path("parts"))
    assert log.count("Compiled in") == 2 and log.count("Resuming from step 3 ") == 1


@pytest.mark.cuda
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_on_cuda_in_deterministic_mode(launch, prompt_disk, break_off, amp):
    flags = [
        GPT2,
        "--device=cuda",
        f"--amp={amp}",
        "--deterministic",
        "--lr=0.01",
        "--save_every=3",
        "--dropout=0.1",
    ]
    assert launch("whole", *flags) == 0
    break_off([3, 5])
    assert [launch("parts", *flags) for _ in range(3)] == [130, 130, 0]
    assert_same_run(Path("whole"), Path("parts"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "killed_in", [(train.Trainer, "measure_corpus_loss"), (train.Saver, "publish")]
)
def test_a_run_killed_between_its_last_step_and_its_results(launch, monkeypatch, killed_in):
    """Its samples must not be drawn twice, whatever step it ended at."""
    flags = ["--steps=7", "--sample_every=4"]
    assert launch("whole", *flags) == 0

    def killed(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*killed_in, killed)
        assert launch("parts", *flags) == 130
    assert launch("parts", *flags) == 0
    assert_same_run(Path("whole"), Path("parts"))


def test_a_sample_drawn_at_ctrl_c_stays_and_nothing_else_differs(launch, prompt_disk, before_step):
    """Before any other sample, behind some, and when the start after it is killed before it has
    saved."""

    def ctrl_c() -> None:
        signal.raise_signal(signal.SIGINT)

    def die() -> None:
        raise KeyboardInterrupt

    assert launch("whole", "--steps=12", "--sample_every=6") == 0
    before_step({2: ctrl_c, 7: ctrl_c, 9: die})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        codes = [launch("parts", "--steps=12", "--sample_every=6") for _ in range(4)]
    finally:
        signal.signal(signal.SIGINT, before)
    assert codes == [130, 130, 130, 0]
    path = Path("parts/samples/samples.txt")
    assert re.findall("STEP (.+)", path.read_text(encoding="utf-8")) == [
        "2 (at Ctrl-C)",
        "3",
        "6",
        "7 (at Ctrl-C)",
        "12",
    ]
    assert len(sample_blocks(path.read_text(encoding="utf-8"))) == 5
    ours = r"={80}\nSTEP \d+ \(at Ctrl-C\)\n(?:(?!={80}\n).*\n)*"
    path.write_bytes(re.sub(ours.encode(), b"", path.read_bytes()))
    assert_same_run(Path("whole"), Path("parts"))


def test_ctrl_c_before_the_first_step_of_a_start_draws_nothing_twice(
    launch, before_step, monkeypatch
):
    before_step({3: lambda: signal.raise_signal(signal.SIGINT)})
    enter = Interruption.__enter__

    def at_once(interruption):
        enter(interruption)
        interruption.signal_name = "SIGINT"
        return interruption

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert launch("run") == 130
        with monkeypatch.context() as patch:
            patch.setattr(Interruption, "__enter__", at_once)
            assert [launch("run") for _ in range(2)] == [130, 130]
    finally:
        signal.signal(signal.SIGINT, before)
    assert re.findall("STEP (.+)", Path("run/samples/samples.txt").read_text(encoding="utf-8")) == [
        "2",
        "3 (at Ctrl-C)",
    ]


def test_every_reader_of_samples_reads_what_ctrl_c_had_drawn():
    blocks = [
        sample_block(8, "one", ["one two"]),
        sample_block(12, "one", ["one three"], AT_CTRL_C),
    ]
    assert sample_blocks("".join(map(str, blocks))) == blocks
    assert blocks[1].texts == "PROMPT:\none\nOUTPUT:\none three\n\n"
    shown = update_readme.samples_section(SimpleNamespace(samples=blocks), Path("README.md"))
    assert "STEP 12 (at Ctrl-C)" in shown
    assert "STEP 8" not in shown


def test_only_a_whole_block_drawn_at_ctrl_c_is_kept():
    def data(*block) -> bytes:
        return str(sample_block(*block)).encode()

    ours = data(12, "one", ["one two", "one\n\nthree"], AT_CTRL_C)
    later = data(16, "one", ["one two"])
    assert drawn_at_ctrl_c(ours) == drawn_at_ctrl_c(ours + later) == ours
    assert drawn_at_ctrl_c(ours + data(13, "one", ["one"], AT_CTRL_C)) == ours
    for other in (b"", later, later + ours, ours[:-1], ours[:-4], ours[:90], ours[1:]):
        assert drawn_at_ctrl_c(other) == b""


def test_resuming_needs_no_second_copy_of_the_state(launch, config, text_file):
    assert launch("run", "--steps=4") == 0
    path = Path("run/checkpoints/last.pt")
    saved = SavedRun(path, load_checkpoint(path))
    corpus = load_corpus(replace(saved.config, input_file=(text_file,)), load_tokenizer())
    train.Trainer(saved.config, corpus, saved)
    assert not any(isinstance(value, torch.Tensor) for value in leaves(saved.facts))
    with pytest.raises(KeyError, match="model"):
        saved.take_tensors()


def test_a_checkpoint_with_the_earlier_name_of_a_count_goes_on(launch):
    flags = ["--val_fraction=0.2", "--eval_every=2", "--patience=100"]
    assert launch("run", "--steps=4", *flags) == 0
    path = Path("run/checkpoints/last.pt")
    checkpoint = torch.load(path, weights_only=True)
    count = checkpoint["progress"].pop("validations_since_best")
    checkpoint["progress"]["measured_in_vain"] = count
    torch.save(checkpoint, path)
    assert load_checkpoint(path)["progress"]["validations_since_best"] == count
    assert launch("run", "--steps=6", *flags) == 0


def leaves(tree) -> list:
    if isinstance(tree, dict):
        tree = list(tree.values())
    return (
        [leaf for branch in tree for leaf in leaves(branch)] if isinstance(tree, list) else [tree]
    )


@pytest.mark.slow
def test_resuming_cuts_rows_and_samples_behind_the_checkpoint(launch, prompt_disk):
    """As after a kill at step 8 that left the checkpoint of step 4."""
    flags = ["--decay_steps=8", "--warmup_steps=2"]
    assert launch("whole", *flags) == 0
    assert launch("cut", *flags) == 0
    checkpoints = Path("cut/checkpoints")
    os.replace(checkpoints / "prev.pt", checkpoints / "last.pt")
    with open("cut/logs/train_metrics.csv", "a", encoding="utf-8") as file:
        file.write("9,1.2")  # a row that the power cut tore
    Path("cut/results.json").unlink()
    assert launch("cut", *flags) == 0
    assert_same_run(Path("whole"), Path("cut"))


@pytest.mark.slow
def test_another_cut_into_micro_batches_gives_the_same_run_to_rounding(launch):
    flags = ["--decay_steps=8", "--warmup_steps=2", "--mixed_steps=0", "--amp=off"]
    assert launch("whole", *flags, "--batch_size=4") == 0
    assert launch("parts", *flags, "--batch_size=4", "--steps=4") == 0
    assert launch("parts", *flags, "--batch_size=1", "--grad_accum=4", "--micro_batch=1") == 0
    assert "--batch_size 4 -> 1, --grad_accum 1 -> 4, --micro_batch 4 -> 1" in log_text(
        Path("parts")
    )
    expected, found = rows(Path("whole"), "loss"), rows(Path("parts"), "loss")
    assert [float(x[0]) for x in found] == pytest.approx([float(x[0]) for x in expected], abs=1e-4)


def test_automatic_choices_are_kept(launch, monkeypatch):
    assert launch("run", "--steps=4", "--amp=auto") == 0
    first = torch.load("run/checkpoints/last.pt", weights_only=True)["config"]["amp"]
    monkeypatch.setattr(
        "parts.compute.device.choose_amp", lambda _device: ("fp16", "another machine")
    )
    assert launch("run", "--amp=auto") == 0
    assert (
        torch.load("run/checkpoints/last.pt", weights_only=True)["config"]["amp"] == first != "fp16"
    )
    assert f"amp {first} (as in the run so far)" in log_text(Path("run"))


def test_resume_never_keeps_the_old_run(launch):
    assert launch("run", "--steps=4") == 0
    before = Path("run/checkpoints/last.pt").read_bytes()
    assert launch("run", "--steps=4", "--resume=never", "--seed=2") == 0
    assert Path("run/earlier-1/checkpoints/last.pt").read_bytes() == before
    assert Path("run/checkpoints/last.pt").read_bytes() != before
    assert [row[0] for row in rows(Path("run"), "step")] == ["1", "2", "4"]


def test_more_steps_stretch_the_schedule_unless_it_was_typed(launch):
    """With a rate of 0 there would be nothing to learn in them."""
    assert launch("run", "--steps=4", "--lr=0.01") == 0
    assert launch("run", "--steps=8") == 0
    rates = dict(rows(Path("run"), "step", "lr"))
    assert float(rates["4"]) == float(rates["8"]) == 0 and float(rates["6"]) == pytest.approx(
        0.01 * 0.5 * (1 - 0.5**0.5)
    )
    assert "The learning rate rises here, from 0.00e+00 to 3.09e-03" in log_text(Path("run"))
    assert launch("typed", "--steps=4", "--lr=0.01", "--decay_steps=4") == 0
    assert launch("typed", "--steps=8") == 0
    assert [float(rate) for _, rate in rows(Path("typed"), "step", "lr")][-2:] == [0, 0]
    assert "The learning rate is 0 from step 4 on, and nothing is learned" in log_text(
        Path("typed")
    )


@pytest.mark.parametrize(
    ("begun", "continued"),
    [
        (["--decay_steps=4"], ["--warmup_steps=5"]),
        (["--decay_steps=8", "--warmup_steps=5"], ["--decay_steps=4"]),
    ],
)
def test_what_is_kept_must_go_with_what_is_given(launch, capsys, begun, continued):
    """Or its checkpoints would hold flags that no start accepts."""
    assert launch("run", "--steps=4", *begun) == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert launch("run", "--steps=12", *continued) == 2
    said = capsys.readouterr().err
    assert "--warmup_steps 5 exceeds --decay_steps 4" in said
    assert "(flags you leave out keep the values of the existing run)" in said
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    assert launch("run", "--steps=12", "--warmup_steps=2", "--decay_steps=12") == 0


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_no_run_is_overwritten_by_a_fresh_one(launch, resume):
    """Also what is left of it: here, as in a clone that has no checkpoints."""
    assert launch("run", "--steps=4") == 0
    shutil.rmtree("run/checkpoints")
    if resume == "never":
        Path("run/config.json").unlink()
        Path("run/results.json").unlink()
    kept = Path("run/samples/samples.txt").read_bytes()
    assert launch("run", "--steps=2", f"--resume={resume}") == 0
    assert Path("run/earlier-1/samples/samples.txt").read_bytes() == kept
    assert [row[0] for row in rows(Path("run"), "step")] == ["1", "2"]


@pytest.mark.slow
def test_resume_from_a_path_into_another_directory(launch):
    assert launch("one", "--steps=4") == 0
    assert launch("two", "--resume", "one/checkpoints/last.pt") == 0
    assert [row[0] for row in rows(Path("two"), "step")] == ["6", "8"]
    assert [row[0] for row in rows(Path("one"), "step")] == ["1", "2", "4"]
    assert Path("two/checkpoints/best.pt").exists(), (
        "its own best: the other run keeps the one it had"
    )
    again = ("--resume", "one/checkpoints/last.pt", "--steps=12")
    assert launch("two", *again) == 0, "the same command goes on with the run it began"
    assert [row[0] for row in rows(Path("two"), "step")] == ["6", "8", "10", "12"]


def test_a_checkpoint_of_pytorchs_muon_goes_on(launch, monkeypatch):
    """Up to November 2026 `torch.optim.Muon` was the optimizer; its state is a part of ours."""

    def pytorchs(matrices, dtype, **rest):
        return torch.optim.Muon(matrices, **rest, adjust_lr_fn="match_rms_adamw")

    with monkeypatch.context() as patch:
        patch.setattr(train, "Muon", pytorchs)
        assert launch("run", "--optimizer=muon", "--steps=4", "--decay_steps=8") == 0
    state = torch.load("run/checkpoints/last.pt", weights_only=True)["optimizer"]["muon"]
    assert {key for one in state.values() for key in one} == {"momentum_buffer"}
    assert launch("run", "--optimizer=muon", "--decay_steps=8") == 0
    assert [row[0] for row in rows(Path("run"), "step")] == ["1", "2", "4", "6", "8"]
    state = torch.load("run/checkpoints/last.pt", weights_only=True)["optimizer"]["muon"]
    assert {key for one in state.values() for key in one} == {"momentum_buffer", "row_mean_square"}


def test_flags_that_an_older_checkpoint_does_not_know_are_named(launch):
    assert launch("run", "--steps=4", "--decay_steps=8") == 0
    last = Path("run/checkpoints/last.pt")
    checkpoint = torch.load(last, weights_only=True)
    del checkpoint["config"]["schedule"]
    torch.save(checkpoint, last)
    assert launch("run", "--decay_steps=8") == 0
    assert "--schedule 'unknown' -> " in log_text(Path("run"))


def test_a_shortened_csv_is_cut_at_a_line_and_said(launch):
    assert launch("run", "--steps=4", "--decay_steps=8") == 0
    csv_file = Path("run/logs/train_metrics.csv")
    csv_file.write_bytes(csv_file.read_bytes()[:-20])
    assert launch("run", "--decay_steps=8") == 0
    assert [row[0] for row in rows(Path("run"), "step")] == ["1", "2", "6", "8"]


@pytest.mark.slow
def test_damaged_json_of_a_run_stops_nobody(launch):
    assert launch("run", "--steps=4") == 0
    Path("run/config.json").write_text('{"launches": 5}', encoding="utf-8")
    Path("run/results.json").write_text("[", encoding="utf-8")
    assert launch("run") == 0
    Path("run/config.json").write_text('{"config": []}', encoding="utf-8")
    assert launch("run", "--resume=elsewhere/last.pt") == 2
    assert launch("run", "--steps=10") == 0
    assert len(json.loads(Path("run/config.json").read_text(encoding="utf-8"))["launches"]) == 1


def test_a_best_of_another_window_is_not_compared(launch):
    assert launch("run", "--lr=1e-6", "--target_window=1", "--steps=4") == 0
    assert launch("run", "--lr=1e-6", "--target_window=4", "--steps=8") == 0
    results = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    assert results["best_step"] == 8 and results["best_loss"] == results["window_loss"]


def test_a_csv_with_other_line_ends_is_cut_at_a_line_and_said(launch):
    """Excel, an editor or git may rewrite them."""
    assert launch("run", "--steps=4", "--decay_steps=8") == 0
    csv_file = Path("run/logs/train_metrics.csv")
    csv_file.write_bytes(csv_file.read_bytes().replace(b"\n", b"\r\n"))
    assert launch("run", "--decay_steps=8") == 0
    assert "train_metrics.csv is not as the run left it" in log_text(Path("run"))
    assert [row[0] for row in rows(Path("run"), "step")] == ["1", "2", "6", "8"]


@pytest.mark.slow
def test_a_foreign_checkpoint_empties_no_directory(launch):
    for name in ("one", "two"):
        assert launch(name, "--steps=4") == 0
    shutil.rmtree("two/checkpoints")
    kept = Path("two/samples/samples.txt").read_bytes()
    assert launch("two", "--resume", "one/checkpoints/last.pt") == 0
    assert Path("two/earlier-1/samples/samples.txt").read_bytes() == kept


@pytest.mark.slow
def test_a_missing_best_is_made_again(launch):
    assert launch("run", "--steps=6", "--lr=1e-8", "--min_lr=0") == 0
    Path("run/checkpoints/best.pt").unlink()
    assert launch("run", "--steps=9", "--lr=1e-8", "--min_lr=0") == 0
    results = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    assert load_checkpoint(Path("run/checkpoints/best.pt"))["step"] == results["best_step"] == 9
    assert "best.pt is missing" in log_text(Path("run"))


def test_resume_never_does_not_promise_that_it_continues(launch, break_off, prompt_disk, capsys):
    break_off([3])
    assert launch("run", "--resume=never") == 130
    said = capsys.readouterr().out
    (command,) = re.findall(
        r"Broken off; what was saved before is whole\. To start again: (.+)", said
    )
    assert command.startswith("python train.py --n_layer=2 ")
    assert " --out_dir run " in command and command.endswith(" --resume auto")
    break_off([6])
    assert launch("run", "--resume=never") == 130
    assert (
        "To continue from the last checkpoint: python train.py --out_dir run\n"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "killed_after", ["logs", "samples", "config.json", "results.json", "checkpoints"]
)
def test_moving_a_run_aside_loses_nothing_when_it_is_killed(launch, monkeypatch, killed_after):
    assert launch("run", "--steps=4") == 0
    rewritten = (
        "run.lock",
        "run.pid",
        "last.pt",
    )  # the last by a start that takes the run up again
    before = [
        path.read_bytes()
        for path in Path("run").rglob("*.*")
        if path.is_file() and path.name not in rewritten
    ]
    trained = weights(Path("run/checkpoints/last.pt"))
    rename = os.replace

    def dying(source, target):
        rename(source, target)
        if Path(source).name == killed_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        assert launch("run", "--steps=4", "--resume=never") == 130
    launch("run", "--steps=4")
    after = [path.read_bytes() for path in Path("run").rglob("*.*") if path.is_file()]
    assert all(content in after for content in before if not content.startswith(b"{"))
    assert not all(unequal(trained, weights(path)) for path in Path("run").rglob("last.pt"))
