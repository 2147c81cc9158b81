"""Fill the tables of the two READMEs: from the records of the other programs here, that of flags from parts/config.py.

    python benchmarks/summary.py              # with --check nothing is written; exit 1 when a table is stale

A table stands between <!--RECORD:NAME:START--> and <!--RECORD:NAME:END-->.
"""

import ast
import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from parts.readme import markdown_table, write_text

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"


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
    gpu, cpu = found["hardware"].get("gpu"), f"{found['hardware']['cores']} cores of an {found['hardware']['cpu']}"
    return (
        f"[{name}.json](benchmarks/records/{name}.json): {gpu or cpu}, PyTorch {found['versions']['torch']}, "
        f"{found['date']}, commit {found['commit'][:7]}"
    )


def flags() -> str:
    """Every flag of train.py with its default and its help, as parts/config.py has them."""
    tree = ast.parse((ROOT / "parts" / "config.py").read_text(encoding="utf-8"))
    (config,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Flags")
    rows = []
    for field, text in pairwise(config.body):
        if not isinstance(field, ast.AnnAssign) or "Suppress" in ast.unparse(field.annotation):
            continue
        words = re.sub(r"\s+", " ", ast.literal_eval(text.value)).replace("|", "\\|")
        default = ast.unparse(field.value)
        if call := re.search(r"Path\('([^']*)'\)", default):
            default = call[1]
        rows.append([f"`--{field.target.id}`", f"`{default.strip(chr(39)) or chr(32)}`", words])
    return markdown_table(["flag", "default", "what it is"], rows, align="---")


def throughput(*names: str) -> str:
    """Tokens per second, the ratio to train.py in the same rounds, and memory."""
    rows, seen = [], set()
    for row in (row for name in names for row in record(name)["rows"]):
        if row["program"] in seen:
            continue
        seen.add(row["program"])
        low, high = row["quartiles of that"]
        ratio = "" if row["program"] == "train.py" else f"{row['train.py is faster by']:.2f} ({low:.2f} to {high:.2f})"
        label = "matrix products alone, the ceiling" if row["program"] == "products" else row["program"]
        cells = [label, f"{row['tokens_per_sec']:,.0f}", ratio, f"{row['peak_gb']:.1f}", str(row["n"])]
        rows.append([f"**{cell}**" if label == "train.py" and cell else cell for cell in cells])
    header = ["program", "tokens per second", "`train.py` is faster by (quartiles)", "peak memory, GB", "n"]
    return "\n\n".join([markdown_table(header, rows), "; ".join(map(source, names))])


def tokenizing() -> str:
    """Speed and memory of encoding a text."""
    rows = [
        [row["way"], f"{row['text_mb']:,}", f"{row['mb_per_sec']:.1f}", f"{row['memory_mb']:,}"]
        for row in record("tokenizing")["rows"]
    ]
    header = ["encoding", "text, MB", "MB per second", "memory beyond the imports, MB"]
    return "\n\n".join([markdown_table(header, rows), f"The same ids each way; {source('tokenizing')}"])


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
    header = [
        "program",
        "precision",
        "tokens per second (range)",
        "`train.py` is faster by",
        "each at its fastest",
        "n",
    ]
    return "\n\n".join([markdown_table(header, rows), source("generation")])


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
    header = ["saves", "seconds each (range)", f"of the wall clock, one in {every} steps", "buffers, GB", "n"]
    return "\n\n".join([markdown_table(header, rows), source("stalls")])


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
    header = ["varied", "preset", "slices x tokens", "seconds a step (range)", "tokens per second", "peak memory, GB"]
    return "\n\n".join([markdown_table(header, rows), source("scaling")])


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
            rows.append((statistics.fmean(losses), [recipe, spread, f"{reached} of {len(found)}", str(len(found))]))
    header = ["recipe", "corpus loss (mean ± standard deviation)", "reached the target", "seeds"]
    return "\n\n".join([markdown_table(header, [row for _, row in sorted(rows)]), source("tokens-to-target")])


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "FLAGS": flags,
        "THROUGHPUT": lambda: throughput("throughput-8x128", "throughput-8x128-more"),
        "LONG": lambda: throughput("throughput-8x1024"),
        "GENERATION": generation,
        "SAVES": saves,
    },
    "benchmarks/README.md": {"TOKENIZING": tokenizing, "SCALING": scaling, "LADDER": ladder},
}


def filled(readme: str, text: str) -> str:
    """The text with every table rewritten. Raises ValueError when one has no place."""
    for name, table in TABLES[readme].items():
        start, end = (f"<!--RECORD:{name}:{side}-->" for side in ("START", "END"))
        place = re.compile(f"{re.escape(start)}\n.*?{re.escape(end)}", re.DOTALL)
        if len(place.findall(text)) != 1:
            raise ValueError(f"{start} and {end} must stand in it once")
        links = table().replace("](benchmarks/", "](" if readme.startswith("benchmarks/") else "](benchmarks/")
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
