"""Shared by all tests: the project's folder on the path, small settings, real text."""

import csv
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Read when PyTorch is loaded: the tests' own workers share the cores, and other programs may be
# busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
if os.name == "nt":
    # What the programs say into a pipe is read as UTF-8; else they would use a code page.
    os.environ.setdefault("PYTHONIOENCODING", "utf-8")
    if sys.prefix != sys.base_prefix:
        # The python.exe of a virtual environment starts another process, which has another number
        # and outlives it for a moment. Started like this, as multiprocessing does, there is one.
        os.environ["__PYVENV_LAUNCHER__"] = sys.executable
        sys.executable = sys._base_executable

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
import update_readme  # noqa: E402
from parts.flags import Config  # noqa: E402
from parts.recipe import decide  # noqa: E402
from parts.run.background import Task, Writer  # noqa: E402
from parts.run.layout import METRICS  # noqa: E402
from parts.text import corpus  # noqa: E402
from parts.text.vocabulary import load_tokenizer  # noqa: E402

TINY_MODEL = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, seq_len=16, batch_size=2)
# Tokens are bytes: a run then takes a third of the time that it takes with the vocabulary of GPT-2.
# What is about that vocabulary, or needs files that are not tiny, adds `GPT2`.
TINY_FLAGS = [
    *(f"--{name}={value}" for name, value in TINY_MODEL.items()),
    *(
        "--log_every=2",
        "--save_every=4",
        "--sample_every=4",
        "--target_window=3",
        "--max_new_tokens=8",
        "--steps=8",
    ),
    *("--target_loss=0", "--device=cpu", "--tokenizer=bpe:257"),
]
GPT2 = "--tokenizer=gpt2"


def train_on_lines(folder: Path, *flags: str) -> Path:
    """A run in folder/run, which has learned some of folder/text.txt in 60 steps."""
    text = folder / "text.txt"
    lines = [
        f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs, é.\n" for i in range(200)
    ]
    text.write_text("".join(lines), encoding="utf-8", newline="\n")
    places = [f"--input_file={text}", f"--out_dir={folder / 'run'}"]
    places.append(f"--cache_dir={folder / 'cache'}")
    lengths = ["--steps=60", "--save_every=60", "--sample_every=60"]
    assert train.main([*TINY_FLAGS, *places, *lengths, "--lr=0.02", *flags]) == 0
    return folder / "run"


# On the PATH, where `powershell` is Windows' own, 5.1; or unpacked beside the project.
BESIDE = ROOT.parent / "shared" / "pwsh" / "pwsh"
FOUND = shutil.which("pwsh") or shutil.which("powershell")
PWSH = FOUND or (str(BESIDE) if BESIDE.is_file() else None)
POWERSHELL = [PWSH, "-NoProfile", "-ExecutionPolicy", "Bypass"]  # Windows runs no scripts otherwise
needs_pwsh = pytest.mark.skipif(PWSH is None, reason="needs PowerShell: no pwsh on the PATH")

