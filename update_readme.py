"""Fill the marked sections of a README from a run directory, and draw its loss curve.

    python update_readme.py --out_dir out/gpt2 --readme README.md
    python update_readme.py --out_dir out/gpt2 --readme README.md --check    # exit 1 when stale

A section stands between two lines, `<!--AUTO:NAME:START-->` and `<!--AUTO:NAME:END-->`, where NAME
is PLOT, SUMMARY, LOGS, METRICS, SAMPLES or REPRO; a README has whichever of them it likes. Inside
fenced code, such lines are ordinary text. The same run gives the same bytes, and nothing outside the
sections moves. Only files are read: no torch, no clock.
"""

import difflib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from parts.start import packages_of

with packages_of("update_readme.py", __name__):
    import pandas as pd

    from parts.config import read_flags
    from parts.files import replacing
    from parts.readme import cell, filled, markdown_table, preformatted, read_readme, shortened, write_text
    from parts.runs import (
        SAMPLES_BLOCK,
        Run,
        duration,
        has_values,
        number,
        overfitting,
        read_run,
        smoothed,
    )

LOG_LINES, SAMPLE_LINES, TABLE_ROWS, LAUNCHES = 20, 60, 12, 10

LEVELS = (("ln_vocab", "ln V", "#969696"), ("target_loss", "target", "#238b45"), ("loss_floor", "floor", "#cb181d"))
OUTCOMES = {
    "target": "target reached",
    "patience": "stopped, since the validation loss fell no further",
    "steps": "all steps done, target not reached",
    "running": "still running at the last save",
    "interrupted": "interrupted, to be continued",
    "failed": "failed; the last good checkpoint is intact",
}
COLUMNS: dict[str, Callable[[float], str]] = {  # of the METRICS table
    "step": "{:,.0f}".format,
    "loss": "{:.4f}".format,
    "window_loss": "{:.4f}".format,
    "val_loss": "{:.4f}".format,
    "val_perplexity": "{:,.2f}".format,
    "lr": "{:.2e}".format,
    "grad_norm": "{:.3f}".format,
    "tokens_per_sec": "{:,.0f}".format,
    "tokens": "{:,.0f}".format,
    "elapsed_sec": duration,
}


# ---------------------------------------------------------------------------------------------
# The plot
# ---------------------------------------------------------------------------------------------


