"""What saving costs a GPT-2 124M run: steps alone, with saves in the background, and with saves
that are waited for.

    python benchmarks/stalls.py --record stalls.json

One trainer in one process; rounds of steps take turns: without a save, with one save (last.pt and a
new best.pt, results.json and the plot, as train.py makes them) in the background, and with the same
save waited for. What a save costs is the difference to the round without; its share is that of a
run with train.py's own --save_every.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from benchmarks.record import write_record
from parts.commandline import parse_config
from parts.compute.device import choose_runtime, configure_torch
from parts.run.directory import RunDir
from parts.text.corpus import load_corpus
from parts.text.vocabulary import load_tokenizer


@dataclass(frozen=True)
class Options:
    """What to measure."""

    record: Path | None = None
    """JSON file to write"""
    preset: str = "gpt2"
    batch_size: int = 8
    optimizer: str = "adamw"
    steps: int = 8
    """steps in a round"""
    rounds: int = 5
    """of each kind"""
    input_file: Path = Path("data/input.txt")
    work: Path | None = None
    """folder of the run, on the disk to measure; None: a temporary one"""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        flags = [
            f"--{name}={getattr(options, name)}"
            for name in ("preset", "batch_size", "optimizer", "input_file")
        ]
        config = parse_config([*flags, f"--out_dir={folder}/run"])
        config = choose_runtime(config, None)
        configure_torch(config)
        corpus, run = load_corpus(config, load_tokenizer()), RunDir(config.out_dir)
        trainer = train.Trainer(config, corpus, None)
        saver = train.Saver(run, trainer, {}, 0)
        seconds: dict[str, list[float]] = {"none": [], "background": [], "waited for": []}
        with run.locked():
            run.make()
            trainer.compile()
            for number in tqdm(range(options.rounds + 1), desc="rounds"):
                for kind, found in seconds.items():
                    started = time.perf_counter()
                    one_round(trainer, saver, options.steps, kind)
                    if number:  # the first allocates the buffers
                        found.append(time.perf_counter() - started)
                    saver.writer.finish()
        held = sum(
            b.numel() * b.element_size()
            for s in (saver.snapshot, *saver.best.snapshots)
            for b in s.buffers.values()
        )
    step = statistics.median(seconds["none"]) / options.steps
    rows = []
    for kind in ("background", "waited for"):
        costs = [other - alone for other, alone in zip(seconds[kind], seconds["none"], strict=True)]
        cost = statistics.median(costs)
        rows.append(
            {
                "saves": kind,
                "n": options.rounds,
                "step_sec": round(step, 3),
                "cost_of_a_save_sec": round(cost, 2),
                "least": round(min(costs), 2),
                "most": round(max(costs), 2),
                "save_every": config.save_every,
                "share_of_wall_clock_percent": round(100 * cost / (config.save_every * step), 3),
                "buffers_gb": round(held / 1e9, 2),
            }
        )
    write_record(options.record, __file__, rows, asdict(options))


def one_round(trainer: train.Trainer, saver: train.Saver, steps: int, kind: str) -> None:
    """Some steps, with a save after the first."""
    for number in range(steps):
        loss, grad_norm, lr = trainer.update()
        p = trainer.progress
        saver.run.append_metrics(
            {"step": p.step, "loss": loss, "lr": lr, "tokens": p.tokens, "grad_norm": grad_norm}
        )
        saver.writer.collect()
        if number or kind == "none":
            continue
        trainer.forget_best()  # a best at every chance
        saver.consider_window_loss(at_end=True)
        saver.save()
        if kind == "waited for":
            saver.writer.finish()


if __name__ == "__main__":
    main()