# Tests that send signals to processes or wait for them: one after the other, in one worker.
KILLS = [pytest.mark.slow, pytest.mark.xdist_group("kills")]
DRAW_LOSS_CURVE, DRAW_COMPARISON = update_readme.draw_loss_curve, update_readme.draw_comparison


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def no_plots():
    """What runs in the tests' own process draws no plot, which takes as long as a tiny run; see
    `plots`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            update_readme, "draw_loss_curve", lambda out_dir: out_dir / "logs" / "loss_curve.png"
        )
        patch.setattr(update_readme, "draw_comparison", lambda comparison, path: path)
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_mapped():
    """Token ids that an earlier run in this process has mapped are let go before they are written
    anew: Windows replaces no mapped file. A user's runs are processes of their own."""
    write_ids = corpus.write_ids

    def collected_before(*arguments) -> None:
        gc.collect()
        write_ids(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        if os.name == "nt":
            patch.setattr(corpus, "write_ids", collected_before)
        yield


@pytest.fixture
def plots(monkeypatch):
    """Plots are drawn after all."""
    monkeypatch.setattr(update_readme, "draw_loss_curve", DRAW_LOSS_CURVE)
    monkeypatch.setattr(update_readme, "draw_comparison", DRAW_COMPARISON)


@pytest.fixture
def config() -> Config:
    """A model small enough for a test, everything decided, fp32 on the CPU."""
    own = dict(
        steps=8,
        device="cpu",
        amp="off",
        compile="off",
        threads=2,
        target_window=3,
        optimizer="adamw",
    )
    return decide(TINY_MODEL | own | dict(micro_batch=TINY_MODEL["batch_size"]))


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def text_file(tmp_path) -> Path:
    """A few hundred tokens of English with line ends, digits and punctuation."""
    path = tmp_path / "input.txt"
    lines = [
        f"Line {i}: the {'quick brown fox'[: i % 16]} jumps over {i * 7919 % 1000} lazy dogs.\n"
        for i in range(60)
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
    pytest.skip(
        "Tiny Shakespeare is neither at data/input.txt nor at ../shared/data/tinyshakespeare.txt"
    )


def run_script(
    *arguments: object, cwd: Path, script: str = "train.py"
) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as its user would, from another directory."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=400
    )


def rows(run: Path, *columns: str) -> list[tuple[str, ...]]:
    """Columns of the CSV; without timing when none are named."""
    with open(run / "logs" / "train_metrics.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    columns = columns or [name for name in METRICS if name not in ("tokens_per_sec", "elapsed_sec")]
    return [tuple(row[name] for name in columns) for row in table]


def without_date(line: str) -> str:
    """A line of train.log as the screen has it."""
    date, level, text = line.split(" | ", 2)
    return f"{date[11:19]} | {text}" if level == "INFO" else f"{date[11:19]} | {level} | {text}"


def log_text(run: Path) -> str:
    return (run / "logs" / "train.log").read_text(encoding="utf-8")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, optimizer and gradient scale bit for bit, CSV and progress but for timing, samples,
    best, results."""
    assert rows(first) == rows(second)
    assert (first / "samples/samples.txt").read_bytes() == (
        second / "samples/samples.txt"
    ).read_bytes()
    for name in ("last.pt", "best.pt"):
        expected, found = (without_timing(run / "checkpoints" / name) for run in (first, second))
        assert unequal(expected, found) == [], name
    expected, found = (
        json.loads((run / "results.json").read_text(encoding="utf-8")) for run in (first, second)
    )
    assert found | {"elapsed_sec": 0} == expected | {"elapsed_sec": 0}


def unequal(expected: object, found: object, path: str = "") -> list[str]:
    """Where two nested structures of tensors and plain values differ."""
    if isinstance(expected, torch.Tensor):
        return [] if torch.equal(expected, found) and expected.dtype == found.dtype else [path]
    if isinstance(expected, dict):
        keys = expected.keys() | found.keys()
        return [
            p for key in keys for p in unequal(expected.get(key), found.get(key), f"{path}/{key}")
        ]
    return [] if expected == found else [path]


def without_timing(path: Path) -> dict:
    """All of a checkpoint that must not depend on when and where it was written."""
    checkpoint = torch.load(path, weights_only=True)
    for name in ("config", "origins", "offsets", "unwritten"):
        checkpoint.pop(name, None)
    if "progress" in checkpoint:
        del checkpoint["progress"]["elapsed_sec"]
    return checkpoint


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, in memory or in a file, with little room; gone afterwards."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(megabytes: int, kind: str) -> Path:
        if sys.platform != "linux":
            pytest.skip("mounting a file system is tried under Linux only")
        if kind == "tmpfs":
            command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", place]
        else:
            image = tmp_path / "image"
            image.write_bytes(b"\0" * (megabytes * 2**20))
            if shutil.which("mkfs.ext4") is None:
                pytest.skip("no mkfs.ext4")
            subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
            command = ["mount", "-o", "loop", image, place]
        result = subprocess.run(command, capture_output=True) if shutil.which("mount") else None
        if result is None or result.returncode:
            pytest.skip("mounting a file system is not allowed here")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """Compile C that stands in for functions of the system, as a mount does; returns the library
    for LD_PRELOAD."""
    if not sys.platform.startswith("linux") or shutil.which("gcc") is None:
        pytest.skip("needs Linux and gcc")

    def compiled(c_source: str) -> Path:
        source = tmp_path_factory.mktemp("shim") / "shim.c"
        source.write_text(c_source, encoding="utf-8")
        library = source.with_suffix(".so")
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
        return library

    return compiled


@pytest.fixture(scope="session")
def compiler():
    """torch.compile has its compiler. Under Linux it then has to work; elsewhere it may lack more,
    such as Visual Studio's environment or OpenMP."""
    if sys.platform == "linux":
        if shutil.which("g++") is None:
            pytest.skip("no C++ compiler")
        return
    try:
        torch.compile(torch.sin)(torch.ones(9))
    except Exception as error:
        pytest.skip(f"torch.compile does not work here: {train.excerpt(error)}")


@pytest.fixture
def prompt_disk(monkeypatch):
    """As if each checkpoint were on disk before the next step: what then lies there does not depend
    on timing."""
    start = Writer.start

    def start_and_finish(writer: Writer, tasks: list[Task]) -> None:
        start(writer, tasks)
        writer.finish()

    monkeypatch.setattr(Writer, "start", start_and_finish)


@pytest.fixture
def before_step(monkeypatch):
    """Do something before these steps, each once."""
    update, actions = train.Trainer.update, {}

    def acting(trainer: train.Trainer):
        actions.pop(trainer.progress.step + 1, lambda: None)()
        return update(trainer)

    monkeypatch.setattr(train.Trainer, "update", acting)
    return actions.update


@pytest.fixture
def launch(tmp_path, text_file, monkeypatch):
    """Run train.main in a directory of its own; a later flag overrides an earlier one."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *flags: str) -> int:
        return train.main([*TINY_FLAGS, "--input_file", str(text_file), "--out_dir", name, *flags])

    return run
