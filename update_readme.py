"""Fill the marked sections of a README from a run, and draw its loss curve; or compare several runs.

    python update_readme.py --out_dir out/gpt2 --readme README.md
    python update_readme.py --out_dir out/gpt2 --readme README.md --check    # exit 1 when stale
    python update_readme.py --out_dir out/a out/b out/c                      # a table on the terminal, and a plot
    python update_readme.py --out_dir "out/lr-*" --readme README.md          # the same in its section COMPARE

A section stands between two lines, `<!--AUTO:NAME:START-->` and `<!--AUTO:NAME:END-->`. One run fills
PLOT, SUMMARY, LOGS, METRICS, SAMPLES and REPRO, whichever of them the README has; several runs fill
COMPARE alone. The same runs give the same bytes, and nothing outside the sections moves. Only files
are read: no torch, no clock.
"""

import difflib
import math
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from parts.start import packages_of

with packages_of("update_readme.py", __name__):
    import pandas as pd

    from parts.commandline import flag_words, read_flags, to_type, value_of
    from parts.flags import Flags
    from parts.report.comparison import (
        REPORTING,
        Comparison,
        absolute,
        common_parent,
        compare,
        find_runs,
        is_glob,
    )
    from parts.report.reader import (
        Run,
        duration,
        has_values,
        number,
        outcome,
        overfitting,
        read_run,
        smoothed,
        validation,
    )
    from parts.report.sections import (
        cell,
        check_writable,
        filled,
        markdown_table,
        new_readme,
        preformatted,
        read_readme,
        shortened,
        visible,
        write_text,
    )
    from parts.run.directory import remove_leftovers, replacing
    from parts.run.layout import BEGINNING
    from parts.run.screen import log, speaking

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPARISON_PLOT = "compare.png"
LOG_LINES, SAMPLE_LINES, TABLE_ROWS, LAUNCHES = 20, 60, 12, 10

LEVELS = (
    ("ln_vocab", "ln V", "#969696"),
    ("target_loss", "target", "#238b45"),
    ("loss_floor", "floor", "#cb181d"),
)
UNITS = ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"), (1, "tokens"))
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8C8C8C",
)  # see `styles`
EAST_ASIAN = (
    "Noto Sans CJK JP",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Arial Unicode MS",
)  # see `fonts`
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
# The plots
# ---------------------------------------------------------------------------------------------


def draw_loss_curve(out_dir: Path) -> Path:
    """Draw logs/loss_curve.png: loss raw and smoothed, validation loss, learning rate, and lines at
    ln V, floor, target and best; whatever the run lacks is left out.

    Raises what `read_run` raises, and ValueError when no row has a loss yet.
    """
    from matplotlib.figure import Figure

    run = read_run(out_dir)
    table = run.metrics[run.metrics["loss"] > 0]
    if table.empty:
        raise ValueError(f"{out_dir.as_posix()}: no step has a loss yet")
    figure = Figure(figsize=(9, 5.2), dpi=110, layout="constrained")
    axis = figure.add_subplot()
    axis.plot("step", "loss", data=table, color="#9ecae1", linewidth=1, label="loss of one step")
    smooth, label = smoothed(table)
    if label:
        axis.plot(table["step"], smooth, color="#08519c", linewidth=2, label=label)
    if has_values(table, "val_loss"):
        measured = table.dropna(subset=["val_loss"])
        present = measured["step"].isin(validation(run)["step"])
        if present.any():
            axis.plot(
                "step", "val_loss", data=measured[present], color="#d94801", label="validation loss"
            )
        if not present.all():
            label = "validation loss before, on another text or seq_len"
            axis.plot("step", "val_loss", data=measured[~present], color="#fdbe85", label=label)
    drawn = [table["loss"].min(), table["loss"].max()]
    for key, name, colour in LEVELS:
        if (value := number(run.results, key)) and value > 0:
            far = value < drawn[0] / 5  # or it would press the curves together
            label = f"{name} {value:.5g}{', below' if far else ''}"
            axis.axhline(value, color=colour, linewidth=1, linestyle="--", label=label)
            drawn += [] if far else [value]
    best, step = number(run.results, "best_loss"), number(run.results, "best_step")
    if (start := overfitting(run)) is not None:
        axis.axvline(
            start,
            color="#d94801",
            linewidth=1,
            linestyle=":",
            label=f"overfitting from step {start:.0f}",
        )
    if best and step and best > 0:
        axis.plot(
            [step],
            [best],
            "*",
            color="#6a51a3",
            markersize=11,
            label=f"best {best:.4f} at step {step:.0f}",
        )
        drawn.append(best)

    show_losses(axis, min(drawn) / 1.3, max(drawn) * 1.3)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss, nats per token (log scale)")
    if has_values(table, "lr"):
        right = axis.twinx()
        right.plot(
            "step",
            "lr",
            data=table,
            color="#fdae6b",
            linewidth=0.8,
            alpha=0.8,
            label="learning rate",
        )
        right.set_ylabel("learning rate")
        right.set_ylim(bottom=0)
        right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    name = visible(out_dir.resolve().name)
    axis.set_title(
        name, fontsize=11, fontfamily=fonts(), parse_math=False
    )  # a name may hold dollars
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)

    return write_plot(figure, out_dir / "logs" / "loss_curve.png")


