"""Encoding a large text: tokens.py's stream beside encoding the whole text at once.

    python benchmarks/tokenizing.py --record tokenizing.json

The text is made of Tiny Shakespeare and Python's own sources, over and over, --size_mb of it. Each
way runs in a process of its own; memory is the highest resident memory of that process, less that
after its imports. The first --plain_mb are encoded both ways and the ids compared by their hash.
The plain way runs on one thread, as tiktoken does; the stream is measured on one thread, too, and
on all cores.
"""

import hashlib
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import os

from benchmarks.record import write_record
from benchmarks.throughput import peak_rss_mb
from parts.text.corpus import on_disk
from parts.text.vocabulary import load_tokenizer


@dataclass(frozen=True)
class Options:
    """What to measure."""

    record: Path | None = None
    """JSON file to write"""
    size_mb: int = 1000
    plain_mb: int = 100
    input_file: Path = Path("data/input.txt")
    """Tiny Shakespeare"""
    work: Path | None = None
    """folder for the text and its ids; None: a temporary one"""


def make_text(path: Path, size: int, input_file: Path) -> None:
    """Write `size` bytes of plays and programs, cut back to a whole character."""
    parts = [input_file.read_bytes()]
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        data = source.read_bytes()
        parts.append(data if is_utf8(data) else b"")
    block, written = b"\n".join(parts), 0
    with open(path, "wb") as file:
        while written < size:
            data = f"\n\nPart {written}\n\n".encode() + block
            written += file.write(data[: size - written].decode(errors="ignore").encode())
            if len(data) > size - written:
                break


def is_utf8(data: bytes) -> bool:
    """Some of Python's tests are not."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def one_way(text: Path, threads: int, folder: Path) -> None:
    """In a process of its own: encode, and print seconds, memory in MB, the number of ids and their
    hash."""
    tokenizer = load_tokenizer()
    tokenizer.encode_ordinary("a first word")
    before, started = peak_rss_mb(), time.perf_counter()
    if threads:
        ids = on_disk([text], tokenizer, folder, threads).tokens
    else:
        ids = np.array(tokenizer.encode_ordinary(text.read_bytes().decode()), dtype=np.uint16)
    seconds, memory = time.perf_counter() - started, peak_rss_mb() - before
    print(
        json.dumps(
            [seconds, memory, len(ids), hashlib.sha256(np.ascontiguousarray(ids)).hexdigest()]
        )
    )


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        return one_way(Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    options = tyro.cli(Options, description=__doc__)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        part, whole = folder / "part.txt", folder / "whole.txt"
        make_text(part, options.plain_mb * 10**6, options.input_file)
        make_text(whole, options.size_mb * 10**6, options.input_file)
        cores = os.cpu_count()
        for label, text, threads in (
            ("at once", part, 0),
            ("stream, 1 thread", part, 1),
            (f"stream, {cores} threads", part, cores),
            (f"stream, {cores} threads", whole, cores),
        ):
            command = [
                sys.executable,
                __file__,
                "--serve",
                str(text),
                str(threads),
                str(folder / f"ids-{threads}"),
            ]
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            seconds, memory, count, digest = json.loads(answer)
            size = text.stat().st_size / 1e6
            rows.append(
                {
                    "way": label,
                    "text_mb": round(size),
                    "seconds": round(seconds, 1),
                    "mb_per_sec": round(size / seconds, 1),
                    "memory_mb": round(memory),
                    "ids": count,
                    "sha256": digest[:16],
                }
            )
        if len({row["sha256"] for row in rows[:3]}) != 1:
            raise SystemExit("the ids differ")
    write_record(options.record, __file__, rows, asdict(options))


if __name__ == "__main__":
    main()
