"""Several runs side by side: whether they compare, in which unit and order, and by which flags."""

import glob
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from parts.commandline import encode_escapes
from parts.flags import ReportingFlags
from parts.progress import COMPLETE, StopReason
from parts.recipe import OF_ONE_START
from parts.report import reader
from parts.report.reader import Run, last_value, numbers_in, state, validation
from parts.report.sections import escaped, markdown_table
from parts.run.layout import RunPaths
from parts.text.files import is_glob

# Flags that change no step of a run. Texts are compared by what is in them.
REPORTING = {field.name for field in fields(ReportingFlags)} | OF_ONE_START
REPORTING |= {"input_file", "val_file", "cache_dir", "eval_every"}


def find_runs(paths: tuple[Path, ...]) -> list[Path]:
    """The folders among the paths, and the runs that match the globs. Raises FileNotFoundError."""
    found: dict[Path, Path] = {}
    for path in paths:
        if is_glob(path):
            matched = map(Path, sorted(glob.glob(str(path), recursive=True)))
            matches = [match for match in matched if RunPaths(match).metrics_csv.is_file()]
            if not matches:
                raise FileNotFoundError(f"--out_dir {path}: no run directory matches")
        elif path.exists():
            matches = [path] if path.is_dir() else []  # a shell's out/* has files, too
        else:
            raise FileNotFoundError(f"--out_dir {path}: there is no such directory")
        for match in matches:
            found.setdefault(match.resolve(), match)
    if not found:
        asked = " ".join(map(str, paths))
        raise FileNotFoundError(f"--out_dir {asked}: there is no run directory among them")
    return list(found.values())


def common_parent(runs: list[Run]) -> Path | None:
    """The deepest folder that holds all of the runs; None when they are on several drives."""
    places = [run.out_dir.resolve() for run in runs]
    try:
        common = Path(os.path.commonpath(places))
    except ValueError:
        return None
    return common.parent if common in places else common


def by_name(runs: list[Run]) -> dict[str, Run]:
    """The runs by their paths from the common parent on, nothing hidden, in the order of these."""
    parent = common_parent(runs)
    named = {}
    for run in runs:
        path = run.out_dir.resolve()
        path = path.relative_to(parent) if parent else path
        named[encode_escapes(path.as_posix())] = run
    return dict(sorted(named.items()))


Identity = tuple[object, ...]


def training_text(run: Run) -> Identity:
    """What tells training texts apart: the whole text, and which part of it, which is in tokens."""
    first = numbers_in(run.flags).get("max_tokens", 0)
    held_out = numbers_in(run.flags).get("val_fraction", 0)
    return str(run.corpus.get("sha256")), first, held_out, run.vocabulary if first else ""


def validation_text(run: Run) -> Identity:
    """What tells held-out texts apart."""
    own_text = bool(run.flags.get("val_file"))
    return (str(run.corpus.get("val_sha256")),) if own_text else training_text(run)


def odd_one(runs: dict[str, Run], text: Callable[[Run], Identity]) -> str | None:
    """The name of a run whose text is not that of the first; None when all have the same."""
    texts = {name: text(run) for name, run in runs.items()}
    first = next(iter(texts.values()))
    return next((name for name in texts if texts[name] != first), None)


def text_words(run: Run) -> str:
    """A training text in words."""
    file, sha256, tokens = (run.corpus.get(key) for key in ("file", "sha256", "tokens"))
    vocabulary = run.flags.get("tokenizer", "gpt2")
    words = f"{file}, sha256 {str(sha256)[:12]}, {tokens} tokens of {vocabulary}"
    return encode_escapes(words)[:120]


class Loss(NamedTuple):
    """What a run is ranked by, and its words in the table."""

    value: float
    words: str


def lowest_validation_loss(run: Run, bits: bool) -> Loss | None:
    """The loss of best.pt, with its standard error once results.json has that; None before it."""
    row = reader.lowest_validation(run)
    if row is None:
        return None
    value = row.get("val_bits_per_byte" if bits else "val_loss", math.nan)
    if math.isnan(value):
        return None
    is_published = row["step"] == run.numbers.get("best_step")
    error = run.numbers.get("best_loss_standard_error") if is_published else None
    return Loss(value, f"{with_error(value, error, row['val_loss'])} at step {row['step']:,.0f}")


def corpus_loss(run: Run, bits: bool) -> Loss | None:
    """Mean over random slices; None until the run is over, and again when it goes on."""
    nats = run.numbers.get("corpus_loss")
    value = run.numbers.get("bits_per_byte") if bits else nats
    if value is None or not nats or state(run) == StopReason.RUNNING:
        return None
    error = run.numbers.get("corpus_loss_standard_error")
    return Loss(value, with_error(value, error, nats))


def with_error(value: float, error: float | None, nats: float) -> str:
    """A loss in its unit, with its standard error, which like `nats` is in nats per token."""
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error * value / nats:.4f}"


