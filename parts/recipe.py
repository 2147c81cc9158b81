"""What was not typed: the value of each flag and its origin, from run so far, preset, text, other flags and machine.

`decide` is the one place. A rule computes a value from the flags that were decided before it and from the text; it
never asks whether a flag was typed. So a default that is typed changes nothing but its origin.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from parts.flags import (
    DEMO_CORPUS,
    DEMO_PROMPT,
    PRESETS,
    VOCAB_SIZE,
    Config,
    Flags,
    From,
    Origin,
    TextFlags,
)


@dataclass(frozen=True)
class Text:
    """How long a text is; before it is encoded, its bytes stand for its tokens, which are no more."""

    n_bytes: int
    n_tokens: int  # that are trained on
    n_vocab: int = 10**6  # entries that a vocabulary learned from it can have


TINY_SHAKESPEARE = Text(1_115_394, 338_025)  # stands for the text where none is known, as in tables


# ---------------------------------------------------------------------------------------------
# The law: how long it takes to learn a text by heart
# ---------------------------------------------------------------------------------------------

LAW_TARGET = 0.1  # loss, nats per token
LAW_EXPONENT = 0.75
LAW_TOKENS = 6.0e6  # for 338,025 tokens of text
LAW_TOKENS_OF_DEMO = 8.9e6  # so narrow a model needs more


def tokens_to_learn(preset: str, n_tokens: int) -> float:
    """Tokens of training after which a text of `n_tokens` is known by heart (a loss of `LAW_TARGET`)."""
    tokens = LAW_TOKENS_OF_DEMO if preset == "demo" else LAW_TOKENS
    return tokens * (n_tokens / TINY_SHAKESPEARE.n_tokens) ** LAW_EXPONENT


def usual_steps(v: Any, text: Text) -> int:
    """Steps that the law says, for the batch in use."""
    per_step = v.batch_size * v.grad_accum * v.seq_len
    return min(10**9, max(1, math.ceil(tokens_to_learn(v.preset, text.n_tokens) / per_step)))


# ---------------------------------------------------------------------------------------------
# Rules: values that follow from others
# ---------------------------------------------------------------------------------------------

Rule = Callable[[Any, Text], tuple[object, Origin]]
OPTIMIZERS = {
    "muon": (3.5e-3, 0.99, 30),
    "adamw": (1e-3, 0.95, 10),
}  # rate, beta2, the part of the steps that warms up
MIXED_PART = 0.8


def follows(value: object, reason: str) -> tuple[object, Origin]:
    """A value that follows from other flags."""
    return value, Origin(From.FLAGS, reason)


def out_dir(v: Any, text: Text) -> tuple[object, Origin]:
    """out/PRESET for the preset's own text; for another out/PRESET-NAME, after its first file or folder."""
    if v.input_file == PRESETS[v.preset].get("input_file", TextFlags.input_file):
        return follows(Path("out") / v.preset, "the preset")
    parts = reversed(v.input_file[0].parts) if v.input_file else ()
    first = next((part for part in parts if not set("*?[") & set(part)), "")
    name = re.sub(r"[^\w.-]+", "-", Path(first).stem).strip("-.") or "text"
    return follows(Path("out") / f"{v.preset}-{name}", "the preset and the text's name")


def max_tokens(v: Any, text: Text) -> tuple[object, Origin]:
    """All tokens, but few of the text that ships with Python."""
    if v.input_file == (DEMO_CORPUS,):
        return follows(1500, "two pages of Python's documentation")
    return 0, Origin(From.DEFAULT)


def prompt(v: Any, text: Text) -> tuple[object, Origin]:
    """The text's own beginning (empty), but a sentence of the text that ships with Python."""
    if v.input_file == (DEMO_CORPUS,):
        return follows(DEMO_PROMPT, "a sentence of the text")
    return "", Origin(From.DEFAULT)


