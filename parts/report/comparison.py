"""Several runs side by side: whether they compare, in which unit and order, and the flags in which they differ."""

import glob
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from parts.report.reader import (
    Run,
    duration,
    latest,
    lowest_validation,
    number,
    outcome,
    state,
    validation,
)
from parts.report.sections import cell, escaped, markdown_table, visible

# Flags that say where things lie, or what is told of a run. Texts are compared by what is in them.
REPORTING = {
    "input_file",
    "val_file",
    "out_dir",
    "resume",
    "cache_dir",
    "log_every",
    "save_every",
    "sample_every",
}
REPORTING |= {
    "eval_every",
    "prompt",
    "num_prompts",
    "max_new_tokens",
    "top_k",
    "temperature",
    "tensorboard",
    "dry_run",
}


# ---------------------------------------------------------------------------------------------
# Which runs
# ---------------------------------------------------------------------------------------------


def is_glob(path: Path) -> bool:
    """Whether it is a pattern, which PowerShell and cmd leave as it is, and no name of something."""
    return glob.has_magic(str(path)) and not path.exists()


def find_runs(paths: tuple[Path, ...]) -> list[Path]:
    """The paths and, in order, the run directories that match the globs among them, each once. A file is left out: a
    shell that expands out/* names also what lies there beside the runs.

    Raises FileNotFoundError for what is not there.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        matches = [path] if path.is_dir() else []
        if is_glob(path):
            matches = [
                match
                for match in sorted(map(Path, glob.glob(str(path), recursive=True)))
                if holds_run(match)
            ]
            if not matches:
                raise FileNotFoundError(f"--out_dir {path}: no run directory matches")
        elif not path.exists():
            raise FileNotFoundError(f"--out_dir {path}: there is no such directory")
        for match in matches:
            found.setdefault(match.resolve(), match)
    if not found:
        raise FileNotFoundError(
            f"--out_dir {' '.join(map(str, paths))}: there is no run directory among them"
        )
    return list(found.values())


def holds_run(path: Path) -> bool:
    """Whether there is a run in this directory."""
    return (path / "logs" / "train_metrics.csv").is_file()


def absolute(path: Path) -> Path:
    """The path from the root on, its links kept, unless `..` follows one of them and leads elsewhere than it seems."""
    return path.resolve() if ".." in path.parts else Path(os.path.abspath(path))


def common_parent(paths: list[Path]) -> Path | None:
    """The deepest folder that holds all of these absolute paths; None under Windows, when they are on several
    drives."""
    try:
        common = Path(os.path.commonpath(paths))
    except ValueError:
        return None
    return common.parent if common in paths else common


def named(runs: list[Run]) -> dict[str, Run]:
    """The runs by what tells them apart, in the order of that: their paths from the common parent on."""
    places = {absolute(run.out_dir): run for run in runs}
    parent = common_parent(list(places))
    names = {
        (path.relative_to(parent) if parent else path).as_posix(): run
        for path, run in places.items()
    }
    return {name: names[name] for name in sorted(names)}


# ---------------------------------------------------------------------------------------------
# Whether they compare
# ---------------------------------------------------------------------------------------------

Identity = tuple[object, ...]


def training_text(run: Run, one_vocabulary: bool) -> Identity:
    """What tells training texts apart. The hash is that of the whole text; --max_tokens and --val_fraction cut it in
    tokens, so that with several vocabularies the first 1,000 tokens, say, are several texts."""
    sha256 = str(run.corpus.get("sha256"))
    if one_vocabulary:
        return sha256, number(run.corpus, "tokens")
    first = number(run.flags, "max_tokens") or 0
    return sha256, first, run.vocabulary if first else "", number(run.flags, "val_fraction") or 0


def validation_text(run: Run, one_vocabulary: bool) -> Identity:
    """What tells held-out texts apart; without a hash of --val_file, which older programs did not keep, its name."""
    if names := run.flags.get("val_file"):
        return (str(run.corpus.get("val_sha256") or names),)
    return *training_text(run, one_vocabulary), number(run.flags, "val_fraction") or 0


def odd_one(
    runs: dict[str, Run], text: Callable[[Run, bool], Identity], one_vocabulary: bool
) -> str | None:
    """The name of a run whose text is not that of the first; None when all have the same."""
    texts = {name: text(run, one_vocabulary) for name, run in runs.items()}
    first = next(iter(texts.values()))
    return next((name for name in texts if texts[name] != first), None)


def described(run: Run) -> str:
    """A training text in words."""
    file, sha256, tokens = (run.corpus.get(key) for key in ("file", "sha256", "tokens"))
    return visible(
        f"{file}, sha256 {str(sha256)[:12]}, {tokens} tokens of {run.flags.get('tokenizer', 'gpt2')}"
    )[:120]


def check_comparable(runs: dict[str, Run], one_vocabulary: bool) -> None:
    """Raises ValueError for a run whose text is not known, or has no losses in the unit that they need."""
    for name, run in runs.items():
        if not isinstance(run.corpus.get("sha256"), str):
            raise ValueError(
                f"{visible(name)}: no config.json says which text this run learned, so that its loss compares with no "
                "other: leave it out"
            )
        if not one_vocabulary and "bits_per_byte" not in run.metrics:
            raise ValueError(
                f"{visible(name)}: vocabularies differ among the runs, and the older train.py that wrote this one kept "
                "no bits per byte, the unit in which they compare: leave it out"
            )


def compare(found: list[Run]) -> "Comparison":
    """Runs in the order of their validation losses, if all have one, on one text; else of their corpus losses.

    Losses on different texts are refused, in bits per byte as well: one text is easier to predict than another, so
    that a difference would say nothing of the runs. One text in several vocabularies compares in bits per byte; runs
    with one --val_file compare by their validation losses, whatever they learned.

    Raises ValueError.
    """
    runs = named(found)
    first, one_vocabulary = next(iter(runs)), len({run.vocabulary for run in runs.values()}) == 1
    check_comparable(runs, one_vocabulary)
    without = [name for name, run in runs.items() if validation(run).empty]
    held_out = None if without else odd_one(runs, validation_text, one_vocabulary)
    learned = odd_one(runs, training_text, one_vocabulary)
    by_validation = not without and held_out is None
    if learned and not by_validation:
        raise ValueError(
            f"{visible(first)} and {visible(learned)} learned different texts ({described(runs[first])}; "
            f"{described(runs[learned])}), on which losses do not compare: choose runs on one text, or with one "
            "--val_file"
        )
    notes = []
    if not one_vocabulary:
        notes.append("Losses are in bits per byte, because the vocabularies differ.")
    if not one_vocabulary and by_validation and not runs[first].flags.get("val_file"):
        notes.append(
            "Each run holds out the same part of its own tokens, which is nearly the same text."
        )
    if held_out:
        notes.append(
            f"Not by validation loss: {visible(first)} and {visible(held_out)} hold out different texts."
        )
    elif 0 < len(without) < len(runs):
        notes.append(f"Not by validation loss: {visible(without[0])} has none.")
    if learned:
        notes.append(
            f"{visible(first)} and {visible(learned)} learned different texts: only validation losses compare."
        )
    loss = lowest_validation_loss if by_validation else corpus_loss
    losses = {name: loss(run, not one_vocabulary) for name, run in runs.items()}
    return Comparison(
        {
            name: runs[name]
            for name in sorted(runs, key=lambda name: (losses[name] or (math.inf,), name))
        },
        losses,
        "lowest validation loss" if by_validation else "corpus loss",
        "nats per token" if one_vocabulary else "bits per byte",
        learned is None,
        notes,
    )


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------

Measured = tuple[float, str]  # a loss, and its cell


def lowest_validation_loss(run: Run, bits: bool) -> Measured | None:
    """That of the measurement whose weights are best.pt, with its standard error once that is in results.json; None
    before the first."""
    if (row := lowest_validation(run)) is None:
        return None
    value = row.get("val_bits_per_byte" if bits else "val_loss", math.nan)
    measured = row["step"] == number(run.results, "best_step")
    error = number(run.results, "best_loss_standard_error") if measured else None
    words = with_error(value, error, row["val_loss"])
    return (value, f"{words} at step {row['step']:,.0f}") if value == value else None


def corpus_loss(run: Run, bits: bool) -> Measured | None:
    """Mean and standard error over random slices; None until the run is over, and again when it goes on."""
    nats, error = (
        number(run.results, key) for key in ("corpus_loss", "corpus_loss_standard_error")
    )
    value = number(run.results, "bits_per_byte") if bits else nats
    if value is None or not nats or state(run) == "running":
        return None
    return value, with_error(value, error, nats)


def with_error(value: float, error: float | None, nats: float) -> str:
    """A loss in its unit, with its standard error where that is known, which like `nats` is in nats per token."""
    return f"{value:.4f}" + ("" if error is None else f" ± {error * value / nats:.4f}")


@dataclass(frozen=True)
class Comparison:
    """Runs that compare, and by what."""

    runs: dict[str, Run]  # by name, in the table's order
    losses: dict[str, Measured | None]
    label: str  # of these losses
    unit: str  # of all losses, also of those that are drawn
    one_text: bool  # all learned the same; if not, their training losses do not compare
    notes: list[str]  # sentences below the table, for a terminal

    def table(self) -> list[list[str]]:
        """Header and rows."""
        flags = differing_flags(
            list(self.runs.values()), REPORTING if self.one_text else REPORTING - {"input_file"}
        )
        header = ["run", f"{self.label}, {self.unit}", "tokens", "time", "outcome", *flags]
        return [
            header,
            *(
                [name, *self.cells(name), *(shown(self.runs[name], flag) for flag in flags)]
                for name in self.runs
            ),
        ]

    def cells(self, name: str) -> list[str]:
        """What came of a run."""
        run, loss = self.runs[name], self.losses[name]
        tokens, elapsed = latest(run, "tokens", "tokens"), latest(run, "elapsed_sec", "elapsed_sec")
        unmeasured = (
            f"none: {how}"
            if (how := state(run)) in ("running", "interrupted", "failed")
            else "none"
        )
        return [
            unmeasured if loss is None else loss[1],
            "" if tokens is None else f"{tokens:,.0f}",
            "" if elapsed is None else duration(elapsed),
            outcome_with_window(run),
        ]

    def markdown(self) -> str:
        """The table for a README, and the notes."""
        header, *rows = [[cell(text) for text in row] for row in self.table()]
        return "\n\n".join([markdown_table(header, rows, align="---"), *map(escaped, self.notes)])

    def text(self) -> str:
        """The same for a terminal: columns aligned, numbers to the right and all else to the left."""
        columns = []
        for column in zip(*self.table(), strict=True):
            texts = [visible(text) for text in column]
            width, numeric = (
                max(map(len, texts)),
                all(re.fullmatch(r"[\d.,:e+-]*", text) for text in texts[1:]),
            )
            columns.append([text.rjust(width) if numeric else text.ljust(width) for text in texts])
        lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
        return "\n".join([*lines, *([""] * bool(self.notes)), *self.notes])


def outcome_with_window(run: Run) -> str:
    """What came of a run; of one that reached its target also the window_loss, beside the loss on random slices."""
    window_loss = number(run.results, "window_loss") if state(run) == "target" else None
    return outcome(run) + ("" if window_loss is None else f" (window_loss {window_loss:.4f})")


def shown(run: Run, flag: str) -> str:
    """A flag's value as the table has it; its values, where it changed when the run was continued."""
    values = (
        written(flags.get(flag, "unknown")) for flags in run.flags_over_time
    )  # unknown to an older program
    return ", then ".join(value for value, _ in groupby(values))


def written(value: object) -> str:
    """A value as the table has it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def differing_flags(runs: list[Run], left_out: set[str]) -> list[str]:
    """The flags that were typed in one of the runs and are not the same in all; some are left out."""
    flags = dict.fromkeys(flag for run in runs for flag in run.flags if flag not in left_out)
    typed = set().union(*(run.typed for run in runs))
    return [flag for flag in flags if flag in typed and len({shown(run, flag) for run in runs}) > 1]
