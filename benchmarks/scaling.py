"""Step time and peak memory against slice length, micro-batch and model.

    python benchmarks/scaling.py --record scaling.json --plot scaling.png

Every point is a process of its own that trains uncompiled with AdamW; a step's time is the median
of its rounds.
"""

import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import throughput
from benchmarks.record import write_record


@dataclass(frozen=True)
class Options:
    """What to measure."""

    record: Path | None = None
    """JSON file to write"""
    plot: Path | None = None
    """PNG file to draw"""
    presets: list[str] | None = None
    """models at 8 x 128; None: demo, small, gpt2, gpt2-medium"""
    rounds: int = 5
    input_file: Path = Path("data/input.txt")


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    presets = options.presets or ["demo", "small", "gpt2", "gpt2-medium"]
    points = [("seq_len", "gpt2", 1024 // T, T) for T in (128, 256, 512, 1024)]
    points += [("micro-batch", "gpt2", B, 128) for B in (1, 2, 4, 8, 16)]
    points += [("model", preset, 8, 128) for preset in presets]
    rows, seen = [], {}
    for varied, preset, batch_size, seq_len in points:
        shape = (preset, batch_size, seq_len)
        if shape not in seen:
            one = throughput.Options(
                preset=preset,
                batch_size=batch_size,
                seq_len=seq_len,
                grad_accum=1,
                rounds=options.rounds,
                input_file=options.input_file,
            )
            seen[shape] = throughput.measure(one, ["train.py, eager"])["train.py, eager"]
        seconds = seen[shape]["seconds"]
        rows.append(
            {
                "varied": varied,
                "preset": preset,
                "batch_size": batch_size,
                "seq_len": seq_len,
                "step_sec": round(statistics.median(seconds), 3),
                "least": round(min(seconds), 3),
                "most": round(max(seconds), 3),
                "n": len(seconds),
                "tokens_per_sec": round(batch_size * seq_len / statistics.median(seconds)),
                "peak_gb": round(seen[shape]["peak_mb"] / 1000, 2),
            }
        )
    write_record(options.record, __file__, rows, asdict(options))
    if options.plot:
        draw(rows, options.plot)


def draw(rows: list[dict], path: Path) -> None:
    """One panel for each thing varied: tokens per second as bars, peak memory as a line."""
    figure = Figure(figsize=(11, 3.6), dpi=110, layout="constrained")
    labels = {"seq_len": "seq_len", "micro-batch": "batch_size", "model": "preset"}
    for axis, (varied, column) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        part = [row for row in rows if row["varied"] == varied]
        names = [str(row[column]).replace("-", "\n") for row in part]
        axis.bar(names, [row["tokens_per_sec"] for row in part], color="#9ecae1", width=0.6)
        axis.set_ylabel("tokens per second")
        axis.set_xlabel(
            f"{varied} ({'1,024 tokens a step' if varied == 'seq_len' else '128 tokens a slice'})"
        )
        if varied == "model":
            axis.set_yscale("log")
        right = axis.twinx()
        right.plot(names, [row["peak_gb"] for row in part], "o-", color="#d94801")
        right.set_ylabel("peak memory, GB", color="#d94801")
        right.set_ylim(bottom=0)
    figure.savefig(path)


if __name__ == "__main__":
    main()
