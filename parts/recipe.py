"""What was not typed: the value of each flag and where it comes from.

`decide` is the one place. A rule computes a value from the flags that were decided before it and
from the text. It never asks whether a flag was typed: typing a default changes only its origin.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from parts.flags import DEMO_CORPUS, DEMO_PROMPT, PRESETS, VOCAB_SIZE, Config, Flags, From, Origin


@dataclass(frozen=True)
class Text:
    """How long a text is; before it is encoded, its bytes stand for its tokens."""

    n_bytes: int
    n_tokens: int  # that are trained on
    n_vocab: int = 10**6  # entries that a vocabulary learned from it can have


TINY_SHAKESPEARE = Text(1_115_394, 338_025)  # stands for the text where none is known, as in tables


# The law: how long it takes to learn a text by heart.

LAW_TARGET = 0.1  # loss, nats per token
LAW_EXPONENT = 0.75
LAW_TOKENS = 6.0e6  # for 338,025 tokens of text
LAW_TOKENS_OF_DEMO = 8.9e6  # so narrow a model needs more


def tokens_to_learn(preset: str, n_tokens: int) -> float:
    """Tokens of training until a text of `n_tokens` is known by heart, to a loss of LAW_TARGET."""
    tokens = LAW_TOKENS_OF_DEMO if preset == "demo" else LAW_TOKENS
    return tokens * (n_tokens / TINY_SHAKESPEARE.n_tokens) ** LAW_EXPONENT


def usual_steps(v: Any, text: Text) -> int:
    """Steps that the law says, for the batch in use."""
    return steps_for(tokens_to_learn(v.preset, text.n_tokens), v)


def steps_for(n_tokens: float, v: Any) -> int:
    """Steps that train on so many tokens, within the range of --steps."""
    return min(10**9, max(1, math.ceil(n_tokens / (v.batch_size * v.grad_accum * v.seq_len))))


# Rules: values that follow from others.

Rule = Callable[[Any, Text], tuple[object, Origin]]
# The rate, beta2, and the part of the steps that warms up.
OPTIMIZERS = {"muon": (3.5e-3, 0.99, 30), "adamw": (1e-3, 0.95, 10)}
MIXED_PART = 0.8


def follows(value: object, reason: str) -> tuple[object, Origin]:
    """A value that follows from other flags."""
    return value, Origin(From.FLAGS, reason)


def out_dir(v: Any, text: Text) -> tuple[object, Origin]:
    """out/PRESET for the preset's own text; else out/PRESET-NAME, by the first file or folder."""
    if v.input_file == PRESETS[v.preset].get("input_file", Flags.input_file):
        return follows(Path("out") / v.preset, "the preset")
    parts = reversed(v.input_file[0].parts) if v.input_file else ()
    first = next((part for part in parts if not set("*?[") & set(part)), "")
    name = re.sub(r"[^\w.-]+", "-", Path(first).stem).strip("-.") or "text"
    return follows(Path("out") / f"{v.preset}-{name}", "the preset and the text's name")


def of_demo_text(v: Any, value: object, reason: str, otherwise: object) -> tuple[object, Origin]:
    """A value that suits the text that ships with Python, or the one for other texts."""
    if v.input_file == (DEMO_CORPUS,):
        return follows(value, reason)
    return otherwise, Origin(From.DEFAULT)


def steps(v: Any, text: Text) -> tuple[object, Origin]:
    """As many as the law says."""
    needed = tokens_to_learn(v.preset, text.n_tokens) / 1e6
    usual = f"usually takes at most {needed:.3g} M tokens of training"
    reason = f"to learn {text.n_tokens:,} tokens of text {usual}"
    return usual_steps(v, text), Origin(From.TEXT, reason)


def mixed_steps(v: Any, text: Text) -> tuple[object, Origin]:
    """A part of the steps, where slices can be cut into quarters."""
    if v.seq_len % 4:
        return follows(0, "seq_len has no quarters")
    if v.batch_size * v.grad_accum < 4:
        return follows(0, "a step has fewer than 4 slices")
    return follows(int(MIXED_PART * v.steps), f"{MIXED_PART:.0%} of the steps")


