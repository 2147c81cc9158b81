"""Fill the tables of the READMEs and of docs/: from the records of the other programs here, from
benchmarks/cards.py, and those of flags from the scripts.

    python benchmarks/summary.py    # with --check nothing is written; exit 1 when one is stale

A table stands between <!--RECORD:NAME:START--> and <!--RECORD:NAME:END-->.
"""

import json
import os
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import get_type_hints

import pandas as pd
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import export_hf
import sample
import update_readme
from benchmarks import cards
from parts.commandline import default_words, help_of
from parts.flags import PRESETS, Flags
from parts.report.sections import markdown_table, write_text

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"
FAIR, UNFAIR = "nanoGPT, compiled, memory kept", "nanoGPT, compiled"


@dataclass(frozen=True)
class Options:
    """Flags of the command line."""

    check: bool = False
    """write nothing; exit 1 when a table is stale"""


def record(name: str) -> dict:
    """A JSON record."""
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))


def source(name: str) -> str:
    """Where a table comes from and on what it was measured."""
    found = record(name)
    hardware = found["hardware"]
    device = hardware.get("gpu") or f"{hardware['cores']} cores of an {hardware['cpu']}"
    return (
        f"[{name}.json](benchmarks/records/{name}.json): {device}, "
        f"PyTorch {found['versions']['torch']}, "
        f"{found['date']}, commit {found['commit'][:7]}"
    )


def flags(kind: type) -> str:
    """Every flag of a script with its default and its help; the bases of its dataclass are
    groups."""
    types = get_type_hints(kind, include_extras=True)
    explained = help_of(kind)
    groups = [base for base in reversed(kind.__mro__[1:]) if is_dataclass(base)]
    rows = []
    for group in groups or [kind]:
        if groups:
            title = group.__name__.removesuffix("Flags").lower()
            rows.append([f"**{title}**", "", group.__doc__ or ""])
        for field in fields(group):
            default = default_words(types[field.name], field.default)
            if field.default is MISSING:
                default = "must be given"
            rows.append([f"`--{field.name}`", default, explained[field.name].replace("|", "\\|")])
    return markdown_table(["flag", "default", "what it is"], rows, align="---")


def presets() -> str:
    """Shape and size of each, but of the one that follows from the text."""
    rows = []
    for name in (name for name in PRESETS if name != "write"):
        c = cards.config_of(name)
        shape = (c.n_layer, c.n_head, c.n_embd, c.block_size, c.batch_size, c.seq_len)
        rows.append([f"`{name}`", f"{c.n_params:,}", *map(str, shape)])
    header = ["preset", "parameters", "layers", "heads", "width", "positions"]
    return markdown_table([*header, "batch_size", "seq_len"], rows)


def on_cards() -> str:
    """Of each card: memory and time of the default run, and the largest preset with room."""
    rows = []
    for card in cards.CARDS:
        largest = cards.largest_that_fits(card)
        named = f"`{largest.preset}`"
        if largest.micro_batch < 32:
            named += f" `--micro_batch {largest.micro_batch}`"
        default = need(card, cards.config_of("gpt2"))
        rows.append([f"{card.name}, {card.gib} GB", *default, named, *need(card, largest)])
    header = ["card", "`gpt2`: memory", "`gpt2`: time"]
    header += ["largest preset with room", "its memory", "its time"]
    return markdown_table(header, rows, align="---")


def need(card: cards.Card, config: cards.Config) -> tuple[str, str]:
    """Memory, and the range of time."""
    seconds = [cards.seconds(card, config, achieved) for achieved in cards.ACHIEVED]
    least, most = (max(1, round(each / 60)) for each in seconds)
    return f"{cards.total(config) / 1e9:.1f} GB", f"{least} to {most} min"


def card_memory() -> str:
    """The sum behind the table of cards, for each preset."""
    rows = []
    for name in (name for name in PRESETS if name not in ("demo", "write")):
        parts = cards.memory(cards.config_of(name))
        cells = [f"{n_bytes / 1e9:.2f}" for n_bytes in (*parts.values(), cards.BESIDES)]
        rows.append([f"`{name}`", *cells, f"{cards.total(cards.config_of(name)) / 1e9:.1f}"])
    return markdown_table(["GB", *parts, "besides", "sum"], rows)


def card_time() -> str:
    """The quotient behind it."""
    rows = []
    for card in cards.CARDS:
        cells = [f"{card.cuda_cores:,}", f"{card.boost_ghz:.2f}", f"{card.peak / 1e12:.1f}"]
        cells += [f"{card.peak * part / 1e12:.1f}" for part in cards.ACHIEVED]
        rows.append([card.name, *cells])
    header = ["card", "CUDA cores", "boost clock, GHz", "peak in bf16, TFLOP/s"]
    return markdown_table([*header, *(f"{part:.0%} of it" for part in cards.ACHIEVED)], rows)


