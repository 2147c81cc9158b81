"""How long a waiting thread should spin before it sleeps: the demo's speed on an idle machine and
on a busy one.

    python benchmarks/waiting.py --record waiting.json

GNU OpenMP reads GOMP_SPINCOUNT when PyTorch is loaded. Each setting trains the demo's model for
--steps steps in a process of its own, one setting after the other in every round, alone and beside
--busy busy processes. Reported are medians of tokens a second, and the ratio to the library's own
default in the same round. The last setting is what train.py chooses by the load of the last minute,
which the settings before it have filled.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.record import write_record

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = "GNU OpenMP's own"
SETTINGS: dict[str, dict[str, str]] = {
    DEFAULT: {
        "GOMP_SPINCOUNT": "300000"
    },  # what it uses where nothing is set and the cores suffice
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{
        f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": str(count)}
        for count in (100, 1000, 10_000, 100_000)
    },
    "train.py's choice": {},
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    record: Path | None = None
    """JSON file to write"""
    rounds: int = 3
    """runs of each setting, idle and busy"""
    steps: int = 60
    """of each run"""
    busy: int = os.cpu_count() or 1
    """processes that keep a core busy each"""


def speed(environment: dict[str, str], steps: int, folder: str) -> float:
    """Tokens a second of one run between its steps 10 and the last."""
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    flags = [
        "--preset=demo",
        f"--steps={steps}",
        "--target_loss=0",
        "--num_prompts=0",
        "--compile=off",
    ]
    with tempfile.TemporaryDirectory(dir=folder) as out_dir:
        command = [sys.executable, str(ROOT / "train.py"), *flags, f"--out_dir={out_dir}"]
        subprocess.run(command, env=clean | environment, check=True, capture_output=True)
        table = pd.read_csv(Path(out_dir, "logs", "train_metrics.csv")).set_index("step")
    first, last = table.loc[10], table.loc[steps]
    return (last["tokens"] - first["tokens"]) / (last["elapsed_sec"] - first["elapsed_sec"])


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in tqdm(range(options.rounds), desc="rounds"):
            for machine, busy in (("idle", 0), ("busy", options.busy)):
                with ExitStack() as others:
                    for _ in range(busy):
                        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                        others.callback(other.kill)
                    for name, environment in SETTINGS.items():
                        found.setdefault((machine, name), []).append(
                            speed(environment, options.steps, folder)
                        )
    rows = []
    for (machine, name), speeds in found.items():
        ratios = [a / b for a, b in zip(speeds, found[machine, DEFAULT], strict=True)]
        rows.append(
            {
                "machine": machine,
                "setting": name,
                "tokens_per_sec": round(statistics.median(speeds)),
                "least": round(min(speeds)),
                "most": round(max(speeds)),
                "n": len(speeds),
                "against the default": round(statistics.median(ratios), 2),
            }
        )
    write_record(options.record, __file__, rows, asdict(options))


if __name__ == "__main__":
    main()
