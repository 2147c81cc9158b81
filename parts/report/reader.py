"""What a run directory holds, read without PyTorch, also while train.py writes into it."""

import json
import math
import re
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import pandas as pd

from parts.run.layout import BEGINNING

LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+ \| [A-Z]+ \| ", re.MULTILINE)
FLAG = re.compile(r"(?<!\S)--([a-zA-Z][\w-]*)")  # on a command line
TYPED = ("typed", "kept from the run so far")  # origins: what is kept was typed at an earlier start
MEASURE = {"val_fraction", "val_sha256", "seq_len"}  # what changes how validation is measured
OUTCOMES = {  # reasons to stop, of results.json
    "target": "target reached",
    "patience": "stopped, since the validation loss fell no further",
    "steps": "all steps done",
    "interrupted": "interrupted, to be continued",
    "failed": "failed; the last good checkpoint is intact",
}


@dataclass(frozen=True)
class Run:
    """What a run directory holds so far; whatever is not there yet is empty."""

    out_dir: Path
    metrics: pd.DataFrame  # numeric columns, NaN where a field is empty
    results: dict
    config: dict
    log: str
    samples: str
    vocabulary: str  # what tells it from others

    @property
    def flags(self) -> dict:
        """The resolved flags, of config.json."""
        flags = self.config.get("config")
        return flags if isinstance(flags, dict) else {}

    @property
    def typed(self) -> set[str]:
        """The flags that were typed, at any start: by the commands, and where there are none by the origins."""
        commands = [
            one["command"]
            for one in self.launches or [self.config]
            if isinstance(one.get("command"), str)
        ]
        if commands:
            return {
                word.replace("-", "_") for command in commands for word in FLAG.findall(command)
            }
        origins = self.config.get("origins")
        found = origins.items() if isinstance(origins, dict) else ()
        return {
            name
            for name, origin in found
            if isinstance(origin, dict) and origin.get("from") in TYPED
        }

    @property
    def launches(self) -> list[dict]:
        """What config.json says of each start, oldest first."""
        launches = self.config.get("launches")
        return (
            [launch for launch in launches if isinstance(launch, dict)]
            if isinstance(launches, list)
            else []
        )

    @property
    def corpus(self) -> dict:
        """What config.json says of the text."""
        corpus = self.config.get("corpus")
        return corpus if isinstance(corpus, dict) else {}

    @cached_property
    def changes(self) -> list[tuple[float, dict]]:
        """What changed when the run was continued, oldest first: the step from which on, and what changed, each with
        its value until then.

        A start takes back what was done behind the checkpoint from which it goes on.
        """
        found: list[tuple[float, dict]] = []
        for launch in self.launches:
            if (first := number(launch, "first_step")) is not None:
                changed = launch.get("changed")
                found = [earlier for earlier in found if earlier[0] < first]
                found += [(first, changed)] if changed and isinstance(changed, dict) else []
        return found

    @cached_property
    def flags_over_time(self) -> list[dict]:
        """The flags of each part of the run, oldest first; the last are `flags`."""
        parts = [self.flags]
        for _, changed in reversed(self.changes):
            parts.insert(0, parts[0] | changed)
        return parts


def read_run(out_dir: Path) -> Run:
    """Read a run directory, also one that is still being written.

    Raises FileNotFoundError when there is no run, ValueError when a file is not what it should be.
    """
    csv, samples = out_dir / "logs" / "train_metrics.csv", out_dir / "samples" / "samples.txt"
    if not csv.is_file():
        raise FileNotFoundError(
            f"--out_dir {out_dir}: there is no run (no {csv.as_posix()}); name a run directory"
        )
    model = read_json(out_dir / "tokenizer.json").get("model")  # of an own vocabulary
    ids = model.get("vocab") if isinstance(model, dict) else "gpt2"
    return Run(
        out_dir,
        read_metrics(csv),
        read_json(out_dir / "results.json"),
        read_json(out_dir / "config.json"),
        read_text(out_dir / "logs" / "train.log", LOG_LINE, "line with a date and a level"),
        read_text(samples, BEGINNING, "block of samples (80 '=', then STEP and a number)"),
        json.dumps(ids, sort_keys=True),  # whatever the file's form
    )


def read_text(path: Path, pattern: re.Pattern, what: str) -> str:
    """Text of a UTF-8 file with \\n line ends; empty when there is no file.

    Raises ValueError when there is text and the pattern is nowhere in it.
    """
    if not path.exists():
        return ""
    text = "\n".join(read_written(path).splitlines())
    if text.strip() and not pattern.search(text):
        raise ValueError(
            f"{path.as_posix()} has no {what}: it was not written by train.py; move it away"
        )
    return text


def read_written(path: Path) -> str:
    """Text of a growing file, bad bytes replaced. Zeros are left out: a power cut may put them in place of lines."""
    return path.read_bytes().replace(b"\0", b"").decode("utf-8", errors="replace")