def card_check() -> str:
    """The same sum beside what processes on a CPU took at their peak."""
    measured = [
        ("adamw", row["preset"], row["batch_size"], row["seq_len"], row["peak_gb"])
        for row in record("scaling")["rows"]
        if row["varied"] == "model" or row["batch_size"] == 16
    ]
    for row in record("throughput-32x128")["rows"]:
        if row["program"] != "products":  # on a CPU 2,048 of a step's tokens at once
            optimizer = "muon" if "muon" in row["program"] else "adamw"
            measured.append((optimizer, "gpt2", 16, 128, row["peak_gb"]))
    measured.sort(key=lambda row: row[-1])
    rows = []
    for optimizer, preset, micro_batch, seq_len, peak_gb in measured:
        config = replace(cards.config_of(preset, micro_batch), optimizer=optimizer, seq_len=seq_len)
        sizes = [f"{cards.total(config) / 1e9:.1f}", f"{peak_gb:.1f}"]
        rows.append([f"`{preset}`", f"{micro_batch} x {seq_len}", optimizer, *sizes])
    header = ["preset", "slices x tokens at once", "optimizer"]
    table = markdown_table([*header, "the sum, GB", "measured on a CPU, GB"], rows)
    return f"{table}\n\n{source('scaling')}; {source('throughput-32x128')}"


def throughput(*names: str) -> str:
    """Tokens per second, the ratio to train.py in the same rounds, and memory; the fair comparison
    first."""
    measured: dict[str, dict] = {}
    for name in names:
        for row in record(name)["rows"]:
            measured.setdefault(row["program"], row)
    rows = []
    for program in sorted(measured, key=rank_of):
        row = measured[program]
        is_ours = program == "train.py"
        low, high = row["quartiles of that"]
        label = "matrix products alone, the ceiling" if program == "products" else program
        ratio = "" if is_ours else f"{row['train.py is faster by']:.2f} ({low:.2f} to {high:.2f})"
        cells = [label, f"{row['tokens_per_sec']:,.0f}", ratio, f"{row['peak_gb']:.1f}"]
        cells.append(str(row["n"]))
        rows.append([f"**{cell}**" if is_ours and cell else cell for cell in cells])
    header = ["program", "tokens per second", "`train.py` is faster by (quartiles)"]
    table = markdown_table([*header, "peak memory, GB", "n"], rows)
    return f"{table}\n\n{'; '.join(map(source, names))}"


def rank_of(program: str) -> int:
    """Of a row in the table of training speed."""
    return ["train.py", FAIR, UNFAIR].index(program) if program in ("train.py", FAIR, UNFAIR) else 3


def fair(name: str) -> str:
    """The one ratio to quote, and the one without the setting that explains most of it."""
    rows = {row["program"]: row for row in record(name)["rows"]}
    fair, unfair = (
        f"{rows[peer]['train.py is faster by']:.2f} times as fast "
        f"(quartiles {low:.2f} to {high:.2f})"
        for peer in (FAIR, UNFAIR)
        for low, high in [rows[peer]["quartiles of that"]]
    )
    return (
        f"**`train.py` is {fair} as nanoGPT with the same memory setting**, both compiled. "
        f"It is {unfair} as nanoGPT as it comes, compiled, too."
    )


def tokenizing() -> str:
    """Speed and memory of encoding a text."""
    rows = [
        [row["way"], f"{row['text_mb']:,}", f"{row['mb_per_sec']:.1f}", f"{row['memory_mb']:,}"]
        for row in record("tokenizing")["rows"]
    ]
    header = ["encoding", "text, MB", "MB per second", "memory beyond the imports, MB"]
    return f"{markdown_table(header, rows)}\n\nThe same ids each way; {source('tokenizing')}"


def generation() -> str:
    """Tokens per second of sampled text."""
    rows = [
        [
            row["program"],
            row["precision"],
            f"{row['tokens_per_sec']:.1f} ({row['least']:.1f} to {row['most']:.1f})",
            "" if row["program"] == "train.py" else f"{row['train.py is faster by']:.2f}",
            "" if row["program"] == "train.py" else f"{row['fastest against fastest']:.2f}",
            str(row["n"]),
        ]
        for row in record("generation")["rows"]
    ]
    header = ["program", "precision", "tokens per second (range)", "`train.py` is faster by"]
    table = markdown_table([*header, "each at its fastest", "n"], rows)
    return f"{table}\n\n{source('generation')}"


def other_tools() -> str:
    """What each tool makes of an exported model, the worst of all versions and models."""
    found = pd.DataFrame(record("other-tools")["rows"])
    found = found[found["tool"] != "train.py"]
    packages = found["tool"].str.extract(r"^([\w-]+)", expand=False)
    rows = []
    for package, part in found.groupby(packages, sort=False):
        versions = ", ".join(part["version"].dropna().unique())
        cells = [f"llama.cpp in {package}" if "llama" in package else package]
        cells += [versions, worst(part["ids"]), worst(part["greedy"])]
        for column in ("log_prob_off", "bits_per_byte_off"):
            off = part[column].max()
            cells.append("" if pd.isna(off) else f"{off:.6f}")
        rows.append(cells)
    header = ["tool", "versions tried", "token ids", "greedy text"]
    header += ["log-probabilities off by, nats", "bits per byte off by"]
    return markdown_table(header, rows, align="---")