def steps(v: Any, text: Text) -> tuple[object, Origin]:
    """As many as the law says."""
    needed = tokens_to_learn(v.preset, text.n_tokens) / 1e6
    reason = f"to learn {text.n_tokens:,} tokens of text usually takes at most {needed:.3g} M tokens of training"
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
    "max_tokens": max_tokens,
    "prompt": prompt,
    "lr": lambda v, text: follows(OPTIMIZERS[v.optimizer][0], f"with {v.optimizer}"),
    "beta2": lambda v, text: follows(OPTIMIZERS[v.optimizer][1], f"with {v.optimizer}"),
    "steps": steps,
    "decay_steps": lambda v, text: follows(v.steps, "the last step"),
    "warmup_steps": warmup_steps,
    "mixed_steps": mixed_steps,
    "sample_every": lambda v, text: follows(
        max(10, v.steps // 10), "1/10 of the steps, at least 10"
    ),
    "eval_every": lambda v, text: follows(max(1, v.steps // 20), "1/20 of the steps"),
}


# ---------------------------------------------------------------------------------------------
# The preset write: the lowest validation loss in minutes, on 20 KB to 10 MB of text
# ---------------------------------------------------------------------------------------------

WRITE_RANGE = (
    20_000,
    10_000_000,
)  # bytes of text; what follows from them was tried from 30 KB to 3 MB


def size_of(text: Text) -> float:
    """Bytes of the text, within the range, as a multiple of 30 KB."""
    low, high = WRITE_RANGE
    return min(max(text.n_bytes, low), high) / 30_000


def from_bytes(value: object, text: Text) -> tuple[object, Origin]:
    """A value that follows from the bytes of the text."""
    return value, Origin(From.TEXT, f"for {text.n_bytes:,} bytes")


def write_tokenizer(v: Any, text: Text) -> tuple[object, Origin]:
    """GPT-2's for a short text, which cannot teach as many words: 2.27 bits per byte instead of 2.70 on 30 KB of prose.
    Else one of the text's own, larger for more text, since it is several times as fast."""
    if size_of(text) < 5 or DEMO_CORPUS in v.input_file:
        return from_bytes("gpt2", text)
    n_vocab = min(4000, round(600 * size_of(text) ** 0.4 / 50) * 50)
    return from_bytes(f"bpe:{min(n_vocab, text.n_vocab)}", text)


def write_width(v: Any, text: Text) -> tuple[object, Origin]:
    """A wider model for more text."""
    return from_bytes(128 if size_of(text) < 3 else 192 if size_of(text) < 30 else 256, text)


def write_batch(v: Any, text: Text) -> tuple[object, Origin]:
    """Larger steps for more text."""
    return from_bytes(4 if size_of(text) < 3 else 8 if size_of(text) < 30 else 16, text)


def write_steps(v: Any, text: Text) -> tuple[object, Origin]:
    """Fewer passes over more text."""
    passes = 10 * size_of(text) ** -0.15
    steps = math.ceil(passes * text.n_tokens / (v.batch_size * v.grad_accum * v.seq_len))
    return min(10**9, max(1, steps)), Origin(
        From.TEXT, f"{passes:.1f} passes over {text.n_tokens:,} tokens"
    )


def write_heads(v: Any, text: Text) -> tuple[object, Origin]:
    """Heads of about 32 channels."""
    most = max(1, v.n_embd // 32)
    return follows(
        next(n for n in range(most, 0, -1) if v.n_embd % n == 0), "32 channels each, or more"
    )


def write_rate(v: Any, text: Text) -> tuple[object, Origin]:
    """A lower rate for smaller steps; it was tried with Muon alone."""
    if v.optimizer != "muon":
        return follows(OPTIMIZERS[v.optimizer][0], f"with {v.optimizer}")
    return from_bytes(3e-3 if size_of(text) < 3 else 4e-3, text)


def validates(v: Any) -> bool:
    """Whether text is held out."""
    return bool(v.val_fraction or v.val_file)


WRITE: dict[str, Rule] = {
    "tokenizer": write_tokenizer,
    "n_embd": write_width,
    "n_head": write_heads,
    "block_size": lambda v, text: follows(v.seq_len, "seq_len"),
    "batch_size": write_batch,
    "val_fraction": lambda v, text: follows(
        0.0 if v.val_file else 0.1, "the end of the text, unless there is a val_file"
    ),
    "patience": lambda v, text: follows(5 if validates(v) else 0, "with a validation split"),
}
PRESET_RULES: dict[str, dict[str, Rule]] = {
    "write": {**WRITE, **RULES, "lr": write_rate, "steps": write_steps}
}


# ---------------------------------------------------------------------------------------------
# The one place
# ---------------------------------------------------------------------------------------------

# What follows from other flags follows them in a run that goes on, too; all else stays as it was decided at its start.
FOLLOW_ON_THE_WAY = {"decay_steps", "warmup_steps", "mixed_steps", "sample_every", "eval_every"}
BY_MACHINE = {
    "device",
    "amp",
    "compile",
    "threads",
    "micro_batch",
}  # compute/device.py chooses, and keeps what it can
OF_ONE_START = {"preset", "out_dir", "resume", "dry_run", "tensorboard"}


def is_open(name: str, value: object) -> bool:
    """Whether this asks for a decision, and is none."""
    return (
        value is None
        or (name in BY_MACHINE and value == "auto")
        or (name == "prompt" and value == "")
    )


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

    `typed` are the flags of the command line, `previous` those of the run that is continued, in whose directory.
    Without a `machine`, what it would choose stays open. Raises what `machine` raises.
    """
    preset = typed.get("preset") or (previous.preset if previous else Flags.preset)
    kept = previous if previous and previous.preset == preset else None
    rules = PRESET_RULES.get(preset, RULES)
    v = SimpleNamespace(preset=preset, processes=processes, vocab_size=vocab_size)
    origins = {
        "preset": Origin(From.TYPED if "preset" in typed else From.RUN if kept else From.DEFAULT)
    }
    names = [field.name for field in fields(Flags) if field.name not in rules]
    for name in [*names, *rules]:
        if name == "preset":
            continue
        value, origin = typed.get(name), Origin(From.TYPED)
        if is_open(name, value):
            value, origin = untyped(name, v, text, rules, None if name in typed else kept)
        setattr(v, name, value)
        origins[name] = origin
    if previous is not None:  # it lies where it lies, and its weights began as they began
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
        # Decided again where what it follows from has changed; else it stays, whatever the rule says by now.
        follows = before.source == From.FLAGS and name in FOLLOW_ON_THE_WAY
        if not follows or rules[name](kept, text)[0] == rules[name](v, text)[0]:
            return getattr(kept, name), before
    if name in PRESETS[v.preset]:
        return PRESETS[v.preset][name], Origin(From.PRESET)
    if name in rules:
        return rules[name](v, text)
    return getattr(Flags, name), Origin(From.DEFAULT)
