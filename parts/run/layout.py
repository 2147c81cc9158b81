"""Every name and form of a run directory: paths, columns, lines of the log, blocks of samples."""

import re
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

# Bytes of a parameter in a checkpoint: fp32, and with both moments of AdamW (less with Muon).
WEIGHT_BYTES = 4
STATE_BYTES = 12

METRICS = {  # column of the CSV: number format
    "step": "d",
    "loss": ".8f",
    "lr": ".8e",
    "tokens_per_sec": ".2f",
    "elapsed_sec": ".2f",
    "tokens": "d",
    "window_loss": ".8f",
    "grad_norm": ".6f",
    "val_loss": ".8f",  # empty but at measurements
    "val_perplexity": ".4f",
    "bits_per_byte": ".6f",  # of window_loss
    "val_bits_per_byte": ".6f",
}
CSV_HEADER = ",".join(METRICS) + "\n"
Row = Mapping[str, float | None]  # column to value


class RunPaths:
    """Where the files of a run lie."""

    def __init__(self, root: Path):
        self.root = root
        self.config_json = root / "config.json"
        self.results_json = root / "results.json"
        self.tokenizer_json = root / "tokenizer.json"  # of an own vocabulary
        self.train_log = root / "logs" / "train.log"
        self.metrics_csv = root / "logs" / "train_metrics.csv"
        self.loss_curve = root / "logs" / "loss_curve.png"
        self.samples_txt = root / "samples" / "samples.txt"
        self.last = root / "checkpoints" / "last.pt"
        self.prev = root / "checkpoints" / "prev.pt"
        self.best = root / "checkpoints" / "best.pt"
        self.files = [path for path in vars(self).values() if path != root]
        self.models = (self.best, self.last, self.prev)  # in the order in which one is looked for
        self.events = root / "tensorboard"
        self.owner = root / "run.lock"  # locked by the process at work; names the last one
        self.earlier = root / "earlier"  # with a number behind it: a run that was moved aside

    @classmethod
    def around(cls, checkpoint: Path) -> "RunPaths":
        """The run that a checkpoint lies in, if it lies in one."""
        return cls(checkpoint.parent.parent)


LOG_FORM = "%(asctime)s | %(levelname)s | %(message)s"
STEP_FIELDS = {  # column: its name in a step line, number format
    "loss": ("loss", ".6f"),
    "lr": ("lr", ".2e"),
    "tokens_per_sec": ("tok/s", ".1f"),
    "window_loss": ("window_loss", ".6f"),
    "grad_norm": ("grad_norm", ".3f"),
    "val_loss": ("val_loss", ".6f"),
    "val_perplexity": ("val_perplexity", ".2f"),
    "val_bits_per_byte": ("val_bits_per_byte", ".4f"),
}
STEP_LINE = re.compile(r"(?:^|\| )step (\d+)/\d+ \| (loss .*)\n", re.MULTILINE)


def csv_line(row: Row) -> str:
    """One line of the CSV; what is missing or None is an empty field."""
    cells = []
    for column, form in METRICS.items():
        value = row.get(column)
        cells.append("" if value is None else format(value, form))
    return ",".join(cells) + "\n"


def csv_rows(text: str) -> list[dict[str, float]]:
    """The lines of a CSV without the header, as columns to values; empty fields are left out."""
    lines = [line.split(",") for line in text.splitlines() if line[:1].isdigit()]
    return [
        {column: float(cell) for column, cell in zip(METRICS, cells, strict=False) if cell}
        for cells in lines
    ]


def step_line(row: Row, steps: int) -> str:
    """The message of train.log for a row of the CSV, in a run of so many steps."""
    parts = [f"step {row['step']}/{steps}"]
    for column, (name, form) in STEP_FIELDS.items():
        value = row.get(column)
        if value is not None:
            parts.append(f"{name} {value:{form}}")
    return " | ".join(parts)


def logged_steps(log: str) -> list[dict[str, float]]:
    """The rows that the step lines of a log tell, oldest first."""
    columns = {name: column for column, (name, _form) in STEP_FIELDS.items()}
    rows = []
    for step, rest in STEP_LINE.findall(log):
        fields = [part.split(" ") for part in rest.split(" | ")]
        values = {columns[name]: float(value) for name, value in fields if name in columns}
        rows.append({"step": float(step)} | values)
    return rows


AT_CTRL_C = " (at Ctrl-C)"  # remark of a block that the run would not have without Ctrl-C
BLOCK_TITLE = re.compile(r"^={80}\nSTEP (\d+)( \(at Ctrl-C\))?$", re.MULTILINE)


class SampleBlock(NamedTuple):
    """What was sampled at one step."""

    step: int
    remark: str  # AT_CTRL_C or nothing
    texts: str  # a PROMPT: / OUTPUT: pair for each output

    def __str__(self) -> str:
        return f"{'=' * 80}\nSTEP {self.step}{self.remark}\n\n{self.texts}"

    def first_pair(self) -> tuple[str, str]:
        """The first prompt, and the output that begins with it."""
        prompt, _, rest = self.texts.removeprefix("PROMPT:\n").partition("\nOUTPUT:\n")
        return prompt, rest.partition("\n\nPROMPT:\n")[0].strip()

    @property
    def is_whole(self) -> bool:
        """Whether nothing was cut off."""
        has_output = self.texts.startswith("PROMPT:\n") and "\nOUTPUT:\n" in self.texts
        return has_output and self.texts.endswith("\n\n")


def sample_block(step: int, prompt: str, outputs: list[str], remark: str = "") -> SampleBlock:
    """The block for these outputs."""
    pairs = [f"PROMPT:\n{prompt}\nOUTPUT:\n{output}\n\n" for output in outputs]
    return SampleBlock(step, remark, "".join(pairs))


def sample_blocks(text: str) -> list[SampleBlock]:
    """The blocks in samples.txt or a part of it, oldest first."""
    titles = list(BLOCK_TITLE.finditer(text))
    blocks = []
    for title, after in zip_longest(titles, titles[1:]):
        texts = text[title.end() : after.start() if after else None].removeprefix("\n\n")
        blocks.append(SampleBlock(int(title[1]), title[2] or "", texts))
    return blocks


def drawn_at_ctrl_c(data: bytes) -> bytes:
    """The block that the data begin with, if it was drawn at Ctrl-C and is whole; else nothing."""
    text = data.decode("utf-8", "surrogateescape")
    blocks = sample_blocks(text)
    if not blocks or not blocks[0].is_whole or blocks[0].remark != AT_CTRL_C:
        return b""
    block = str(blocks[0])
    return block.encode("utf-8", "surrogateescape") if text.startswith(block) else b""