def show_losses(axis: "Axes", low: float, high: float) -> None:
    """Make y a log scale of losses from low to high, with round numbers at it, at least four where there are."""
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
    """For names: matplotlib's own font, and for letters that it lacks those of the system that have many."""
    from matplotlib.font_manager import get_font_names

    return ["DejaVu Sans", *(name for name in EAST_ASIAN if name in get_font_names())]


def write_plot(figure: "Figure", path: Path) -> Path:
    """Write a PNG whole. A letter that no font has is drawn as a box."""
    # For good: to put the filters back, as catch_warnings does, is not safe in a thread, where train.py draws.
    warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
    with replacing(path, shared=True) as file:
        figure.savefig(file, format="png")
    return path


def curves(comparison: Comparison, run: Run) -> dict[str, pd.DataFrame]:
    """What is drawn of a run, by line style: tokens and loss, in the comparison's unit; training solid, validation
    dashed, as far as it was measured on the present text."""
    table, bits = run.metrics, comparison.unit == "bits per byte"
    if not has_values(table, "tokens"):
        return {}
    training = table.get("bits_per_byte") if bits else smoothed(table)[0]
    losses = {
        "-": training if comparison.one_text else None,
        "--": validation(run).get("val_bits_per_byte" if bits else "val_loss"),
    }
    found = {}
    for dash, loss in losses.items():
        drawn = pd.DataFrame(
            {"tokens": table["tokens"], "loss": math.nan if loss is None else loss}
        ).dropna()
        if (drawn["loss"] > 0).any():
            found[dash] = drawn[drawn["loss"] > 0]
    return found


def styles(count: int) -> list[dict]:
    """Colours and markers for so many runs, told apart without colour vision as well.

    Up to eight the colours of Okabe & Ito (2008), "Color Universal Design", grey for their yellow, which white paper
    swallows. Beyond, viridis from the first to the last, with markers, which neighbours do not share.
    """
    if count <= len(COLOURS):
        return [{"color": colour} for colour in COLOURS[:count]]
    from matplotlib import colormaps

    shades = [colormaps["viridis"](0.92 * number / (count - 1)) for number in range(count)]
    return [
        {
            "color": shade,
            "marker": "os^Dv"[number % 5],
            "markersize": 4.5,
            "markevery": (0.02 + 0.025 * (number % 4), 0.1),
        }
        for number, shade in enumerate(shades)
    ]