@dataclass(frozen=True)
class Comparison:
    """Runs that compare, and by what."""

    runs: dict[str, Run]  # by name, in the table's order
    losses: dict[str, Loss | None]
    label: str  # of these losses
    unit: str  # of all losses, also of those that are drawn
    one_text: bool  # all learned the same; if not, their training losses do not compare
    notes: list[str]  # sentences below the table, for a terminal

    @classmethod
    def of(cls, found: list[Run]) -> "Comparison":
        """Runs in the order of their validation losses, if all have one, on one text; else of
        their corpus losses.

        Losses on different texts are refused: one text is easier to predict than another. One text
        in several vocabularies compares in bits per byte. Runs with one --val_file compare by
        their validation losses, whatever they learned. Raises ValueError.
        """
        runs = by_name(found)
        for name, run in runs.items():
            if not isinstance(run.corpus.get("sha256"), str):
                raise ValueError(
                    f"{name}: no config.json says which text this run learned, so that its loss "
                    "compares with no other: leave it out"
                )
        first = next(iter(runs))
        one_vocabulary = len({run.vocabulary for run in runs.values()}) == 1
        without = [name for name, run in runs.items() if validation(run).empty]
        held_out = None if without else odd_one(runs, validation_text)
        learned = odd_one(runs, training_text)
        by_validation = not without and held_out is None
        if learned and not by_validation:
            texts = f"{text_words(runs[first])}; {text_words(runs[learned])}"
            raise ValueError(
                f"{first} and {learned} learned different texts ({texts}), on which losses do not "
                "compare: choose runs on one text, or with one --val_file"
            )
        notes = []
        if not one_vocabulary:
            notes.append("Losses are in bits per byte, because the vocabularies differ.")
            if by_validation and not runs[first].flags.get("val_file"):
                part = "the same part of its own tokens, which is nearly the same text"
                notes.append(f"Each run holds out {part}.")
        if held_out:
            notes.append(
                f"Not by validation loss: {first} and {held_out} hold out different texts."
            )
        elif without and len(without) < len(runs):
            notes.append(f"Not by validation loss: {without[0]} has none.")
        if learned:
            pair = f"{first} and {learned}"
            notes.append(f"{pair} learned different texts: only validation losses compare.")
        loss_of = lowest_validation_loss if by_validation else corpus_loss
        losses = {name: loss_of(run, not one_vocabulary) for name, run in runs.items()}
        ranked = sorted(runs, key=lambda name: losses[name] or Loss(math.inf, ""))
        label = "lowest validation loss" if by_validation else "corpus loss"
        unit = "nats per token" if one_vocabulary else "bits per byte"
        in_order = {name: runs[name] for name in ranked}
        return cls(in_order, losses, label, unit, learned is None, notes)

    def table(self) -> list[list[str]]:
        """Header and rows, in which nothing is hidden."""
        left_out = REPORTING if self.one_text else REPORTING - {"input_file"}
        flags = differing_flags(list(self.runs.values()), left_out)
        header = ["run", f"{self.label}, {self.unit}", "tokens", "time", "outcome"]
        header += map(encode_escapes, flags)
        return [header, *(self.row(name, flags) for name in self.runs)]

    def row(self, name: str, flags: list[str]) -> list[str]:
        """What came of a run, and the values of these flags."""
        run, loss, how = self.runs[name], self.losses[name], state(self.runs[name])
        none = "none" if how in (*COMPLETE, "unknown") else f"none: {how}"
        tokens, elapsed = last_value(run, "tokens"), last_value(run, "elapsed_sec")
        window = ""
        if how == StopReason.TARGET and "window_loss" in run.numbers:
            window = f" (window_loss {run.numbers['window_loss']:.4f})"
        return [
            name,
            none if loss is None else loss.words,
            "" if tokens is None else f"{tokens:,.0f}",
            "" if elapsed is None else reader.duration(elapsed),
            reader.outcome(run) + window,
            *(flag_values(run, flag) for flag in flags),
        ]

    def markdown(self) -> str:
        """The table for a README, and the notes."""
        header, *rows = [[escaped(text[:200]) for text in row] for row in self.table()]
        return "\n\n".join([markdown_table(header, rows, align="---"), *map(escaped, self.notes)])

    def text(self) -> str:
        """The table for a terminal: columns aligned, numbers to the right, all else to the left."""
        columns = []
        for column in zip(*self.table(), strict=True):
            width = max(map(len, column))
            is_numeric = all(re.fullmatch(r"[\d.,:e+-]*", text) for text in column[1:])
            columns.append([f"{text:{'>' if is_numeric else '<'}{width}}" for text in column])
        lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
        return "\n".join([*lines, "", *self.notes] if self.notes else lines)


def flag_values(run: Run, flag: str) -> str:
    """A flag's value in the table; its values, where it changed when the run was continued."""
    words = []
    for flags in run.flags_over_time:
        value = flags.get(flag, "unknown")
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        words.append(f"{value:.6g}" if isinstance(value, float) else str(value))
    return encode_escapes(", then ".join(word for word, _ in groupby(words)))


def differing_flags(runs: list[Run], left_out: set[str]) -> list[str]:
    """The flags that were typed in one of the runs and are not the same in all; some left out."""
    flags = dict.fromkeys(flag for run in runs for flag in run.flags if flag not in left_out)
    typed = set().union(*(run.typed for run in runs))
    return [
        flag
        for flag in flags
        if flag in typed and len({flag_values(run, flag) for run in runs}) > 1
    ]