def warmup_steps(v: Any, text: Text) -> tuple[object, Origin]:
    """A part of the steps in which the rate changes."""
    part = OPTIMIZERS[v.optimizer][2]
    return follows(v.decay_steps // part, f"1/{part} of decay_steps, with {v.optimizer}")


RULES: dict[str, Rule] = {  # a rule sees the flags without one, and those above it
    "out_dir": out_dir,
    "max_tokens": lambda v, _: of_demo_text(v, 1500, "two pages of Python's documentation", 0),
    "prompt": lambda v, _: of_demo_text(v, DEMO_PROMPT, "a sentence of the text", ""),
    "lr": lambda v, _: follows(OPTIMIZERS[v.optimizer][0], f"with {v.optimizer}"),
    "beta2": lambda v, _: follows(OPTIMIZERS[v.optimizer][1], f"with {v.optimizer}"),
    "steps": steps,
    "decay_steps": lambda v, _: follows(v.steps, "the last step"),
    "warmup_steps": warmup_steps,
    "mixed_steps": mixed_steps,
    "sample_every": lambda v, _: follows(max(10, v.steps // 10), "1/10 of the steps, at least 10"),
    "eval_every": lambda v, _: follows(max(1, v.steps // 20), "1/20 of the steps"),
}


# The preset write: the lowest validation loss in minutes, on 20 KB to 10 MB of text.

WRITE_RANGE = (20_000, 10_000_000)  # bytes of text; the rules were tried from 30 KB to 3 MB


def in_30_kb(text: Text) -> float:
    """Bytes of the text, within the range, as a multiple of 30 KB."""
    low, high = WRITE_RANGE
    return min(max(text.n_bytes, low), high) / 30_000


def by_size(text: Text, *values: object) -> tuple[object, Origin]:
    """One of three values: for texts below 90 KB, below 900 KB, and longer ones."""
    value = values[0] if in_30_kb(text) < 3 else values[1] if in_30_kb(text) < 30 else values[2]
    return value, Origin(From.TEXT, f"for {text.n_bytes:,} bytes")


def write_tokenizer(v: Any, text: Text) -> tuple[object, Origin]:
    """GPT-2's for a short text, else one learned from the text, larger for more text.

    A short text cannot teach as many words: 2.70 bits per byte instead of 2.27 on 30 KB of prose.
    For others the own one is several times as fast.
    """
    name = "gpt2"
    if in_30_kb(text) >= 5 and DEMO_CORPUS not in v.input_file:
        n_vocab = min(4000, round(600 * in_30_kb(text) ** 0.4 / 50) * 50)
        name = f"bpe:{min(n_vocab, text.n_vocab)}"
    return name, Origin(From.TEXT, f"for {text.n_bytes:,} bytes")


def write_steps(v: Any, text: Text) -> tuple[object, Origin]:
    """Ten passes up to 300 KB, fewer over more text, which would take hours."""
    passes = 10 * max(1.0, in_30_kb(text) / 10) ** -0.3
    reason = f"{passes:.1f} passes over {text.n_tokens:,} tokens"
    return steps_for(passes * text.n_tokens, v), Origin(From.TEXT, reason)


def write_heads(v: Any, text: Text) -> tuple[object, Origin]:
    """Heads of about 32 channels."""
    most = max(1, v.n_embd // 32)
    n_head = next(n for n in range(most, 0, -1) if v.n_embd % n == 0)
    return follows(n_head, "32 channels each, or more")


def write_rate(v: Any, text: Text) -> tuple[object, Origin]:
    """A lower rate for smaller steps; it was tried with Muon alone."""
    return by_size(text, 3e-3, 4e-3, 4e-3) if v.optimizer == "muon" else RULES["lr"](v, text)


SPLIT = "the end of the text, unless there is a val_file"
WRITE: dict[str, Rule] = {
    "tokenizer": write_tokenizer,
    "n_embd": lambda v, text: by_size(text, 128, 192, 256),
    "n_head": write_heads,
    "block_size": lambda v, _: follows(v.seq_len, "seq_len"),
    "batch_size": lambda v, text: by_size(text, 4, 8, 16),
    "val_fraction": lambda v, _: follows(0.0 if v.val_file else 0.1, SPLIT),
    "patience": lambda v, _: follows(
        5 if v.val_fraction or v.val_file else 0, "with a validation split"
    ),
    **RULES,
    "lr": write_rate,
    "steps": write_steps,
}


# What follows from other flags; in a run that goes on only these do so again.
FOLLOW_ON_THE_WAY = {"decay_steps", "warmup_steps", "mixed_steps", "sample_every", "eval_every"}
BY_MACHINE = {"device", "amp", "compile", "threads", "micro_batch"}  # chosen in compute/device.py
LEFT_OPEN = dict.fromkeys(BY_MACHINE, "auto") | {"prompt": ""}  # typed, these decide nothing
OF_ONE_START = {"out_dir", "resume", "dry_run", "tensorboard"}


def decide(
    typed: dict[str, Any],
    text: Text = TINY_SHAKESPEARE,
    *,
    previous: Config | None = None,
    processes: int = 1,
    vocab_size: int = VOCAB_SIZE,
    machine: Callable[[Config, Config | None], Config] | None = None,
) -> Config:
    """The flags of a run, and where each comes from.

    `typed` are the flags of the command line, `previous` those of the run that is continued.
    Without a `machine`, what it would choose stays open. Raises what `machine` raises.
    """
    preset = typed.get("preset") or (previous.preset if previous else Flags.preset)
    kept = previous if previous and previous.preset == preset else None
    rules = WRITE if preset == "write" else RULES
    v = SimpleNamespace(preset=preset, processes=processes, vocab_size=vocab_size)
    source = From.TYPED if "preset" in typed else From.RUN if kept else From.DEFAULT
    origins = {"preset": Origin(source)}
    constant = [flag.name for flag in fields(Flags) if flag.name not in {*rules, "preset"}]
    for name in [*constant, *rules]:
        value, origin = typed.get(name), Origin(From.TYPED)
        if value in (None, LEFT_OPEN.get(name)):
            value, origin = untyped(name, v, text, rules, None if name in typed else kept)
        setattr(v, name, value)
        origins[name] = origin
    if previous is not None:  # where a run lies and what it started from cannot change
        v.out_dir, v.init_from = previous.out_dir, previous.init_from
    config = Config(**vars(v), origins=origins)
    return config if machine is None else machine(config, previous)


def untyped(
    name: str, v: Any, text: Text, rules: dict[str, Rule], kept: Config | None
) -> tuple[object, Origin]:
    """The value of a flag that was not typed, and its origin."""
    if kept is not None and name not in BY_MACHINE | OF_ONE_START:
        before = kept.origins.get(name, Origin(From.RUN))
        if before.source == From.TYPED:
            before = Origin(From.RUN)
        # Decided again only if what it follows from has changed: the rule may be a newer one.
        follows = before.source == From.FLAGS and name in FOLLOW_ON_THE_WAY
        if not follows or rules[name](kept, text)[0] == rules[name](v, text)[0]:
            return getattr(kept, name), before
    if name in PRESETS[v.preset]:
        return PRESETS[v.preset][name], Origin(From.PRESET)
    if name in rules:
        return rules[name](v, text)
    return getattr(Flags, name), Origin(From.DEFAULT)
