"""How many tokens each lever saves on the way to window_loss 0.099999: a ladder of recipes on a small model.

    python benchmarks/tokens_to_target.py --record ladder.json --seeds 0 1 2

Every recipe is a change to a base recipe that trains a GPT-2 of 4 layers and width 256 on the first tenth of the
corpus for --tokens tokens, its learning rate decaying to zero at the end. Reported per recipe: the tokens at which
the target was reached, and window loss and corpus loss at the end. The vocabulary is cut down to the tokens that
occur, which leaves the task as it is and makes a run five times cheaper. Runs that the record holds already are not
repeated.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from benchmarks.record import write_record

BASE = dict(
    n_layer=4, n_head=4, n_embd=256, block_size=1024, seq_len=128, batch_size=8, init_std=0.02, target_window=20,
    optimizer="muon", lr=8e-3, min_lr=0.0, warmup_steps=20, weight_decay=0.1, beta1=0.9, beta2=0.95,
)  # fmt: skip
RECIPES = {
    "base: Muon 8e-3, 8 x 128, cosine to 0 at the end": {},
    "AdamW 3e-4, flat, independent slices (classic)": dict(
        optimizer="adamw", lr=3e-4, min_lr=3e-4, slices="independent"
    ),
    "AdamW 1e-3": dict(optimizer="adamw", lr=1e-3),
    "AdamW 2e-3": dict(optimizer="adamw", lr=2e-3),
    "independent slices": dict(slices="independent"),
    "lr 4e-3": dict(lr=4e-3),
    "lr 1.6e-2": dict(lr=1.6e-2),
    "4 x 256": dict(seq_len=256, batch_size=4),
    "16 x 64": dict(seq_len=64, batch_size=16),
    "4 x 128": dict(batch_size=4),
    "16 x 128": dict(batch_size=16),
    "32 x 128": dict(batch_size=32),
    "4, then 8, then 16 x 128": dict(growth=[4, 8, 16]),
    "8, then 16, then 32 x 128": dict(growth=[8, 16, 32]),
    "init_std 0.05": dict(init_std=0.05),
    "weight_decay 0": dict(weight_decay=0.0),
    "beta2 0.98": dict(beta2=0.98),
    "warmup_steps 0": dict(warmup_steps=0),
    "flat rate": dict(min_lr=8e-3),
    "cosine to a tenth": dict(min_lr=8e-4),
}


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
    """budget of a run; the corpus has 33,802 tokens"""
    input_file: Path = Path("data/input.txt")
    """Tiny Shakespeare"""
    fraction: float = 0.1
    """part of the corpus"""
    threads: int = 1


def run(recipe: dict, seed: int, options: Options, corpus: train.Corpus, name: str) -> dict:
    """Train one recipe for the whole budget. Returns its row of the record.

    A batch that grows does so after equal parts of the tokens, rate and slices going on from there.
    """
    flags = BASE | recipe
    slices, sizes = flags.pop("slices", "covering"), flags.pop("growth", [flags["batch_size"]])
    vocab_size = int(corpus.tokens.max()) + 1
    flags = flags | dict(seed=seed, device="cpu", amp="bf16", compile="off", threads=options.threads)
    flags["vocab_size"] = vocab_size
    if slices == "independent":
        train.covering_starts = lambda seed, first, count, n, _T: train.slice_starts(seed, first, count, n)
    trainer, reached, curve, started = None, None, [], time.perf_counter()
    bar = tqdm(total=options.tokens, unit="token", desc=f"{name} seed {seed}", disable=None)
    for number, batch_size in enumerate(sizes, start=1):
        steps = options.tokens // (batch_size * flags["seq_len"])
        warmup_steps = flags["warmup_steps"] * sizes[0] // batch_size
        config = train.Config(**flags | dict(steps=steps, batch_size=batch_size, warmup_steps=warmup_steps)).resolved()
        config, _ = train.choose_runtime(config, None)
        train.configure_torch(config)
        trainer = trainer or train.Trainer(config, corpus, None)
        trainer.config, p = config, trainer.progress
        p.step = p.tokens // config.tokens_per_step  # in steps of this size
        while p.step < steps * number // len(sizes):
            trainer.update()
            bar.update(config.tokens_per_step)
            window_loss = p.window_loss(config)
            if reached is None and window_loss is not None and window_loss <= config.target_loss:
                reached = p.tokens
            if p.step % max(1, steps // 20) == 0 and window_loss is not None:
                curve.append([p.tokens, round(window_loss, 5)])
    corpus_loss, error = train.corpus_loss(trainer.model, corpus.tokens, config, 256)
    return {
        "recipe": name, "flags": recipe, "seed": seed, "budget": options.tokens, "tokens_to_target": reached,
        "window_loss": round(trainer.progress.window_loss(config), 5), "corpus_loss": round(corpus_loss, 5),
        "standard_error": round(error, 5), "curve": curve,
        "seconds": round(time.perf_counter() - started, 1), "commit": train.git_commit(),
    }  # fmt: skip


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    whole = train.load_corpus(train.Config(input_file=(options.input_file,)).resolved(), train.load_tokenizer())
    _, tokens = np.unique(whole.tokens[: int(len(whole.tokens) * options.fraction)], return_inverse=True)
    corpus = replace(whole, tokens=tokens.astype(np.uint16))
    shuffled = train.covering_starts
    for seed in options.seeds:
        for text in options.recipes:
            recipe = RECIPES.get(text)
            if recipe is None:
                recipe = dict(change.split("=", 1) for change in text.split(","))
                recipe = {flag: json.loads(value) if value[0].isdigit() else value for flag, value in recipe.items()}
            known = train.read_json(options.record).get("rows", [])
            if any((r["recipe"], r["seed"], r["budget"]) == (text, seed, options.tokens) for r in known):
                continue
            train.covering_starts = shuffled
            row = run(recipe, seed, options, corpus, text)
            rows = [*train.read_json(options.record).get("rows", []), row]
            write_record(options.record, __file__, rows, asdict(options), hidden=("flags", "curve"))


if __name__ == "__main__":
    main()
