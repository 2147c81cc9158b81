"""What takes long ticks at a terminal, and leaves one line in the log."""

import io
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from conftest import log_text
from tqdm import tqdm

import train
from parts.progress import Progress
from parts.report import words
from parts.report.steplog import BAR
from parts.run import screen as waiting
from parts.text.vocabulary import train_vocabulary


class Terminal(io.StringIO):
    """Stands in for a terminal; keeps all that was drawn."""

    def isatty(self) -> bool:
        return True


def no_thread(_thread) -> None:
    raise RuntimeError("can't start new thread")


def at_terminal(monkeypatch, tick_sec: float = 0.02) -> Terminal:
    """From here on stderr is a terminal. No fixture: pytest changes stderr before the test's
    body."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(waiting, "TICK_SEC", tick_sec)
    return shown


def test_what_takes_long_ticks_while_nothing_else_happens(monkeypatch):
    terminal = at_terminal(monkeypatch)
    times = iter(range(1000))
    monkeypatch.setattr(tqdm, "format_interval", staticmethod(lambda _seconds: f"{next(times)} s"))
    with waiting.waiting("Compiling"):
        time.sleep(0.5)
    ticks = re.findall(r"Compiling \.\.\. (\d+) s", terminal.getvalue())
    assert len(set(ticks)) >= 3, terminal.getvalue()
    assert terminal.getvalue().endswith("\r"), "the line is removed"
    assert terminal.getvalue().rpartition("Compiling")[2].count(" ") > 10


def test_what_is_over_at_once_shows_nothing(monkeypatch):
    terminal = at_terminal(monkeypatch, tick_sec=60.0)
    with waiting.waiting("Sampling"):
        pass
    with waiting.waiting("Measuring", total=3, unit="slices") as bar:
        bar.update()
    assert terminal.getvalue() == ""


def test_what_is_done_is_counted(monkeypatch):
    terminal = at_terminal(monkeypatch)
    with waiting.waiting("Measuring", total=4, unit="slices") as bar:
        bar.update(3)
        time.sleep(0.3)
    assert "3/4 slices [" in terminal.getvalue()


def test_an_error_ends_the_ticking(monkeypatch):
    terminal = at_terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt), waiting.waiting("Compiling"):
        time.sleep(0.1)
        raise KeyboardInterrupt
    ended = terminal.getvalue()
    time.sleep(0.1)
    assert terminal.getvalue() == ended


def test_without_a_terminal_nothing_is_shown(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(waiting, "TICK_SEC", 0.01)
    with waiting.waiting("Compiling"):
        time.sleep(0.05)
    with waiting.waiting("Measuring", total=3) as bar:
        bar.update()
    assert stderr.getvalue() == ""


def test_without_memory_for_a_thread_nothing_ticks(monkeypatch):
    terminal = at_terminal(monkeypatch)
    monkeypatch.setattr("threading.Thread.start", no_thread)
    with waiting.waiting("Compiling"):
        pass
    assert terminal.getvalue() == ""


def test_of_several_processes_one_ticks(monkeypatch):
    terminal = at_terminal(monkeypatch)
    with waiting.waiting("Compiling", shown=False):
        time.sleep(0.1)
    assert terminal.getvalue() == ""


@pytest.mark.slow
def test_every_wait_of_a_run_ticks_and_the_log_has_a_line_of_each(launch, monkeypatch, capsys):
    terminal = at_terminal(monkeypatch)
    for name in ("update", "sample", "validate"):
        work = getattr(train.Trainer, name)

        def slowly(trainer, *arguments, work=work):
            time.sleep(0.1)
            return work(trainer, *arguments)

        monkeypatch.setattr(train.Trainer, name, slowly)

    def compile_slowly(trainer):
        time.sleep(0.1)
        return trainer.model

    monkeypatch.setattr(train.Trainer, "_compiled_model", compile_slowly)
    slices = train.GPT.features

    def features(model, *arguments):
        time.sleep(0.01)
        return slices(model, *arguments)

    monkeypatch.setattr(train.GPT, "features", features)
    assert launch("run", "--compile=on", "--val_fraction=0.2", "--eval_every=4") == 0
    shown, log = terminal.getvalue(), log_text(Path("run"))
    for what in ("Compiling ... ", "Measuring the loss: ", "Sampling ... "):
        assert what in shown, shown
    assert "Sampling ..." not in log and "Measuring the loss" not in log
    assert log.count("Compiling; that may take one to four minutes ...\n") == 1
    assert log.count("Measuring the corpus loss on at most 64 random slices ...\n") == 1
    assert launch("dry", "--dry_run") == 0
    assert "Measuring two steps:" in terminal.getvalue()
    assert capsys.readouterr().out.count("Measuring two steps ...\n") == 1


@pytest.mark.slow
def test_the_bar_shows_the_estimate_of_the_log_and_no_other(launch, monkeypatch):
    terminal = at_terminal(monkeypatch)
    assert launch("run", "--steps=4", "--target_loss=0") == 0
    shown = terminal.getvalue()
    assert re.search(r"1/4 steps \[\d\d:\d\d, loss \d\.\d{4}, [\d,]+ tok/s\]", shown), (
        "none before the second step"
    )
    assert re.search(r"2/4 steps \[\d\d:\d\d, loss \d\.\d{4}, [\d,]+ tok/s, ETA 0:00:00\]", shown)
    assert "s/step" not in shown and "step/s" not in shown
    assert "{remaining}" not in BAR and "{rate" not in BAR
    assert words.bar_text(1.5, 2000.4, None) == "loss 1.5000, 2,000 tok/s"
    assert words.bar_text(1.5, 2000.4, 3723.2) == "loss 1.5000, 2,000 tok/s, ETA 1:02:03"


def test_learning_a_vocabulary_ticks_also_after_the_reading(tmp_path, monkeypatch):
    terminal = at_terminal(monkeypatch)
    text = tmp_path / "text.txt"
    text.write_text("some words of a text\n" * 50, encoding="utf-8")
    drawn = []
    learn = tokenizers.Tokenizer.train_from_iterator

    def slowly(tokenizer, *arguments):
        learn(tokenizer, *arguments)
        drawn.append(len(terminal.getvalue()))
        time.sleep(0.3)
        drawn.append(len(terminal.getvalue()))

    monkeypatch.setattr(tokenizers.Tokenizer, "train_from_iterator", slowly)
    train_vocabulary((text,), 260)
    assert drawn[0] < drawn[1]


def test_how_long_is_said_where_it_is_long(config):
    quick = Progress(tokens=10**6, elapsed_sec=100.0)
    slow = Progress(tokens=10**6, elapsed_sec=10_000.0)
    config = replace(config, seq_len=128)
    assert (
        words.measuring_line(1024, config, quick)
        == "Measuring the corpus loss on at most 1,024 random slices ..."
    )
    assert ", about 0:07:17 ..." in words.measuring_line(1024, config, slow)
    assert words.rehearsing_line(config) == "Measuring two steps ..."
    large = replace(config, n_embd=768, n_layer=12, n_head=12, block_size=1024)
    assert words.rehearsing_line(large) == (
        "Measuring two steps; with 124M parameters a CPU may take minutes for them ..."
    )
