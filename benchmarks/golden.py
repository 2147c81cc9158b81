"""Short runs of every kind, and hashes of all that they leave: a change that should change no
number changes no hash.

    python benchmarks/golden.py --record golden.json      # before the change
    python benchmarks/golden.py --against golden.json     # after it; exit 1 where one differs

A run's hash is that of its CSV (without times), its samples, and every tensor of last.pt and
best.pt, optimizer and gradient scale included. Hashes compare on one machine with one PyTorch;
another CPU rounds otherwise.
"""

import csv
import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    *(
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=32",
        "--block_size=32",
        "--seq_len=16",
        "--batch_size=4",
        "--steps=12",
    ),
    *(
        "--decay_steps=12",
        "--warmup_steps=2",
        "--target_loss=0",
        "--target_window=3",
        "--log_every=1",
        "--save_every=5",
    ),
    *(
        "--sample_every=6",
        "--max_new_tokens=24",
        "--device=cpu",
        "--compile=off",
        "--threads=1",
        "--amp=bf16",
    ),
]
DEEP = [
    "--n_layer=12",
    "--n_head=12",
    "--n_embd=48",
    "--block_size=64",
    "--seq_len=32",
]  # GPT-2's depth and heads
RUNS: dict[str, list[list[str]]] = {  # flags of each command; later ones go on with the same run
    "demo": [
        [
            "--preset=demo",
            "--steps=30",
            "--decay_steps=30",
            "--device=cpu",
            "--compile=off",
            "--threads=1",
        ]
    ],
    "124M-shaped": [[*TINY, *DEEP]],
    "adamw": [[*TINY, "--optimizer=adamw", "--amp=off"]],
    "muon": [[*TINY, "--optimizer=muon", "--amp=off", "--grad_accum=2"]],
    "fp16": [[*TINY, "--amp=fp16"]],
    "dropout": [[*TINY, "--dropout=0.2", "--micro_batch=2"]],
    "independent, cosine": [
        [*TINY, "--slices=independent", "--schedule=cosine", "--temperature=0"]
    ],
    "validation": [[*TINY, "--val_fraction=0.2", "--eval_every=4"]],
    "own vocabulary": [[*TINY, "--tokenizer=bpe:300", "--cache_dir=cache"]],
    "resumed": [[*TINY, "--steps=7"], TINY],
    "two processes": [[*TINY, "--processes"]],
}


WORDS = "the quick brown fox jumps over a lazy dog while seven naïve wizards brew café potions"


@dataclass(frozen=True)
class Options:
    """What to do with the hashes."""

    record: Path | None = None
    """JSON file to write them to"""
    against: Path | None = None
    """JSON file to compare them with"""
    only: tuple[str, ...] = tuple(RUNS)
    """runs to do"""


def text() -> str:
    """A few thousand tokens of English with line ends, digits and signs beyond ASCII."""
    words = WORDS.split()
    lines = (
        " ".join(words[i * k % len(words)] for k in range(1, 3 + i % 9)) + f" {i * 7919 % 1000}."
        for i in range(400)
    )
    return "\n".join(lines)


def command(flags: list[str], out_dir: str) -> list[str]:
    """How this run is started, under torchrun if it has two processes."""
    start = [sys.executable]
    if "--processes" in flags:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    own = [flag for flag in flags if flag != "--processes"]
    given = [] if "--preset=demo" in own else ["--input_file=input.txt"]
    return [*start, str(ROOT / "train.py"), *own, *given, f"--out_dir={out_dir}"]


def fingerprint(run: Path) -> str:
    """SHA-256 of all that must not depend on when and where the run was."""
    digest = hashlib.sha256()
    with open(run / "logs" / "train_metrics.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            digest.update(
                repr(
                    {k: v for k, v in row.items() if k not in ("tokens_per_sec", "elapsed_sec")}
                ).encode()
            )
    digest.update((run / "samples" / "samples.txt").read_bytes())
    for name in ("last.pt", "best.pt"):
        add(digest, torch.load(run / "checkpoints" / name, weights_only=True))
    return digest.hexdigest()


def add(digest, values: object, path: str = "") -> None:
    """Tensors of nested dictionaries, and where they stand."""
    if isinstance(values, dict):
        for key in sorted(values, key=str):
            add(digest, values[key], f"{path}/{key}")
    elif isinstance(values, torch.Tensor):
        digest.update(f"{path} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def main() -> int:
    options = tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "input.txt").write_text(text(), encoding="utf-8", newline="\n")
        for number, name in enumerate(tqdm(options.only, disable=None)):
            for flags in RUNS[name]:
                result = subprocess.run(
                    command(flags, f"run{number}"),
                    cwd=folder,
                    capture_output=True,
                    text=True,
                    encoding="utf-8",
                )
                if result.returncode != 0:
                    said = result.stdout[-2000:] + result.stderr[-2000:]
                    print(f"{name}: exit code {result.returncode}\n{said}")
                    return 1
            found[name] = fingerprint(Path(folder, f"run{number}"))
    expected = json.loads(options.against.read_text(encoding="utf-8")) if options.against else found
    for name, value in found.items():
        print(f"{value[:16]}  {name}{'' if value == expected.get(name) else '  DIFFERS'}")
    if options.record:
        options.record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(value != expected.get(name) for name, value in found.items()))


if __name__ == "__main__":
    sys.exit(main())