def comparison_figure(comparison: Comparison) -> "Figure | None":
    """The losses of all runs over the tokens trained, log scale; None when there is none yet.

    A first steep fall that most of the height would go to is cut off: the losses after a twentieth of the tokens fill
    the plot.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    drawn = {name: curves(comparison, run) for name, run in comparison.runs.items()}
    tables = [table for found in drawn.values() for table in found.values()]
    if not tables:
        return None
    end = max(table["tokens"].max() for table in tables)
    unit, words = next((unit for unit in UNITS if end >= unit[0]), UNITS[-1])
    figure = Figure(figsize=(10, 5.4), dpi=110, layout="constrained")
    axis = figure.add_subplot()
    handles = []
    for found, style in zip(drawn.values(), styles(len(drawn)), strict=True):
        for dash, table in found.items():
            look = style | {"linewidth": 1.6, "linestyle": dash}
            if len(table) == 1:
                look |= {"marker": "o", "markevery": None}
            elif (
                dash == "-" and "--" in found and len(drawn) > len(COLOURS)
            ):  # or there are too many lines
                look |= {"linewidth": 0.8, "alpha": 0.45, "marker": ""}
            axis.plot(table["tokens"] / unit, table["loss"], **look)
        handles.append(Line2D([], [], linewidth=2, **style | {"markevery": None}))
    shown = [
        table.loc[(table["tokens"] >= end / 20) | (table.index == table.index[-1]), "loss"]
        for table in tables
    ]
    low, high = min(losses.min() for losses in shown), max(losses.max() for losses in shown)
    show_losses(axis, low / 1.05, high * 1.05)
    axis.set_xlim(0, end / unit * 1.01)
    axis.set_xlabel(f"{words} trained")
    kinds = {"-": "window_loss", "--": "validation loss (dashed)"}
    seen = [kind for dash, kind in kinds.items() if any(dash in found for found in drawn.values())]
    axis.set_ylabel(f"{', '.join(seen)}, {comparison.unit}")
    names = [
        name if len(name) <= 44 else f"{name[:20]} ... {name[-19:]}" for name in map(visible, drawn)
    ]
    legend = figure.legend(
        handles, names, loc="outside right upper", alignment="left", fontsize=9, frameon=False
    )
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

    flags, corpus = run.flags, run.corpus
    if flags:
        shape = ", ".join(
            f"{name} {flags.get(name)}" for name in ("n_layer", "n_head", "n_embd", "seq_len")
        )
        rows.append(["model", cell(f"{flags.get('preset')} ({shape})")])
        rows.append(["device", cell(", ".join(str(flags.get(name)) for name in ("device", "amp")))])
    if corpus:
        tokens = number(corpus, "tokens")
        rows.append(
            [
                "corpus",
                cell(f"{corpus.get('file')}, {'?' if tokens is None else f'{tokens:,.0f}'} tokens"),
            ]
        )
    rows.append(["outcome", outcome(run)])
    if r.get("target_loss") == 0:
        rows.append(["target", "none"])
    else:
        add("target", "{:g}", "target_loss")
    add("window_loss", "{:.6f} (mean of the last {:.0f} steps)", "window_loss", "target_window")
    corpus_loss = ("corpus_loss", "corpus_loss_standard_error", "corpus_loss_slices")
    part = " of the training part" * (run.results.get("best_metric") == "val_loss")
    measured = "{:.6f} ± {:.6f} (mean ± standard error, n = {:,.0f} random slices)"
    add(f"corpus loss{part}", measured, *corpus_loss)
    add("perplexity", "{:.4f}", "perplexity")
    add("bits per byte", "{:.4f}", "bits_per_byte")
    metric = "val_loss" if run.results.get("best_metric") == "val_loss" else "window_loss"
    too_short = metric == "window_loss" and (r.get("best_step") or math.inf) < (
        r.get("target_window") or 0
    )
    in_bits = ["best_bits_per_byte"] * ("best_bits_per_byte" in r)
    error = ["best_loss_standard_error"] * (r.get("best_loss_standard_error") is not None)
    words = (
        "**{:.6f}**"
        + " ± {:.6f}" * len(error)
        + " at step {:,.0f}"
        + ", {:.4f} bits per byte" * len(in_bits)
    )
    label = "mean loss of all steps" if too_short else f"best {metric}"
    add(label, words, "best_loss", *error, "best_step", *in_bits)
    add("last step", "loss {:.6f} at step {:,.0f}", "final_loss", "final_step")
    add("last val_loss", "{:.6f}, perplexity {:,.2f}", "val_loss", "val_perplexity")
    add("last validation bits per byte", "{:.4f}", "val_bits_per_byte")
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
            rows.append(
                ["tokens per second, saves and samples included", f"{tokens / elapsed:,.0f}"]
            )
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
        [
            "" if value != value else COLUMNS[name](value)
            for name, value in table.loc[index, columns].items()
        ]
        for index in dict.fromkeys(picked)
    ]
    return markdown_table(columns, rows)


def samples_section(run: Run, _readme: Path) -> str:
    """The newest block of samples."""
    blocks = BEGINNING.split(run.samples)
    if len(blocks) < 2:
        return "No samples yet."
    return preformatted("\n".join(shortened(blocks[-1].split("\n"), SAMPLE_LINES)))


NO_NUMBERS = REPORTING | {
    "val_sha256",
    "steps",
    "target_loss",
    "patience",
}  # changed on the way, these alter no step


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

    launches = run.launches
    if len(launches) > LAUNCHES:
        add("launches", f"{len(launches)}, of which the last {LAUNCHES}")
    for launch in launches[-LAUNCHES:] or [config]:
        command = launch.get("command")
        words = words_of(command)
        add(f"from step {launch.get('first_step', 1)}", to_type(words) if words else command)
        add("started", launch.get("date"))
    for label in ("seed", "git_commit", "versions", "hardware", "corpus"):
        add(label.replace("_", " "), config.get(label))
    if run.flags:
        add("runtime", {key: run.flags.get(key) for key in ("device", "amp", "compile", "threads")})
    lines = shortened(lines, 40)
    if run.flags:
        changed = sorted(
            {f"--{name}" for _, flags in run.changes for name in flags if name not in NO_NUMBERS}
        )
        every = "The same with every flag, whatever the defaults will be, into another directory:"
        if changed:
            every = f"No one command repeats this run, since {', '.join(changed)} changed on the way. The last start's:"
        lines += ["", every]
        began_from = value_of("resume", words_of((launches or [config])[0].get("command")))
        lines.append(full_command({**run.flags, "out_dir": "out/again", "resume": began_from}))
    return preformatted("\n".join(lines))


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
        if name == "dry_run" or value is False or value in (None, "", []):
            continue
        if name == "resume" and value in ("auto", "never"):
            continue
        given = value if isinstance(value, list) else [] if value is True else [value]
        words += flag_words(name, list(map(str, given)))
    return to_type(words)


SECTIONS: dict[str, Callable[[Run, Path], str]] = {
    "PLOT": plot_section,
    "SUMMARY": summary_section,
    "LOGS": logs_section,
    "METRICS": metrics_section,
    "SAMPLES": samples_section,
    "REPRO": repro_section,
}


# ---------------------------------------------------------------------------------------------
# The README
# ---------------------------------------------------------------------------------------------


def plot_beside(readme: Path) -> Path:
    """Where the plot of a README's comparison lies: beside the file that is written, also where a link leads to that,
    and under a name of its own, since READMEs may share a folder."""
    readme = readme.resolve()
    name = (
        COMPARISON_PLOT
        if readme.name == "README.md"
        else f"compare-{readme.name.removesuffix('.md')}.png"
    )
    return readme.with_name(name)


def comparison_section(comparison: Comparison, readme: Path) -> str:
    """The plot beside the README, if there is anything to draw, and the table."""
    drawn = any(curves(comparison, run) for run in comparison.runs.values())
    image = (
        [f"![{len(comparison.runs)} runs compared]({quote(plot_beside(readme).name)})"]
        if drawn
        else []
    )
    return "\n\n".join([*image, comparison.markdown()])


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
    """Markdown file whose sections are filled, made with all of them if it is not there; by default README.md for one
    run, no file for several"""
    check: bool = False
    """change nothing; print what would change and exit 1 if anything would"""


def fill(
    readme: Path,
    contents: Mapping[str, Callable[[], str]],
    source: str,
    check: bool,
    draw: Callable[[], Path | None],
) -> int:
    """Fill these sections of the README, which is made if it is not there, and draw what it shows; or compare it.
    Returns the exit code.

    Raises ValueError or OSError for bad input.
    """
    before = read_readme(readme) if readme.exists() else ""
    after = filled(before if readme.exists() else new_readme(source, contents), contents, readme)
    if check:
        diff = difflib.unified_diff(
            before.splitlines(),
            after.splitlines(),
            str(readme),
            f"{readme} from {source}",
            lineterm="",
        )
        print(*(diff if before != after else [f"{readme}: up to date with {source}"]), sep="\n")
        return int(before != after)
    if before != after:
        check_writable(readme)
    plot = draw()
    if plot is not None and git_ignored(plot):
        name = plot.as_posix()
        log.warning(f"git ignores {name}: git add -f {name}, or it will not show on GitHub")
    if before != after:
        write_text(readme, after)
    remove_leftovers(readme.resolve())
    done = "made" if not before else "updated" if before != after else "already up to date"
    print(f"{readme}: {done} from {source}")
    return 0


def report_run(run: Run, readme: Path, check: bool) -> int:
    """Fill the README from one run, and draw its loss curve. Returns and raises as `fill`."""
    drawable = (run.metrics["loss"] > 0).any()
    draw = partial(draw_loss_curve, run.out_dir) if drawable else lambda: None
    contents = {name: partial(section, run, readme) for name, section in SECTIONS.items()}
    return fill(readme, contents, str(run.out_dir), check, draw)


def report_comparison(comparison: Comparison, readme: Path | None, check: bool) -> int:
    """Fill the README from several runs, or print the table; draw the plot. Returns the exit code.

    Raises ValueError or OSError for bad input.
    """
    if readme is not None:
        contents = {"COMPARE": partial(comparison_section, comparison, readme)}
        draw = partial(draw_comparison, comparison, plot_beside(readme))
        return fill(readme, contents, f"{len(comparison.runs)} runs", check, draw)
    if check:
        raise ValueError("--check compares a README with the runs: name it with --readme")
    print(comparison.text())
    here, folder = (
        Path.cwd(),
        common_parent([absolute(run.out_dir) for run in comparison.runs.values()]),
    )
    path = (
        folder if folder is not None and folder.is_relative_to(here) else here
    ) / COMPARISON_PLOT
    try:
        plot = draw_comparison(comparison, path)
    except OSError as error:
        raise OSError(
            f"the plot cannot be written to {path} ({error.strerror or error}): cd to a folder that can be written to, "
            "and name the runs from there"
        ) from error
    if plot is not None:
        print(f"\nPlot: {plot.relative_to(here)}")
    return 0


def update(arguments: Arguments) -> int:
    """Report one run, or compare several. Returns the exit code; raises ValueError or OSError for bad input."""
    paths = arguments.out_dir
    if not paths:
        raise ValueError("--out_dir is empty: name a run directory, or several to compare them")
    if len(paths) == 1 and not is_glob(paths[0]):
        return report_run(
            read_run(paths[0]), arguments.readme or Path("README.md"), arguments.check
        )
    return report_comparison(
        compare(list(map(read_run, find_runs(paths)))), arguments.readme, arguments.check
    )


@speaking("update_readme.py")
def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0, 1 when --check finds a stale README, 2 for bad input."""
    try:
        arguments = read_flags(
            Arguments, sys.argv[1:] if argv is None else argv, "update_readme.py", __doc__
        )
        return update(arguments)
    except SystemExit as answered:  # after --help
        return int(answered.code or 0)
    except (ValueError, OSError) as error:
        log.error(error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
