"""Fill the marked sections of a README from a run, and draw its loss curve; or compare runs.

    python update_readme.py --out_dir out/gpt2 --readme README.md
    python update_readme.py --out_dir out/gpt2 --readme README.md --check    # exit 1 when stale
    python update_readme.py --out_dir out/a out/b out/c                # a table here, and a plot
    python update_readme.py --out_dir "out/lr-*" --readme README.md    # both in section COMPARE

A section stands between two lines, `<!--AUTO:NAME:START-->` and `<!--AUTO:NAME:END-->`. One run
fills PLOT, SUMMARY, LOGS, METRICS, SAMPLES and REPRO, whichever of them the README has; several
runs fill COMPARE alone. The same runs give the same bytes, and nothing outside the sections moves.
Only files are read: no torch, no clock.
"""

import difflib
import math
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from parts.startup import packages_of

with packages_of("update_readme.py", __name__):
    import numpy as np
    import pandas as pd

    from parts.commandline import encode_escapes, flag_words, read_flags, shell_line, value_of
    from parts.flags import Flags
    from parts.report import reader, sections
    from parts.report.comparison import REPORTING, Comparison, common_parent, find_runs
    from parts.report.reader import Run, has_values, numbers_in, outcome, read_run, training_loss
    from parts.report.sections import cell, markdown_table, preformatted, shortened
    from parts.run.directory import remove_leftovers, replacing
    from parts.run.layout import RunPaths
    from parts.run.screen import log, say, speaking
    from parts.text.files import is_glob

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPARISON_PLOT = "compare.png"
LOG_LINES, SAMPLE_LINES, TABLE_ROWS, LAUNCHES = 20, 60, 12, 10  # at most, in a section

LEVELS = (
    ("ln_vocab", "ln V", "#969696"),
    ("target_loss", "target", "#238b45"),
    ("loss_floor", "floor", "#cb181d"),
)
# Of Okabe & Ito (2008), "Color Universal Design", with grey for their yellow, too pale on paper.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C"]
MARKERS = ("", "o", "s", "^", "D", "v")  # another for each eight runs
EAST_ASIAN = (
    "Noto Sans CJK JP",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Arial Unicode MS",
)
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
    "elapsed_sec": reader.duration,
}


# ---------------------------------------------------------------------------------------------
# The plots
# ---------------------------------------------------------------------------------------------


