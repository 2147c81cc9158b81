"""What the checks share: options, trainers, runs, comparisons."""

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import train
from parts.commandline import parse_config
from parts.compute.device import choose_runtime, configure_torch
from parts.text.corpus import load_corpus
from parts.text.vocabulary import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=256",
    "--block_size=128",
    "--seq_len=64",
    "--batch_size=8",
    "--num_prompts=0",
]
SLOW = 5 * 10**8  # GPU cycles, about a quarter of a second
FIXED_SCALE = 1024.0  # of fp16 gradients: one that skips no step


@dataclass(frozen=True)
class Options:
    """What to prove."""

    part: Literal["numerics", "robustness", "speed"]
    input_file: Path = Path("data/input.txt")
    """text to train on"""
    nanogpt: Path | None = None
    """checkout of karpathy/nanoGPT, to be timed beside train.py"""
    only: str = ""
    """checks whose name contains this; empty: all"""
    minutes: float = 8.0
    """after which no further check begins"""
    work: Path | None = None
    """folder for the runs, kept; None: a temporary one"""
    record: Path | None = None
    """JSON file to write; None: benchmarks/records/accept-gpu-PART.json"""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: to try this program itself; that proves nothing of a card, and writes no record of its
    own accord"""


Check = Callable[
    [Options, Path], str
]  # the folder is its own; returns its figure, raises when it fails
CHECKS: dict[str, dict[str, tuple[Check, float]]] = {"numerics": {}, "robustness": {}, "speed": {}}


def check(part: str, name: str, seconds: float = 120) -> Callable[[Check], Check]:
    """Make a function a check of this part, which has so much time."""

    def add(function: Check) -> Check:
        CHECKS[part][name] = function, seconds
        return function

    return add


class LeftOut(Exception):
    """The check cannot be made here; the message says why."""


def needs_card(options: Options) -> None:
    """Raises LeftOut where there is none."""
    if options.device != "cuda":
        raise LeftOut("needs a card")


def at_most(value: float, limit: float) -> str:
    """The value beside its limit. Raises AssertionError when it is larger, or not a number."""
    figure = f"{value:.2g}, at most {limit:g}"
    assert value <= limit, figure
    return figure


def trainer_of(options: Options, *flags: str) -> train.Trainer:
    """A trainer on the card, as the command line would make it."""
    config = parse_config(
        [f"--input_file={options.input_file}", f"--device={options.device}", *flags]
    )
    config = choose_runtime(config, None)
    configure_torch(config)
    trainer = train.Trainer(config, load_corpus(config, load_tokenizer()), None)
    if config.amp == "fp16":
        trainer.scaler = torch.amp.GradScaler(options.device, init_scale=FIXED_SCALE)
    return trainer


def command(options: Options, out: Path, *flags: str) -> list[str]:
    """train.py as its user would type it."""
    return [
        sys.executable,
        str(ROOT / "train.py"),
        f"--input_file={options.input_file}",
        f"--out_dir={out}",
        *flags,
    ]


def run(options: Options, out: Path, *flags: str) -> str:
    """Train to the end. Returns what was said; raises AssertionError when the run fails."""
    done = subprocess.run(
        command(options, out, *flags), capture_output=True, text=True, errors="replace"
    )
    assert done.returncode == 0, (
        f"exit code {done.returncode}: {done.stdout[-300:]}{done.stderr[-500:]}"
    )
    return done.stdout


@contextmanager
def started(line: list[str], **pipes) -> Iterator[subprocess.Popen]:
    """A program beside the check, which does not outlive it; torchrun is given the time to end what
    it started."""
    process = subprocess.Popen(
        line, **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | pipes
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def losses(out: Path) -> list[float]:
    """Of all steps of a run with --log_every=1."""
    lines = (out / "logs" / "train_metrics.csv").read_text(encoding="utf-8").splitlines()[1:]
    return [float(line.split(",")[1]) for line in lines]


def worst(found: list[float], expected: list[float]) -> float:
    """The largest difference; infinite when one has more values."""
    if len(found) != len(expected):
        return math.inf
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Length of the difference, in lengths of what is expected."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def tensors(values: object, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors of nested dictionaries, by path."""
    if isinstance(values, torch.Tensor):
        return {path: values}
    if not isinstance(values, dict):
        return {}
    return {
        name: x
        for key, value in values.items()
        for name, x in tensors(value, f"{path}/{key}").items()
    }


def clones(values: object) -> dict[str, torch.Tensor]:
    """Copies of them on their device, made in the order of its work."""
    return {name: x.detach().clone() for name, x in tensors(values).items()}


def assert_equal(found: object, expected: dict[str, torch.Tensor]) -> int:
    """How many tensors are the same bit for bit. Raises AssertionError when not all are."""
    read = tensors(found)
    different = [
        name
        for name, x in expected.items()
        if name not in read or not torch.equal(read[name].cpu(), x.cpu())
    ]
    assert not different and expected, (
        f"{len(different)} of {len(expected)} differ, {different[:3]}"
    )
    return len(expected)


def log_of(out: Path) -> str:
    path = out / "logs" / "train.log"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def wait_for(sign: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    """Raises AssertionError when the sign does not come, or the process ends before it."""
    deadline = time.monotonic() + seconds
    while not sign():
        assert process.poll() is None, f"it ended with {process.returncode} before its time"
        assert time.monotonic() < deadline, f"no sign within {seconds:.0f} s"
        time.sleep(0.001)
