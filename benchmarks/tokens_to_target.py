"""What each part of the recipe gives on the way to window_loss 0.099999: a ladder of recipes on a
small model.

    python benchmarks/tokens_to_target.py --record ladder.json --seeds 0 1 2
    python benchmarks/tokens_to_target.py --fraction 0.2 --tokens 980258 --recipes base

Every recipe is a change to a base recipe that trains a GPT-2 of 4 layers and width 256 on the first
tenth of the corpus for --tokens tokens, its learning rate falling until the end. Reported per
recipe: the tokens at which the target was reached, the seconds of training to window losses of 0.5
and 0.2, and window loss and corpus loss at the end. The vocabulary is cut down to the tokens that
occur, which leaves the task as it is and makes a run five times cheaper. Runs that the record holds
already are not repeated.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from benchmarks.record import write_record
from parts.compute import muon
from parts.compute.device import choose_runtime, configure_torch
from parts.recipe import decide
from parts.report.provenance import git_commit
from parts.run.directory import read_json
from parts.text.corpus import Corpus, load_corpus
from parts.text.vocabulary import load_tokenizer

BASE = dict(
    n_layer=4,
    n_head=4,
    n_embd=256,
    block_size=1024,
    seq_len=128,
    batch_size=16,
    init_std=0.02,
    target_window=20,
    optimizer="muon",
    lr=1.2e-2,
    warmup_steps=20,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    schedule="linear",
)
RECIPES = {  # mixed_steps as a part of the steps
    "base": {},
    "AdamW 2e-3": dict(optimizer="adamw", lr=2e-3),
    "AdamW 3e-4, flat, independent slices (classic)": dict(
        optimizer="adamw", lr=3e-4, min_lr=3e-4, slices="independent"
    ),
    "torch.optim.Muon 8e-3, cosine": dict(muon="torch", lr=8e-3, schedule="cosine", min_lr=0.0),
    "torch.optim.Muon 8e-3": dict(muon="torch", lr=8e-3),
    "momentum 0.95": dict(muon=dict(momentum=0.95)),
    "momentum 0.85": dict(muon=dict(momentum=0.85)),
    "rows left as they are": dict(muon=dict(beta2=1.0)),
    "3 iterations": dict(iterations=3),
    "lr 8e-3": dict(lr=8e-3),
    "lr 1.6e-2": dict(lr=1.6e-2),
    "cosine to a tenth": dict(schedule="cosine"),
    "cosine to 0": dict(schedule="cosine", min_lr=0.0),
    "line to 0": dict(min_lr=0.0),
    "mixed slices to 70 %": dict(mixed_steps=0.7),
    "mixed slices to 70 %, line to 0": dict(mixed_steps=0.7, min_lr=0.0),
    "mixed slices to 80 %, line to 0": dict(mixed_steps=0.8, min_lr=0.0),
    "independent slices": dict(slices="independent"),
    "8 x 128": dict(batch_size=8),
    "32 x 128": dict(batch_size=32),
    "64 x 128": dict(batch_size=64),
    "8 x 256": dict(batch_size=8, seq_len=256),
}
MILESTONES = (0.5, 0.2)  # window losses to which the seconds are told


@dataclass(frozen=True)
class Options:
    """What to run."""

    record: Path
    """JSON file to read earlier runs from and add these to"""
    recipes: list[str] = field(default_factory=lambda: list(RECIPES))
    """names of the table, or flag=value,flag=value"""
    seeds: list[int] = field(default_factory=lambda: [0])
    """each recipe is run once with each"""
    tokens: int = 676_000
    """budget of a run; the corpus has 338,025 tokens, the first tenth of it 33,802"""
    input_file: Path = Path("data/input.txt")
    """Tiny Shakespeare"""
    fraction: float = 0.1
    """part of the corpus"""
    threads: int = 1


def run(recipe: dict, seed: int, options: Options, corpus: Corpus, name: str) -> dict:
    """Train one recipe for the whole budget. Returns its row of the record."""
    flags = BASE | recipe
    own, iterations = flags.pop("muon", {}), flags.pop("iterations", len(muon.POLAR_EXPRESS))
    steps = options.tokens // (flags["batch_size"] * flags["seq_len"])
    flags.setdefault("min_lr", flags["lr"] / 10)
    flags["mixed_steps"] = int(flags.get("mixed_steps", 0) * steps)
    flags |= dict(
        seed=seed, steps=steps, device="cpu", amp="bf16", compile="off", threads=options.threads
    )
    config = decide(flags, vocab_size=int(corpus.tokens.max()) + 1, machine=choose_runtime)
    configure_torch(config)
    train.Muon, muon.POLAR_EXPRESS = variant(own), muon.POLAR_EXPRESS[:iterations]
    trainer = train.Trainer(config, corpus, None)
    p, reached, curve, milestones, seconds = trainer.progress, None, [], {}, 0.0
    for _ in tqdm(range(steps), unit="step", desc=f"{name} seed {seed}", disable=None):
        started = time.perf_counter()
        trainer.update()
        seconds += time.perf_counter() - started
        window_loss = p.window_loss(config)
        if window_loss is None:
            continue
        for milestone in MILESTONES:
            if window_loss <= milestone:
                milestones.setdefault(milestone, round(seconds, 1))
        if reached is None and window_loss <= config.target_loss:
            reached = p.tokens
        if p.step % max(1, steps // 20) == 0:
            curve.append([p.tokens, round(window_loss, 5)])
    losses = train.corpus_losses(trainer.model, corpus.tokens, config, 0, 0, 256)
    corpus_loss, error = train.mean_and_error(losses)
    return {
        "recipe": name,
        "flags": recipe,
        "seed": seed,
        "fraction": options.fraction,
        "budget": options.tokens,
        "tokens_to_target": reached,
        **{f"seconds_to_{m}": milestones.get(m) for m in MILESTONES},
        "window_loss": round(p.window_loss(config), 5),
        "corpus_loss": round(corpus_loss, 5),
        "standard_error": round(error, 5),
        "curve": curve,
        "seconds": round(seconds, 1),
        "commit": git_commit(),
    }


def variant(own: dict | str) -> type[torch.optim.Optimizer] | partial:
    """Muon with other settings, or PyTorch's."""
    if own != "torch":
        return partial(muon.Muon, **own)
    return lambda matrices, dtype, **rest: torch.optim.Muon(
        matrices, **rest, adjust_lr_fn="match_rms_adamw"
    )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    whole = load_corpus(decide(dict(input_file=(options.input_file,))), load_tokenizer())
    _, tokens = np.unique(
        whole.tokens[: int(len(whole.tokens) * options.fraction)], return_inverse=True
    )
    corpus = replace(whole, tokens=tokens.astype(np.uint16))
    polar_express = muon.POLAR_EXPRESS
    for seed in options.seeds:
        for text in options.recipes:
            recipe = RECIPES.get(text)
            if recipe is None:
                recipe = dict(change.split("=", 1) for change in text.split(","))
                recipe = {
                    flag: json.loads(value) if value[0].isdigit() else value
                    for flag, value in recipe.items()
                }
            known = read_json(options.record).get("rows", [])
            wanted = (text, seed, options.fraction, options.tokens)
            if any((r["recipe"], r["seed"], r["fraction"], r["budget"]) == wanted for r in known):
                continue
            muon.POLAR_EXPRESS = polar_express
            row = run(recipe, seed, options, corpus, text)
            rows = [*read_json(options.record).get("rows", []), row]
            write_record(options.record, __file__, rows, asdict(options), hidden=("flags", "curve"))


if __name__ == "__main__":
    main()