def draw_loss_curve(out_dir: Path) -> Path:
    """Draw logs/loss_curve.png: loss raw and smoothed, validation loss, learning rate, and lines at
    ln V, floor, target and best; whatever the run lacks is left out.

    Raises what `read_run` raises, and ValueError when no row has a loss yet.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    run = read_run(out_dir)
    table = run.metrics[run.metrics["loss"] > 0]
    if table.empty:
        raise ValueError(f"{out_dir.as_posix()}: no step has a loss yet")
    figure = Figure(figsize=(9, 5.2), dpi=110, layout="constrained")
    axis = figure.add_subplot()
    axis.plot("step", "loss", data=table, color="#9ecae1", linewidth=1, label="loss of one step")
    smooth, label = smoothed(table)
    axis.plot(table["step"], smooth, color="#08519c", linewidth=2, label=label)
    if has_values(table, "val_loss"):
        axis.plot("step", "val_loss", data=table.dropna(subset=["val_loss"]), color="#d94801", label="validation loss")
    drawn = [table["loss"].min(), table["loss"].max()]
    for key, name, colour in LEVELS:
        if (value := number(run.results, key)) and value > 0:
            far = value < drawn[0] / 5  # or it would press the curves together
            label = f"{name} {value:.5g}{', below' if far else ''}"
            axis.axhline(value, color=colour, linewidth=1, linestyle="--", label=label)
            drawn += [] if far else [value]
    best, step = number(run.results, "best_loss"), number(run.results, "best_step")
    if (start := overfitting(run)) is not None:
        axis.axvline(start, color="#d94801", linewidth=1, linestyle=":", label=f"overfitting from step {start:.0f}")
    if best and step and best > 0:
        axis.plot([step], [best], "*", color="#6a51a3", markersize=11, label=f"best {best:.4f} at step {step:.0f}")
        drawn.append(best)

    low, high = min(drawn) / 1.3, max(drawn) * 1.3
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    ticks = (digit * 10.0**exponent for exponent in range(-5, 4) for digit in (1, 2, 5))
    axis.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.grid(color="#e5e5e5", linewidth=0.6)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss, nats per token (log scale)")
    if has_values(table, "lr"):
        right = axis.twinx()
        right.plot("step", "lr", data=table, color="#fdae6b", linewidth=0.8, alpha=0.8, label="learning rate")
        right.set_ylabel("learning rate")
        right.set_ylim(bottom=0)
        right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axis.set_title(out_dir.resolve().name, fontsize=11)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)

    path = out_dir / "logs" / "loss_curve.png"
    with replacing(path, shared=True) as file:
        figure.savefig(file, format="png")
    return path


# ---------------------------------------------------------------------------------------------
# The sections
# ---------------------------------------------------------------------------------------------


def plot_section(run: Run, readme: Path) -> str:
    """The loss curve as an image, by a path relative to the README."""
    if not (run.metrics["loss"] > 0).any():
        return "No loss has been logged yet."
    path = run.out_dir / "logs" / "loss_curve.png"
    try:
        relative = os.path.relpath(path.resolve(), readme.resolve().parent)
    except ValueError as error:  # Windows: two drives
        raise ValueError(f"{path} and {readme} must be on one drive") from error
    return f"![Loss curve]({quote(Path(relative).as_posix())})"


def summary_section(run: Run, _readme: Path) -> str:
    """What came of the run, one figure a row."""
    r = {key: number(run.results, key) for key in run.results}
    last = run.metrics.iloc[-1] if len(run.metrics) else pd.Series(dtype=float)
    rows = []

    def add(label: str, form: str, *keys: str) -> None:
        values = [r.get(key) for key in keys]
        if None not in values:
            rows.append([label, form.format(*values)])

    flags, corpus = (run.config.get(key) for key in ("config", "corpus"))
    if isinstance(flags, dict):
        shape = ", ".join(f"{name} {flags.get(name)}" for name in ("n_layer", "n_head", "n_embd", "seq_len"))
        rows.append(["model", cell(f"{flags.get('preset')} ({shape})")])
        rows.append(["device", cell(", ".join(str(flags.get(name)) for name in ("device", "amp")))])
    if isinstance(corpus, dict):
        tokens = number(corpus, "tokens")
        rows.append(["corpus", cell(f"{corpus.get('file')}, {'?' if tokens is None else f'{tokens:,.0f}'} tokens")])
    reason = run.results.get("stop_reason")
    rows.append(["outcome", OUTCOMES.get(reason if isinstance(reason, str) else "", "unknown")])
    add("target (window_loss)", "{:g} over {:.0f} steps", "target_loss", "target_window")
    metric = "val_loss" if run.results.get("best_metric") == "val_loss" else "window_loss"
    add(f"best {metric}", "**{:.6f}** at step {:,.0f}", "best_loss", "best_step")
    add("last step", "loss {:.6f} at step {:,.0f}", "final_loss", "final_step")
    corpus_loss = ("corpus_loss", "corpus_loss_standard_error", "corpus_loss_slices")
    part = " of the training part" * (metric == "val_loss")
    add(f"corpus loss{part}", "{:.6f} ± {:.6f} (mean ± standard error, n = {:,.0f} random slices)", *corpus_loss)
    add("perplexity", "{:.4f}", "perplexity")
    add("bits per byte", "{:.4f}", "bits_per_byte")
    add("last val_loss", "{:.6f}, perplexity {:,.2f}", "val_loss", "val_perplexity")
    add("validation bits per byte", "{:.4f}", "val_bits_per_byte")
    if (start := overfitting(run)) is not None:
        rows.append(["overfitting", f"from step {start:,.0f} on the validation loss rose"])
    add("loss floor of this corpus and seq_len", "{:.4f}", "loss_floor")
    add("ln V (a model that knows nothing)", "{:.3f}", "ln_vocab")
    add("tokens trained", "{:,.0f} ({:,.1f} pseudo-epochs)", "tokens", "pseudo_epochs")
    add("parameters", "{:,.0f}", "parameters")
    elapsed = r.get("elapsed_sec") or last.get("elapsed_sec")
    if elapsed and elapsed == elapsed:
        rows.append(["time", duration(elapsed)])
        if tokens := r.get("tokens"):
            rows.append(["tokens per second, saves and samples included", f"{tokens / elapsed:,.0f}"])
    if not run.results and len(last):
        rows.append(["last row", f"loss {last['loss']:.6f} at step {last['step']:,.0f}"])
    return markdown_table(["", "result"], rows, align="---")


def logs_section(run: Run, _readme: Path) -> str:
    """The end of the log."""
    lines = run.log.split("\n") if run.log else ["No log yet."]
    return preformatted("\n".join(shortened(lines[-LOG_LINES:], LOG_LINES)))


def metrics_section(run: Run, _readme: Path) -> str:
    """Rows of the CSV, evenly spaced, the first and the last among them; of those with a validation loss, if there
    are enough."""
    table = run.metrics
    if table.empty:
        return "No rows yet."
    if has_values(table, "val_loss") and table["val_loss"].notna().sum() >= TABLE_ROWS:
        table = table.dropna(subset=["val_loss"]).reset_index(drop=True)
    count = min(TABLE_ROWS, len(table))
    picked = [round(i * (len(table) - 1) / max(1, count - 1)) for i in range(count)]
    columns = [name for name in COLUMNS if has_values(table, name)]
    rows = [
        ["" if value != value else COLUMNS[name](value) for name, value in table.loc[index, columns].items()]
        for index in dict.fromkeys(picked)
    ]
    return markdown_table(columns, rows)


def samples_section(run: Run, _readme: Path) -> str:
    """The newest block of samples."""
    blocks = SAMPLES_BLOCK.split(run.samples)
    if len(blocks) < 2:
        return "No samples yet."
    return preformatted("\n".join(shortened(blocks[-1].split("\n"), SAMPLE_LINES)))


def repro_section(run: Run, _readme: Path) -> str:
    """What it takes to do the same again."""
    config = run.config
    if not config:
        return "No config.json yet."
    lines = []

    def add(label: str, value: object) -> None:
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
        if value not in (None, ""):
            lines.append(f"{label + ':':<15}{value}".replace("\n", " "))

    launches = config.get("launches")
    launches = [launch for launch in launches if isinstance(launch, dict)] if isinstance(launches, list) else []
    if len(launches) > LAUNCHES:
        add("launches", f"{len(launches)}, of which the last {LAUNCHES}")
    for launch in launches[-LAUNCHES:] or [config]:
        add(f"from step {launch.get('first_step', 1)}", launch.get("command"))
        add("started", launch.get("date"))
    for label in ("seed", "git_commit", "versions", "hardware", "corpus"):
        add(label.replace("_", " "), config.get(label))
    flags = config.get("config")
    if isinstance(flags, dict):
        add("runtime", {key: flags.get(key) for key in ("device", "amp", "compile", "threads")})
    return preformatted("\n".join(shortened(lines, 40)))


SECTIONS: dict[str, Callable[[Run, Path], str]] = {
    "PLOT": plot_section,
    "SUMMARY": summary_section,
    "LOGS": logs_section,
    "METRICS": metrics_section,
    "SAMPLES": samples_section,
    "REPRO": repro_section,
}


def sections_of(run: Run, readme: Path) -> dict[str, Callable[[], str]]:
    """The text of each section, to be made where the README has it."""
    return {name: partial(section, run, readme) for name, section in SECTIONS.items()}


# ---------------------------------------------------------------------------------------------
# The README
# ---------------------------------------------------------------------------------------------


def git_ignored(path: Path) -> bool:
    """Whether git would leave the file out; False where there is no git."""
    try:
        command = ["git", "-C", str(path.parent), "check-ignore", "-q", path.name]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@dataclass(frozen=True)
class Arguments:
    """Flags of the command line."""

    out_dir: Path
    """run directory to report"""
    readme: Path = Path("README.md")
    """Markdown file whose sections are filled"""
    check: bool = False
    """change nothing; print what would change and exit 1 if anything would"""


def update(arguments: Arguments) -> int:
    """Fill the README, or compare it. Returns the exit code; raises ValueError or OSError for bad input."""
    readme = arguments.readme
    before = read_readme(readme)
    run = read_run(arguments.out_dir)
    after = filled(before, sections_of(run, readme), readme)
    plot = run.out_dir / "logs" / "loss_curve.png"
    if arguments.check:
        diff = difflib.unified_diff(
            before.splitlines(), after.splitlines(), str(readme), f"{readme} from {run.out_dir}", lineterm=""
        )
        print(*(diff if before != after else [f"{readme}: up to date with {run.out_dir}"]), sep="\n")
        return int(before != after)
    if (run.metrics["loss"] > 0).any():
        draw_loss_curve(run.out_dir)
        if git_ignored(plot):
            print(f"update_readme.py: warning: git ignores {plot.as_posix()}: git add -f {plot.as_posix()}, or it "
                  "will not show on the forge", file=sys.stderr)  # fmt: skip
    if before != after:
        write_text(readme, after)
    print(f"{readme}: {'updated' if before != after else 'already up to date'} from {run.out_dir}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0, 1 when --check finds a stale README, 2 for bad input."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        arguments = read_flags(Arguments, sys.argv[1:] if argv is None else argv, "update_readme.py", __doc__)
        return update(arguments)
    except SystemExit as answered:  # by tyro
        return int(answered.code or 0)
    except (ValueError, OSError) as error:
        print(f"update_readme.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
