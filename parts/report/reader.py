"""What a run directory holds, read without PyTorch, also while train.py writes into it."""

import json
import math
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import pandas as pd

from parts.flags import BY_USER
from parts.progress import StopReason, overfits
from parts.run.layout import RunPaths, SampleBlock, sample_blocks

MEASURE = {"val_fraction", "val_sha256", "seq_len"}  # what changes how validation is measured
OUTCOMES: dict[str, str] = {  # reasons to stop, of results.json
    StopReason.TARGET: "target reached",
    StopReason.PATIENCE: "stopped, since the validation loss fell no further",
    StopReason.STEPS: "all steps done",
    StopReason.INTERRUPTED: "interrupted, to be continued",
    StopReason.FAILED: "failed; the last good checkpoint is intact",
}


@dataclass(frozen=True)
class Run:
    """What a run directory holds so far; whatever is not there yet is empty."""

    out_dir: Path
    metrics: pd.DataFrame  # numeric columns, NaN where a field is empty
    results: dict
    config: dict
    log: str
    samples: list[SampleBlock]
    vocabulary: str  # what tells it from others

    @property
    def flags(self) -> dict:
        """The resolved flags of config.json."""
        return dict_in(self.config, "config")

    @property
    def losses(self) -> pd.DataFrame:
        """The rows with a loss that can be drawn."""
        return self.metrics[self.metrics["loss"] > 0]

    @cached_property
    def numbers(self) -> dict[str, float]:
        """The finite numbers of results.json."""
        return numbers_in(self.results)

    @property
    def corpus(self) -> dict:
        """What config.json says of the text."""
        return dict_in(self.config, "corpus")

    @property
    def typed(self) -> set[str]:
        """The flags that were typed, at this start or an earlier one."""
        origins = dict_in(self.config, "origins")
        return {name for name in origins if dict_in(origins, name).get("from") in BY_USER}

    @property
    def launches(self) -> list[dict]:
        """What config.json says of each start, oldest first."""
        launches = self.config.get("launches")
        if not isinstance(launches, list):
            return []
        return [launch for launch in launches if isinstance(launch, dict)]

    @cached_property
    def changes(self) -> list[tuple[float, dict]]:
        """What changed when the run was continued, oldest first: from which step, and old values.

        A start takes back what was done behind the checkpoint from which it goes on.
        """
        found: list[tuple[float, dict]] = []
        for launch in self.launches:
            first = numbers_in(launch).get("first_step")
            if first is not None:
                changed = dict_in(launch, "changed")
                found = [earlier for earlier in found if earlier[0] < first]
                found += [(first, changed)] if changed else []
        return found

    @cached_property
    def flags_over_time(self) -> list[dict]:
        """The flags of each part of the run, oldest first; the last are `flags`."""
        parts = [self.flags]
        for _first, changed in reversed(self.changes):
            parts.insert(0, parts[0] | changed)
        return parts


