"""How many tokens of training a text of N tokens takes: models, lengths of text, budgets,
schedules, seeds.

    python benchmarks/law.py --record law.json --jobs ladder:33802:750000:linear:0

A job is model:tokens of text:tokens of training:schedule:seed, and perhaps :flag=value,flag=value.
The text is the first part of --input_file; its vocabulary is cut down to the tokens that occur,
which leaves the task as it is and makes small models several times cheaper. From 60 % of the steps
on, the loss on 256 random slices is measured each 40th part of the run: `end` is the last one,
`reached` the tokens of training at the first that is at or below the target. Jobs that the record
holds already are not repeated.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from benchmarks.record import write_record
from parts.compute.device import choose_runtime, configure_torch
from parts.recipe import decide
from parts.report.provenance import git_commit
from parts.run.directory import read_json
from parts.text.corpus import Corpus, load_corpus, loss_floor
from parts.text.vocabulary import load_tokenizer

MODELS = {  # flags beside the default ones
    "ladder": dict(n_layer=4, n_head=4, n_embd=256, batch_size=16, lr=1.2e-2, beta2=0.95),
    "demo": dict(preset="demo"),
    "small": dict(preset="small"),
    "gpt2": dict(preset="gpt2"),
}
SLICES = 256  # random ones, of a measurement


@dataclass(frozen=True)
class Options:
    """What to run."""

    record: Path
    """JSON file to read earlier runs from and add these to"""
    jobs: list[str]
    """model:tokens of text:tokens of training:schedule:seed[:flag=value,flag=value]"""
    input_file: Path = Path("data/input.txt")
    """Tiny Shakespeare"""
    threads: int = 1


def run(job: str, options: Options, whole: Corpus) -> dict:
    """Train one job to its end. Returns its row of the record."""
    model, length, budget, schedule, seed, *more = job.split(":")
    changes = dict(change.split("=", 1) for change in more[0].split(",")) if more else {}
    flags = MODELS[model] | {name: json.loads(value) for name, value in changes.items()}
    flags |= dict(schedule=schedule, seed=int(seed), compile="off", threads=options.threads)
    _, tokens = np.unique(whole.tokens[: int(length)], return_inverse=True)
    corpus = replace(whole, tokens=tokens.astype(np.uint16))
    per_step = decide(flags).tokens_per_step
    flags["steps"] = int(budget) // per_step
    config = decide(flags, vocab_size=int(tokens.max()) + 1, machine=choose_runtime)
    configure_torch(config)
    trainer = train.Trainer(config, corpus, None)
    curve, started = [], time.perf_counter()
    for step in range(1, config.steps + 1):
        loss = trainer.update()[0]
        due = step >= 0.6 * config.steps and step % max(1, config.steps // 40) == 0
        if step == config.steps or (due and loss < 0.3):
            losses = train.corpus_losses(trainer.model, corpus.tokens, config, step, 0, SLICES)
            mean, error = train.mean_and_error(losses)
            curve.append([trainer.progress.tokens, round(mean, 5), round(error, 5)])
    reached = next((tokens for tokens, mean, _ in curve if mean <= config.target_loss), None)
    return {
        "job": job,
        "steps": config.steps,
        "passes": round(config.steps * per_step / int(length), 1),
        "reached": reached,
        "end": curve[-1][1],
        "standard_error": curve[-1][2],
        "floor": round(loss_floor(corpus.tokens, config.seq_len), 4),
        "seconds": round(time.perf_counter() - started),
        "commit": git_commit(),
        "curve": curve,
    }


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    whole = load_corpus(decide(dict(input_file=(options.input_file,))), load_tokenizer())
    for job in options.jobs:
        rows = read_json(options.record).get("rows", [])
        if all(row["job"] != job for row in rows):
            rows = [*rows, run(job, options, whole)]
            write_record(options.record, __file__, rows, asdict(options), hidden=("curve",))


if __name__ == "__main__":
    main()
