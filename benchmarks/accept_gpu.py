"""What only a graphics card can prove, one part at a time and in at most eight minutes: numbers, robustness, speed.

    python benchmarks/accept_gpu.py --part numerics
    python benchmarks/accept_gpu.py --part robustness
    python benchmarks/accept_gpu.py --part speed --nanogpt ../nanoGPT

Each check runs in a process of its own, so that none can end another, and prints one line with its figure; all of them
stand in benchmarks/records/accept-gpu-PART.json. The exit code is 0 when all passed, 1 when not, 2 without a card.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.gpu import numerics, robustness, speed  # noqa: F401 (they add their checks)
from benchmarks.gpu.common import CHECKS, ROOT, LeftOut, Options
from benchmarks.record import write_record
from parts.files import read_json


def one_check(name: str, options: Options, here: Path) -> dict:
    """Make it in this process."""
    logging.disable(logging.CRITICAL)
    try:
        return {"outcome": "passed", "figure": CHECKS[options.part][name][0](options, here)}
    except LeftOut as reason:
        return {"outcome": "left out", "figure": str(reason)}
    except BaseException as error:  # whatever it is, the others go on
        return {"outcome": "FAILED", "figure": f"{type(error).__name__}: {error}"}


def in_a_process_of_its_own(name: str, options: Options, here: Path, seconds: float) -> dict:
    """Make it there, and end it with all that it started when its time is over."""
    here.mkdir(parents=True)
    answer = here / "answer.json"
    asked = [name, json.dumps(asdict(options), default=str), str(here), str(answer)]
    line = [sys.executable, __file__, "--check", *asked]
    with open(here / "output.txt", "wb") as output:
        process = subprocess.Popen(line, stdout=output, stderr=output, start_new_session=True)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError, AttributeError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
            return {"outcome": "FAILED", "figure": f"not done within {seconds:.0f} s"}
    said = (here / "output.txt").read_text(encoding="utf-8", errors="replace")
    return read_json(answer) or {"outcome": "FAILED", "figure": f"exit code {process.returncode}: {said[-500:]}"}


def answer_for(arguments: list[str]) -> None:
    """The child's part: make one check, and write its answer."""
    name, values, here, answer = arguments
    flags = json.loads(values)
    flags |= {key: Path(flags[key]) for key in ("input_file", "nanogpt") if flags[key]}
    found = one_check(name, Options(**flags), Path(here))
    Path(answer).write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)  # whatever a failed check has left behind


def main() -> int:
    if sys.argv[1:2] == ["--check"]:
        answer_for(sys.argv[2:])
    options = tyro.cli(Options, description=__doc__, use_underscores=True)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("accept_gpu.py: error: this PyTorch sees no CUDA device: there is nothing to prove here", file=sys.stderr)
        return 2
    if not options.input_file.is_file():
        print(
            f"accept_gpu.py: error: {options.input_file} is not there: name a text with --input_file", file=sys.stderr
        )
        return 2
    options = replace(options, input_file=options.input_file.resolve())
    rows, started = [], time.monotonic()
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        for number, (name, (_, seconds)) in enumerate(CHECKS[options.part].items()):
            if options.only not in name:
                continue
            began = time.monotonic()
            left = 60 * options.minutes - (began - started)
            if left > 10:
                found = in_a_process_of_its_own(name, options, work.resolve() / f"{number:02}", min(left, seconds))
            else:
                found = {"outcome": "left out", "figure": f"the {options.minutes:g} minutes were over"}
            took = time.monotonic() - began
            rows.append({"check": name, **found, "seconds": round(took, 1)})
            print(f"{found['outcome']:8} {took:5.0f} s  {name}: {found['figure']}", flush=True)
    own = ROOT / "benchmarks" / "records" / f"accept-gpu-{options.part}.json" if options.device == "cuda" else None
    write_record(options.record or own, __file__, rows, asdict(options), hidden=("figure",))
    return int(any(row["outcome"] == "FAILED" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
