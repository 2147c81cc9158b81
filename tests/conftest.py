"""Shared by all tests: the project's folder on the path, small settings, real text."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # other programs may be busy on this machine
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

TINY_MODEL = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, seq_len=16, batch_size=2)
TINY_FLAGS = [
    *(f"--{name}={value}" for name, value in TINY_MODEL.items()),
    *("--log_every=2", "--save_every=4", "--sample_every=4", "--target_window=3", "--max_new_tokens=8", "--steps=8"),
    *("--target_loss=0", "--device=cpu"),
]


@pytest.fixture
def config() -> train.Config:
    """A model small enough for a test, everything decided, fp32 on the CPU."""
    return replace(
        train.Config(**TINY_MODEL), steps=8, device="cpu", amp="off", compile="off", threads=2, target_window=3
    ).resolved()


@pytest.fixture(scope="session")
def tokenizer():
    return train.load_tokenizer()


@pytest.fixture
def text_file(tmp_path) -> Path:
    """A few hundred tokens of English with line ends, digits and punctuation."""
    path = tmp_path / "input.txt"
    lines = [
        f"Line {i}: the {'quick brown fox'[: i % 16]} jumps over {i * 7919 % 1000} lazy dogs.\n" for i in range(60)
    ]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return path


@pytest.fixture(scope="session")
def tiny_shakespeare() -> Path:
    """The published file, where somebody has put it."""
    places = [ROOT / "data" / "input.txt", ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"]
    for path in places:
        if path.is_file() and path.stat().st_size == 1_115_394:
            return path
    pytest.skip("Tiny Shakespeare is neither at data/input.txt nor at ../shared/data/tinyshakespeare.txt")


def run_script(*arguments: object, cwd: Path, script: str = "train.py") -> subprocess.CompletedProcess:
    """Run one of the project's scripts as its user would, from another directory."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=400)
