"""The program that proves the rest on a card: what it says without one, and that one check never
ends the others."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from benchmarks import accept_gpu
from benchmarks.gpu.common import CHECKS, LeftOut, Options


def accept(*flags: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "accept_gpu.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_card_it_says_so(tmp_path):
    result = accept("--part", "speed", cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == "" and not list(tmp_path.iterdir())
    assert (
        result.stderr
        == "accept_gpu.py: error: PyTorch sees no CUDA device: there is nothing to prove here\n"
    )


@pytest.mark.slow
def test_a_line_and_a_record_for_each_check(tmp_path, text_file):
    flags = ["--part=numerics", "--only=what auto", "--device=cpu", "--record=record.json"]
    result = accept(*flags, f"--input_file={text_file}", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    line = re.fullmatch(r"passed +\d+ s  (.*?): (device \w+ \(.*)", result.stdout.splitlines()[0])
    (row,) = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["rows"]
    assert (
        line.groups() == ("what auto chooses for the default run", row["figure"])
        and row["outcome"] == "passed"
    )
    assert "; amp " in row["figure"] and "; micro_batch " in row["figure"]


@pytest.mark.parametrize(
    ("error", "outcome", "figure"),
    [
        (AssertionError("0.3, at most 0.1"), "FAILED", "AssertionError: 0.3, at most 0.1"),
        (SystemExit(3), "FAILED", "SystemExit: 3"),
        (LeftOut("needs a card"), "left out", "needs a card"),
    ],
)
def test_whatever_becomes_of_a_check_is_its_answer(monkeypatch, tmp_path, error, outcome, figure):
    def fail(options: Options, here: Path) -> str:
        raise error

    monkeypatch.setitem(CHECKS["speed"], "fails", (fail, 1))
    assert accept_gpu.one_check("fails", Options("speed"), tmp_path) == {
        "outcome": outcome,
        "figure": figure,
    }


@pytest.mark.slow
def test_a_name_that_is_none(tmp_path):
    result = accept(
        "--part=numerics",
        "--only=no such check",
        "--device=cpu",
        f"--input_file={__file__}",
        cwd=tmp_path,
    )
    assert (
        result.returncode == 2
        and "--only no such check: no check of this part has that name" in result.stderr
    )


@pytest.mark.slow
def test_a_check_that_hangs_is_ended(tmp_path):
    found = accept_gpu.in_a_process_of_its_own(
        "what auto chooses", Options("numerics"), tmp_path / "x", 0.2
    )
    assert found == {"outcome": "FAILED", "figure": "not done within 0 s"}
