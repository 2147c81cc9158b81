"""benchmarks/throughput.py holds what memory allows, and says what it left out."""

import os
import subprocess
import sys

import pytest

from benchmarks import throughput

pytestmark = pytest.mark.slow


@pytest.fixture
def options(text_file):
    return throughput.Options(
        preset="demo",
        batch_size=1,
        seq_len=16,
        grad_accum=1,
        rounds=2,
        warm_up=1,
        device="cpu",
        input_file=text_file,
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows tells Python no peak of memory")
def test_programs_that_do_not_fit_are_left_out_and_named(options, monkeypatch):
    free = iter([10**6, 100])
    monkeypatch.setattr(throughput, "available_mb", lambda: next(free, 100))
    found, left_out = throughput.measure(options, ["products", "train.py, eager"])
    assert list(found) == ["products"] and len(found["products"]["seconds"]) == 2
    assert found["products"]["peak_mb"] > 100
    assert list(left_out) == ["train.py, eager"] and left_out["train.py, eager"].startswith(
        "0.1 GB of memory are left"
    )


def test_a_program_that_fails_costs_only_itself(options):
    found, left_out = throughput.measure(options, ["nanoGPT", "products"])  # without its checkout
    assert list(found) == ["products"] and left_out == {"nanoGPT": "exit code 1, see above"}


@pytest.mark.skipif(os.name == "nt", reason="there a kill has no exit code of its own")
def test_a_program_that_is_killed_is_told_apart():
    program = "import os; os.kill(os.getpid(), 9)"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    server = subprocess.Popen([sys.executable, "-c", program], **pipes)
    with pytest.raises(ChildProcessError, match="killed, probably for want of memory"):
        throughput.ask(server)