def read_json(path: Path) -> dict:
    """A JSON object; empty when there is no file. Raises ValueError when it is something else."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.as_posix()} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path.as_posix()} holds no JSON object")
    return values


def read_metrics(path: Path) -> pd.DataFrame:
    """The CSV of a run, sorted by step; a last line that was cut short is left out.

    Raises ValueError when the columns step and loss are missing.
    """
    text = read_written(path).lstrip("\ufeff")
    rows = [line.split(",") for line in text[: text.rfind("\n") + 1].splitlines()]
    header, rows = (rows[0], rows[1:]) if rows else ([], [])
    if not {"step", "loss"} <= set(header) or len(set(header)) < len(header):
        raise ValueError(f"{path.as_posix()}: the first line names no columns step and loss")
    table = pd.DataFrame([row for row in rows if len(row) == len(header)], columns=header)
    table = table.apply(pd.to_numeric, errors="coerce").astype(float)
    table = table.replace([math.inf, -math.inf], math.nan).dropna(subset=["step"])
    return table.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds))) if abs(seconds) < 1e12 else f"{seconds:.3g} s"


def validation(run: Run) -> pd.DataFrame:
    """The rows with a validation loss that compare: those measured on the present text, at the present seq_len."""
    if not has_values(run.metrics, "val_loss"):
        return run.metrics.iloc[:0]
    since = max((first for first, changed in run.changes if MEASURE & changed.keys()), default=0)
    return run.metrics[run.metrics["val_loss"].notna() & (run.metrics["step"] >= since)]


def lowest_validation(run: Run) -> pd.Series | None:
    """The row of the lowest validation loss, whose weights are best.pt; None before the first.

    What is lower, and before the best step of results.json, had a best.pt that was lost, or another text under the
    same name, of which older programs told nothing.
    """
    measured = validation(run)
    if run.results.get("best_metric") == "val_loss":
        later = measured[measured["step"] >= (number(run.results, "best_step") or 0)]
        measured = later if len(later) else measured
    return measured.loc[measured["val_loss"].idxmin()] if len(measured) else None


def overfitting(run: Run) -> float | None:
    """The step of the lowest validation loss, if it has risen since by more than a hundredth while the training loss
    went on falling."""
    if (lowest := lowest_validation(run)) is None:
        return None
    last = validation(run).iloc[-1]
    risen = (
        last["val_loss"] > 1.01 * lowest["val_loss"]
        and smoothed(run.metrics)[0].iloc[-1] < lowest["val_loss"]
    )
    return lowest["step"] if risen else None


def has_values(table: pd.DataFrame, column: str) -> bool:
    """Whether the column is there and not empty."""
    return column in table and bool(table[column].notna().any())


def smoothed(table: pd.DataFrame) -> tuple[pd.Series, str]:
    """The run's own window_loss; for a CSV without one, a running mean over rows. And its name, if it has one."""
    if has_values(table, "window_loss"):
        return table["window_loss"], "window_loss"
    rows = max(1, len(table) // 20)
    return table["loss"].rolling(
        rows, min_periods=1
    ).mean(), f"mean of {rows} rows" if rows > 1 else ""


def number(values: dict, key: str) -> float | None:
    """A finite number, or None when the key is missing or something else."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        return None
    return float(value)


def latest(run: Run, column: str, key: str) -> float | None:
    """How far a growing number has come: rows are written at once, results.json at saves and at the end."""
    last = run.metrics[column].max() if has_values(run.metrics, column) else None
    return max(
        (float(value) for value in (last, number(run.results, key)) if value is not None),
        default=None,
    )


def state(run: Run) -> str:
    """How the run stands: a key of `OUTCOMES`, running, or unknown. A run that was killed looks like one that runs."""
    reason, saved, rows = (
        run.results.get("stop_reason"),
        number(run.results, "final_step"),
        run.metrics["step"],
    )
    going_on = (
        bool(run.config)
        if not run.results
        else saved is not None and len(rows) and rows.iloc[-1] > saved
    )
    if going_on or reason == "running":
        return "running"
    return reason if isinstance(reason, str) and reason in OUTCOMES else "unknown"


def outcome(run: Run) -> str:
    """The same in words."""
    how, step = state(run), latest(run, "step", "final_step")
    if how == "running":
        return (
            "running, before its first row" if step is None else f"running, as of step {step:,.0f}"
        )
    target = number(run.results, "target_loss") or 0
    corpus_loss = number(run.results, "corpus_loss")
    if how == "target" and corpus_loss is not None and corpus_loss > target:
        return "target reached by window_loss alone"  # by the classic rule, or by an older train.py
    missed = how == "steps" and target > 0
    return OUTCOMES.get(how, how) + ", target not reached" * missed