def dict_in(values: dict, key: str) -> dict:
    """The object under a key; empty when it is missing or something else."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def numbers_in(values: dict) -> dict[str, float]:
    """The finite numbers of an object; whatever else it holds is left out."""
    numbers = {key: value for key, value in values.items() if type(value) in (int, float)}
    return {key: float(value) for key, value in numbers.items() if -1e300 < value < 1e300}


def read_run(out_dir: Path) -> Run:
    """Read a run directory, also one that is still being written.

    Raises FileNotFoundError when there is no run, ValueError when a file is not what it should be.
    """
    paths = RunPaths(out_dir)
    if not paths.metrics_csv.is_file():
        missing = paths.metrics_csv.as_posix()
        raise FileNotFoundError(
            f"--out_dir {out_dir}: there is no run (no {missing}); name a run directory"
        )
    own_vocabulary = dict_in(json_object(paths.tokenizer_json), "model").get("vocab", "gpt2")
    return Run(
        out_dir,
        read_metrics(paths.metrics_csv),
        json_object(paths.results_json),
        json_object(paths.config_json),
        growing_text(paths.train_log),
        sample_blocks(growing_text(paths.samples_txt)),
        json.dumps(own_vocabulary, sort_keys=True),  # whatever the file's form
    )


def growing_text(path: Path) -> str:
    """Text of a growing file, bad bytes replaced and line ends \\n; empty when it is not there.

    Zeros are left out: a power cut may put them in place of lines.
    """
    data = path.read_bytes().replace(b"\0", b"") if path.exists() else b""
    return data.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")


def json_object(path: Path) -> dict:
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
    """The CSV of a run, sorted by step, without rows that are cut short.

    Raises ValueError when the columns step and loss are missing.
    """
    text = growing_text(path)
    rows = [line.split(",") for line in text[: text.rfind("\n") + 1].splitlines()]
    header = rows[0] if rows else []
    if not {"step", "loss"} <= set(header) or len(set(header)) < len(header):
        raise ValueError(f"{path.as_posix()}: the first line names no columns step and loss")
    whole = [row for row in rows[1:] if len(row) == len(header)]
    table = pd.DataFrame(whole, columns=header).apply(pd.to_numeric, errors="coerce").astype(float)
    table = table.replace([math.inf, -math.inf], math.nan).dropna(subset=["step"])
    return table.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds))) if abs(seconds) < 1e12 else f"{seconds:.3g} s"


def has_values(table: pd.DataFrame, column: str) -> bool:
    """Whether the column is there and not empty."""
    return column in table and bool(table[column].notna().any())


def validation(run: Run) -> pd.DataFrame:
    """The rows with a validation loss that compare: on the present text, at the present seq_len."""
    if not has_values(run.metrics, "val_loss"):
        return run.metrics.iloc[:0]
    since = max((first for first, changed in run.changes if MEASURE & changed.keys()), default=0)
    return run.metrics[run.metrics["val_loss"].notna() & (run.metrics["step"] >= since)]


def lowest_validation(run: Run) -> pd.Series | None:
    """The row of the lowest validation loss, whose weights are best.pt; None before the first."""
    measured = validation(run)
    return measured.loc[measured["val_loss"].idxmin()] if len(measured) else None


def overfitting(run: Run) -> float | None:
    """The step of the lowest validation loss, if the model overfits since; else None."""
    lowest = lowest_validation(run)
    if lowest is None:
        return None
    latest = validation(run).iloc[-1]["val_loss"]
    training = training_loss(run.metrics).iloc[-1]
    return lowest["step"] if overfits(latest, lowest["val_loss"], training) else None


def training_loss(table: pd.DataFrame) -> pd.Series:
    """The window_loss; before a first window is full, the loss of single steps."""
    return table["window_loss" if has_values(table, "window_loss") else "loss"]


def last_value(run: Run, column: str) -> float | None:
    """The value of a growing number in the last row; None before the first."""
    return float(run.metrics[column].max()) if has_values(run.metrics, column) else None


def state(run: Run) -> str:
    """How the run stands: a key of `OUTCOMES`, running, or unknown. A killed run looks running."""
    reason = run.results.get("stop_reason")
    went_on = run.metrics["step"].max() > run.numbers.get("final_step", math.inf)
    if reason == StopReason.RUNNING or went_on or (run.config and not run.results):
        return StopReason.RUNNING
    return reason if isinstance(reason, str) and reason in OUTCOMES else "unknown"


def outcome(run: Run) -> str:
    """What came of the run, in words."""
    how, step = state(run), last_value(run, "step")
    if how == StopReason.RUNNING:
        return f"running, as of step {step:,.0f}" if step else "running, before its first row"
    target = run.numbers.get("target_loss", 0)
    if how == StopReason.TARGET and run.numbers.get("corpus_loss", 0) > target:
        return "target reached by window_loss alone"  # the classic rule
    missed = ", target not reached" if how == StopReason.STEPS and target > 0 else ""
    return OUTCOMES.get(how, how) + missed