def worst(column: "pd.Series[str]") -> str:
    """Of answers that are "equal" or not; empty where the tool gives none."""
    answers = set(column.dropna())
    return next(iter(answers - {"equal"}), "equal") if answers else ""


def saves() -> str:
    """What a save costs."""
    rows = [
        [
            row["saves"],
            f"{row['cost_of_a_save_sec']:.2f} ({row['least']:.2f} to {row['most']:.2f})",
            f"{row['share_of_wall_clock_percent']:.2f} %",
            f"{row['buffers_gb']:.2f}",
            str(row["n"]),
        ]
        for row in record("stalls")["rows"]
    ]
    every = record("stalls")["rows"][0]["save_every"]
    header = ["saves", "seconds each (range)", f"of the wall clock, one in {every} steps"]
    return f"{markdown_table([*header, 'buffers, GB', 'n'], rows)}\n\n{source('stalls')}"


def scaling() -> str:
    """Step time and memory against the shape."""
    rows = [
        [
            row["varied"],
            row["preset"],
            f"{row['batch_size']} x {row['seq_len']}",
            f"{row['step_sec']:.2f} ({row['least']:.2f} to {row['most']:.2f})",
            f"{row['tokens_per_sec']:,}",
            f"{row['peak_gb']:.1f}",
        ]
        for row in record("scaling")["rows"]
    ]
    header = ["varied", "preset", "slices x tokens", "seconds a step (range)"]
    table = markdown_table([*header, "tokens per second", "peak memory, GB"], rows)
    return f"{table}\n\n{source('scaling')}"


def ladder() -> str:
    """Loss after equal tokens of every recipe that was run with several seeds, the best first."""
    runs: dict[str, list[dict]] = {}
    for row in record("tokens-to-target")["rows"]:
        runs.setdefault(row["recipe"], []).append(row)
    rows = []
    for recipe, found in runs.items():
        losses = [row["corpus_loss"] for row in found]
        if len(losses) > 1:
            spread = f"{statistics.fmean(losses):.3f} ± {statistics.stdev(losses):.3f}"
            reached = sum(row["tokens_to_target"] is not None for row in found)
            cells = [recipe, spread, f"{reached} of {len(found)}", str(len(found))]
            rows.append((statistics.fmean(losses), cells))
    header = ["recipe", "corpus loss (mean ± standard deviation)", "reached the target", "seeds"]
    table = markdown_table(header, [cells for _, cells in sorted(rows)])
    return f"{table}\n\n{source('tokens-to-target')}"


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"TOOLS": other_tools, "CARDS": on_cards},
    "docs/flags.md": {
        "PRESETS": presets,
        "FLAGS": lambda: flags(Flags),
        "SAMPLE": lambda: flags(sample.Options),
        "EXPORT": lambda: flags(export_hf.Options),
        "REPORT": lambda: flags(update_readme.Arguments),
    },
    "docs/texts-and-devices.md": {
        "CARD_MEMORY": card_memory,
        "CARD_TIME": card_time,
        "CARD_CHECK": card_check,
    },
    "docs/speed.md": {
        "FAIR": lambda: fair("throughput-8x128"),
        "THROUGHPUT": lambda: throughput("throughput-8x128", "throughput-8x128-more"),
        "LONG": lambda: throughput("throughput-8x1024"),
        "GENERATION": generation,
        "SAVES": saves,
    },
    "benchmarks/README.md": {"TOKENIZING": tokenizing, "SCALING": scaling, "LADDER": ladder},
}


def filled(readme: str, text: str) -> str:
    """A file's text with every table rewritten. Raises ValueError when one has no place."""
    for name, table in TABLES[readme].items():
        start, end = (f"<!--RECORD:{name}:{side}-->" for side in ("START", "END"))
        place = re.compile(f"{re.escape(start)}\n.*?{re.escape(end)}", re.DOTALL)
        if len(place.findall(text)) != 1:
            raise ValueError(f"{start} and {end} must stand in it once")
        folder = Path(os.path.relpath(ROOT / "benchmarks", (ROOT / readme).parent)).as_posix()
        links = table().replace("](benchmarks/", f"]({folder}/".replace("](./", "]("))
        content = f"{start}\n{links}\n{end}"
        text = place.sub(lambda _, content=content: content, text)
    return text


def main() -> int:
    options = tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    stale = 0
    for readme in TABLES:
        before = (ROOT / readme).read_text(encoding="utf-8")
        after = filled(readme, before)
        stale += before != after
        if options.check:
            print(f"{readme}: {'up to date' if before == after else 'stale'}")
        else:
            write_text(ROOT / readme, after)
    return int(options.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