def draw_loss_curve(out_dir: Path) -> Path | None:
    """Draw logs/loss_curve.png: losses, learning rate, and lines at ln V, floor, target and best.

    What the run lacks is left out. Draws nothing and returns None before the first loss. Raises
    OSError, and what `read_run` raises.
    """
    from matplotlib.figure import Figure

    run = read_run(out_dir)
    table = run.losses
    if table.empty:
        return None
    figure = Figure(figsize=(9, 5.2), dpi=110, layout="constrained")
    axis = figure.add_subplot()
    axis.plot("step", "loss", data=table, color="#9ecae1", linewidth=1, label="loss of one step")
    if len(table) == 1:  # a line needs two
        axis.plot("step", "loss", "o", data=table, color="#9ecae1", label="")
    if has_values(table, "window_loss"):
        axis.plot("step", "window_loss", data=table, color="#08519c", linewidth=2)
    measured = reader.validation(run)
    if len(measured):
        axis.plot("step", "val_loss", data=measured, color="#d94801", label="validation loss")
    start = reader.overfitting(run)
    if start is not None:
        label = f"overfitting from step {start:.0f}"
        axis.axvline(start, color="#d94801", linewidth=1, linestyle=":", label=label)
    shown = [table["loss"].min(), table["loss"].max(), *draw_levels(axis, run)]
    show_losses(axis, min(shown) / 1.3, max(shown) * 1.3)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss, nats per token (log scale)")
    if has_values(table, "lr"):
        right = axis.twinx()
        right.plot(table["step"], table["lr"], "#fdae6b", linewidth=0.8, label="learning rate")
        right.set_ylabel("learning rate")
        right.set_ylim(bottom=0)
        right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    # A name may hold dollars, between which matplotlib reads a formula.
    name = encode_escapes(out_dir.resolve().name)
    axis.set_title(name, fontsize=11, fontfamily=fonts(), parse_math=False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return write_plot(figure, RunPaths(out_dir).loss_curve)


def draw_levels(axis: "Axes", run: Run) -> list[float]:
    """Draw ln V, target, floor and the best loss. Returns those losses that y has to show."""
    shown = []
    lowest = run.losses["loss"].min()
    for key, name, colour in LEVELS:
        value = run.numbers.get(key, 0)
        if value <= 0:
            continue
        is_far = value < lowest / 5  # to show it would press the curves together
        if not is_far:
            shown.append(value)
        label = f"{name} {value:.5g}{', below' if is_far else ''}"
        axis.axhline(value, color=colour, linewidth=1, linestyle="--", label=label)
    best = run.numbers.get("best_loss", 0)
    if best > 0:
        step = run.numbers.get("best_step", 0)
        label = f"best {best:.4f} at step {step:.0f}"
        axis.plot([step], [best], "*", color="#6a51a3", markersize=11, label=label)
        shown.append(best)
    return shown


def show_losses(axis: "Axes", low: float, high: float) -> None:
    """Make y a log scale from low to high with round numbers at it, four or more if there are."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    finer = ([number / count for number in range(count, 10 * count)] for count in (2, 5, 10, 100))
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), *finer):
        ticks = (digit * 10.0**exponent for exponent in range(-5, 4) for digit in digits)
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 4:
            break
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    axis.yaxis.set_major_locator(FixedLocator(inside))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.grid(color="#e5e5e5", linewidth=0.6)


def fonts() -> list[str]:
    """Fonts for names: matplotlib's own, and those of the system for letters that it lacks."""
    from matplotlib.font_manager import get_font_names

    return ["DejaVu Sans", *(name for name in EAST_ASIAN if name in get_font_names())]


def write_plot(figure: "Figure", path: Path) -> Path:
    """Write a PNG whole. A letter that no font has is drawn as a box."""
    # For good: catch_warnings is not safe in a thread, where train.py draws.
    warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
    with replacing(path, shared=True) as file:
        figure.savefig(file, format="png")
    return path


def curves(comparison: Comparison, run: Run) -> dict[str, pd.DataFrame]:
    """What is drawn of a run, by line style: tokens and loss, in the comparison's unit.

    Training is solid, validation dashed, as far as it was measured on the present text.
    """
    table, in_bits = run.metrics, comparison.unit == "bits per byte"
    losses = {}
    if comparison.one_text:
        losses["-"] = table.get("bits_per_byte") if in_bits else training_loss(table)
    losses["--"] = reader.validation(run).get("val_bits_per_byte" if in_bits else "val_loss")
    found = {}
    for dash, loss in losses.items():
        values = {"tokens": table.get("tokens"), "loss": loss}
        drawn = pd.DataFrame(values, index=table.index).dropna()
        drawn = drawn[drawn["loss"] > 0]
        if len(drawn):
            found[dash] = drawn
    return found


def comparison_figure(comparison: Comparison) -> "Figure | None":
    """The losses of all runs over the tokens trained, log scale; None when there is none yet.

    The losses after a twentieth of the tokens fill the plot: a first steep fall is cut off.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    drawn = {name: curves(comparison, run) for name, run in comparison.runs.items()}
    tables = [table for found in drawn.values() for table in found.values()]
    if not tables:
        return None
    end = max(table["tokens"].max() for table in tables)
    figure = Figure(figsize=(10, 5.4), dpi=110, layout="constrained")
    axis = figure.add_subplot()
    handles, names, late = [], [], []
    for index, (name, found) in enumerate(drawn.items()):
        colour = COLOURS[index % len(COLOURS)]
        marker = MARKERS[index // len(COLOURS) % len(MARKERS)]
        look: dict[str, Any] = dict(color=colour, marker=marker, markersize=4.5, markevery=0.1)
        for dash, table in found.items():
            line = look | ({"marker": "o", "markevery": None} if len(table) == 1 else {})
            axis.plot(table["tokens"], table["loss"], linestyle=dash, linewidth=1.6, **line)
            is_late = (table["tokens"] >= end / 20) | (table.index == table.index[-1])
            late += table.loc[is_late, "loss"].tolist()
        names.append(name if len(name) <= 44 else f"{name[:20]} ... {name[-19:]}")
        handles.append(Line2D([], [], color=colour, marker=marker, linewidth=2))
    show_losses(axis, min(late) / 1.05, max(late) * 1.05)
    axis.set_xlim(0, end * 1.01)
    axis.set_xlabel("tokens trained")
    axis.xaxis.set_major_formatter(EngFormatter())
    kinds = {"-": "window_loss", "--": "validation loss (dashed)"}
    seen = [kind for dash, kind in kinds.items() if any(dash in found for found in drawn.values())]
    axis.set_ylabel(f"{', '.join(seen)}, {comparison.unit}")
    legend = figure.legend(handles, names, loc="outside right upper", fontsize=9, frameon=False)
    legend.set_alignment("left")
    legend.set_title(f"by {comparison.label}, the best first")
    for text in legend.get_texts():
        text.set(parse_math=False, fontfamily=fonts())  # as in a title
    return figure


def draw_comparison(comparison: Comparison, path: Path) -> Path | None:
    """Draw the runs over each other; None when no loss is there to be drawn. Raises OSError."""
    figure = comparison_figure(comparison)
    return None if figure is None else write_plot(figure, path)


# ---------------------------------------------------------------------------------------------
# The sections
# ---------------------------------------------------------------------------------------------


def plot_section(run: Run, readme: Path) -> str:
    """The loss curve as an image, by a path relative to the README."""
    if run.losses.empty:
        return "No loss has been logged yet."
    path = RunPaths(run.out_dir).loss_curve
    try:
        relative = os.path.relpath(path.resolve(), readme.resolve().parent)
    except ValueError as error:  # Windows: two drives
        raise ValueError(f"{path} and {readme} must be on one drive") from error
    return f"![Loss curve]({quote(Path(relative).as_posix())})"


def summary_section(run: Run, _readme: Path) -> str:
    """What came of the run, one figure a row."""
    flags, corpus, known = run.flags, run.corpus, run.numbers
    validates = run.results.get("best_metric") == "val_loss"
    rows = []

    def add(label: str, form: str) -> None:
        """Add a row, unless its form names a number that is not known."""
        with suppress(KeyError):
            rows.append([label, form.format_map(known)])

    if flags:
        shape = [f"{name} {flags.get(name)}" for name in ("n_layer", "n_head", "n_embd", "seq_len")]
        rows.append(["model", cell(f"{flags.get('preset')} ({', '.join(shape)})")])
        rows.append(["device", cell(f"{flags.get('device')}, {flags.get('amp')}")])
    if corpus:
        tokens = numbers_in(corpus).get("tokens")
        size = "?" if tokens is None else f"{tokens:,.0f}"
        rows.append(["corpus", cell(f"{corpus.get('file')}, {size} tokens")])
    rows.append(["outcome", outcome(run)])
    add("target", "none" if known.get("target_loss") == 0 else "{target_loss:g}")
    add("window_loss", "{window_loss:.6f} (mean of the last {target_window:.0f} steps)")
    add(
        "corpus loss of the training part" if validates else "corpus loss",
        "{corpus_loss:.6f} ± {corpus_loss_standard_error:.6f} (mean ± standard error, n = "
        "{corpus_loss_slices:,.0f} random slices)",
    )
    add("perplexity", "{perplexity:.4f}")
    add("bits per byte", "{bits_per_byte:.4f}")
    add(*best_row(known, validates))
    add("last step", "loss {final_loss:.6f} at step {final_step:,.0f}")
    add("last val_loss", "{val_loss:.6f}, perplexity {val_perplexity:,.2f}")
    add("last validation bits per byte", "{val_bits_per_byte:.4f}")
    start = reader.overfitting(run)
    if start is not None:
        rows.append(["overfitting", f"from step {start:,.0f} on the validation loss rose"])
    add("loss floor of this corpus and seq_len", "{loss_floor:.4f}")
    add("ln V (a model that knows nothing)", "{ln_vocab:.3f}")
    add("tokens trained", "{tokens:,.0f} ({pseudo_epochs:,.1f} pseudo-epochs)")
    add("parameters", "{parameters:,.0f}")
    elapsed = known.get("elapsed_sec")
    if elapsed:
        rows.append(["time", reader.duration(elapsed)])
        if "tokens" in known:
            rate = f"{known['tokens'] / elapsed:,.0f}"
            rows.append(["tokens per second, saves and samples included", rate])
    return markdown_table(["", "result"], rows, align="---")


def best_row(known: dict[str, float], validates: bool) -> tuple[str, str]:
    """Label and form of the best loss, as far as it was measured."""
    label = "best val_loss" if validates else "best window_loss"
    if not validates and known.get("best_step", math.inf) < known.get("target_window", 0):
        label = "mean loss of all steps"  # there was no full window
    error = " ± {best_loss_standard_error:.6f}" if "best_loss_standard_error" in known else ""
    bits = ", {best_bits_per_byte:.4f} bits per byte" if "best_bits_per_byte" in known else ""
    return label, "**{best_loss:.6f}**" + error + " at step {best_step:,.0f}" + bits


def logs_section(run: Run, _readme: Path) -> str:
    """The end of the log."""
    lines = run.log.splitlines() or ["No log yet."]
    return preformatted("\n".join(shortened(lines[-LOG_LINES:], LOG_LINES)))


def metrics_section(run: Run, _readme: Path) -> str:
    """Rows of the CSV, evenly spaced, the first and the last among them.

    Where enough of them have a validation loss, they are taken from these.
    """
    table = run.metrics
    if table.empty:
        return "No rows yet."
    if has_values(table, "val_loss") and table["val_loss"].notna().sum() >= TABLE_ROWS:
        table = table.dropna(subset=["val_loss"])
    picked = np.linspace(0, len(table) - 1, min(TABLE_ROWS, len(table)))
    columns = [name for name in COLUMNS if has_values(table, name)]
    rows = []
    for _, row in table[columns].iloc[picked.round().astype(int)].iterrows():
        rows.append(["" if math.isnan(row[name]) else COLUMNS[name](row[name]) for name in columns])
    return markdown_table(columns, rows)


def samples_section(run: Run, _readme: Path) -> str:
    """The newest block of samples."""
    if not run.samples:
        return "No samples yet."
    _rule, *lines = str(run.samples[-1]).rstrip("\n").split("\n")
    return preformatted("\n".join(shortened(lines, SAMPLE_LINES)))


# Flags that alter no step of the same length when they were changed on the way.
NO_NUMBERS = REPORTING | {"val_sha256", "steps", "target_loss", "patience"}


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
            lines.append(f"{label + ': ':<15}{value}".replace("\n", " "))

    launches = run.launches or [config]
    if len(launches) > LAUNCHES:
        add("launches", f"{len(launches)}, of which the last {LAUNCHES}")
    for launch in launches[-LAUNCHES:]:
        command = launch.get("command")
        add(f"from step {launch.get('first_step', 1)}", shell_line(words_of(command)) or command)
        add("started", launch.get("date"))
    made_with = ("version", "git_commit", "sources_sha256", "versions", "hardware")
    for label in ("seed", *made_with, "corpus"):
        add(label.replace("_", " "), config.get(label))
    if not run.flags:
        return preformatted("\n".join(shortened(lines, 40)))
    add("runtime", {key: run.flags.get(key) for key in ("device", "amp", "compile", "threads")})
    changed = {f"--{name}" for _, flags in run.changes for name in flags if name not in NO_NUMBERS}
    every = "The same with every flag, into another directory"
    commit = config.get("git_commit")
    if isinstance(commit, str) and not commit.endswith("-dirty"):
        every += f" (git checkout {commit[:12]} first, for the same program)"
    every += ":"
    if changed:
        names = ", ".join(sorted(changed))
        every = (
            f"No one command repeats this run, since {names} changed on the way. The last start's:"
        )
    began_from = value_of("resume", words_of(launches[0].get("command")))
    command = full_command({**run.flags, "out_dir": "out/again", "resume": began_from})
    return preformatted("\n".join([*shortened(lines, 40), "", every, command]))


def words_of(command: object) -> list[str]:
    """The words of a recorded command; none where it is something else."""
    try:
        return shlex.split(command) if isinstance(command, str) else []
    except ValueError:
        return []


def full_command(flags: Mapping[str, object]) -> str:
    """The command that gives train.py these flags, each of them spelled out."""
    words = ["python", "train.py"]
    for name in (field.name for field in fields(Flags)):
        value = flags.get(name)
        is_default = name == "resume" and value in ("auto", "never")
        if is_default or value is False or value in (None, "", []):
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += flag_words(name, list(map(str, values)))
    return shell_line(words)


SECTIONS: dict[str, Callable[[Run, Path], str]] = {
    "PLOT": plot_section,
    "SUMMARY": summary_section,
    "LOGS": logs_section,
    "METRICS": metrics_section,
    "SAMPLES": samples_section,
    "REPRO": repro_section,
}


def plot_beside(readme: Path) -> Path:
    """Where the plot of a README's comparison lies: beside the file that a link leads to.

    It has a name of its own, since READMEs may share a folder.
    """
    readme = readme.resolve()
    name = f"compare-{readme.name.removesuffix('.md')}.png"
    return readme.with_name(COMPARISON_PLOT if readme.name == "README.md" else name)


def comparison_section(comparison: Comparison, readme: Path) -> str:
    """The plot beside the README, if there is anything to draw, and the table."""
    image = f"![{len(comparison.runs)} runs compared]({quote(plot_beside(readme).name)})"
    has_curves = any(curves(comparison, run) for run in comparison.runs.values())
    return f"{image}\n\n{comparison.markdown()}" if has_curves else comparison.markdown()


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

    out_dir: tuple[Path, ...]
    """run directory to report; several, or globs, to compare"""
    readme: Path | None = None
    """Markdown file whose sections are filled, made with all of them if it is not there; by default
    README.md for one run, no file for several"""
    check: bool = False
    """change nothing; print what would change and exit 1 if anything would"""


def fill(
    readme: Path,
    contents: Mapping[str, Callable[[], str]],
    source: str,
    check: bool,
    draw: Callable[[], Path | None],
) -> int:
    """Fill these sections of the README, made if it is not there, and draw what it shows.

    With `check` only compare. Returns the exit code; raises ValueError or OSError for bad input.
    """
    if os.path.islink(os.path.realpath(readme)):
        raise ValueError(f"--readme {readme} is a link in a circle: name another file")
    if readme.exists():
        before = sections.read_readme(readme)
        after = sections.filled(before, contents, readme)
    else:
        before = ""
        after = sections.filled(sections.new_readme(source, contents), contents, readme)
    is_stale = before != after
    if check:
        if is_stale:
            names = (str(readme), f"{readme} from {source}")
            lines = before.splitlines(), after.splitlines()
            say("\n".join(difflib.unified_diff(*lines, *names, lineterm="")))
        else:
            say(f"{readme}: up to date with {source}")
        return int(is_stale)
    if is_stale:
        sections.check_writable(readme)
    plot = draw()
    if plot is not None and git_ignored(plot):
        name = plot.as_posix()
        log.warning(f"git ignores {name}: git add -f {name}, or it will not show on GitHub")
    if is_stale:
        sections.write_text(readme, after)
    remove_leftovers(readme.resolve())
    done = "made" if not before else "updated" if is_stale else "already up to date"
    say(f"{readme}: {done} from {source}")
    return 0


def report_run(run: Run, readme: Path, check: bool) -> int:
    """Fill the README from one run, and draw its loss curve. Returns and raises as `fill`."""
    contents = {name: partial(section, run, readme) for name, section in SECTIONS.items()}
    return fill(readme, contents, str(run.out_dir), check, partial(draw_loss_curve, run.out_dir))


def report_comparison(comparison: Comparison, readme: Path | None, check: bool) -> int:
    """Fill the README from several runs, or print the table; draw. Returns and raises as `fill`."""
    runs = list(comparison.runs.values())
    if readme is not None:
        contents = {"COMPARE": partial(comparison_section, comparison, readme)}
        draw = partial(draw_comparison, comparison, plot_beside(readme))
        return fill(readme, contents, f"{len(runs)} runs", check, draw)
    if check:
        raise ValueError("--check compares a README with the runs: name it with --readme")
    say(comparison.text())
    here = Path.cwd()
    folder = common_parent(runs) or here
    path = (folder if folder.is_relative_to(here) else here) / COMPARISON_PLOT
    try:
        plot = draw_comparison(comparison, path)
    except OSError as error:
        raise OSError(
            f"the plot cannot be written to {path} ({error.strerror or error}): cd to a folder "
            "that can be written to, and name the runs from there"
        ) from error
    if plot is not None:
        say(f"\nPlot: {plot.relative_to(here)}")
    return 0


@speaking("update_readme.py")
def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0, 1 when --check finds a stale README, 2 for bad input."""
    words = sys.argv[1:] if argv is None else argv
    try:
        asked = read_flags(Arguments, words, "update_readme.py", __doc__)
        paths = asked.out_dir
        if not paths:
            raise ValueError("--out_dir is empty: name a run directory, or several to compare them")
        if len(paths) == 1 and not is_glob(paths[0]):
            readme = asked.readme or Path("README.md")
            return report_run(read_run(paths[0]), readme, asked.check)
        comparison = Comparison.of([read_run(path) for path in find_runs(paths)])
        return report_comparison(comparison, asked.readme, asked.check)
    except (ValueError, OSError) as error:
        log.error(error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
