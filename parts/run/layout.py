"""The forms of a run directory: the columns of its CSV, and samples.txt, a block for each step that was sampled."""

import re

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

AT_CTRL_C = " (at Ctrl-C)"  # behind the step of a block that the run would not have without Ctrl-C
TITLE = r"={80}\nSTEP \d+(?: \(at Ctrl-C\))?\n"  # of any block
BEGINNING = re.compile(r"^={80}\n(?=STEP \d+(?: \(at Ctrl-C\))?$)", re.MULTILINE)
BLOCK = re.compile(
    rf"^={{80}}\nSTEP (\d+)(?: \(at Ctrl-C\))?\n\n(.*?)\n*(?=^{TITLE}|\Z)", re.MULTILINE | re.DOTALL
)  # its step and its texts
FIRST_AT_CTRL_C = re.compile(
    rf"={{80}}\nSTEP \d+ \(at Ctrl-C\)\n\nPROMPT:\n.*?\nOUTPUT:\n.*?\n\n(?={TITLE}|\Z)".encode(),
    re.DOTALL,
)


def block_of(step: int, prompt: str, outputs: list[str], remark: str = "") -> str:
    """A block: 80 "=", the step with its remark, then a PROMPT: / OUTPUT: pair for each output."""
    pairs = "".join(f"PROMPT:\n{prompt}\nOUTPUT:\n{output}\n\n" for output in outputs)
    return f"{'=' * 80}\nSTEP {step}{remark}\n\n{pairs}"


def drawn_at_ctrl_c(data: bytes) -> bytes:
    """The block that the data begin with, if it was drawn at Ctrl-C and is whole; else nothing."""
    found = FIRST_AT_CTRL_C.match(data)
    return found[0] if found else b""
