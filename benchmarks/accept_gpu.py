"""What only a graphics card can prove, one part at a time and in at most eight minutes: numbers,
robustness, speed.

    python benchmarks/accept_gpu.py --part numerics
    python benchmarks/accept_gpu.py --part robustness
    python benchmarks/accept_gpu.py --part speed --nanogpt ../nanoGPT

Each check runs in a process of its own, so that none can end another, and prints one line with its
figure; all of them stand in benchmarks/records/accept-gpu-PART.json. The exit code is 0 when all
passed, 1 when not, 2 without a card.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.gpu import numerics, robustness, speed  # noqa: F401 (they add their checks)
from benchmarks.gpu.common import CHECKS, ROOT, LeftOut, Options
from benchmarks.record import write_record
from parts.run.directory import read_json


def one_check(name: str, options: Options, here: Path) -> dict:
    """Make it in this process."""
    logging.getLogger("train").addHandler(logging.StreamHandler(sys.stderr))
    try:
        return {"outcome": "passed", "figure": CHECKS[options.part][name][0](options, here)}
    except LeftOut as reason:
        return {"outcome": "left out", "figure": str(reason)}
    except BaseException as error:  # whatever it is, the others go on
        traceback.print_exc()
        return {"outcome": "FAILED", "figure": f"{type(error).__name__}: {error}"}


def in_a_process_of_its_own(name: str, options: Options, here: Path, seconds: float) -> dict:
    """Make it there, and end it with all that it started. Of one that fails, show what it said."""
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    answer = here / "answer.json"
    asked = [name, json.dumps(asdict(options), default=str), str(here), str(answer)]
    with open(here / "output.txt", "wb") as output:
        line = [sys.executable, __file__, "--check", *asked]
        process = subprocess.Popen(line, stdout=output, stderr=output, start_new_session=True)
        try:
            process.wait(timeout=seconds)
            found = read_json(answer) or {
                "outcome": "FAILED",
                "figure": f"exit code {process.returncode}",
            }
        except subprocess.TimeoutExpired:
            found = {"outcome": "FAILED", "figure": f"not done within {seconds:.0f} s"}
        finally:
            end_with_all_it_started(process)
    if found["outcome"] == "FAILED":
        print(
            (here / "output.txt").read_text(encoding="utf-8", errors="replace")[-3000:],
            file=sys.stderr,
        )
    if options.work is None:
        shutil.rmtree(here, ignore_errors=True)
    return found


def end_with_all_it_started(process: subprocess.Popen) -> None:
    """Also when it has ended itself, and programs of its go on."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def answer_for(arguments: list[str]) -> None:
    """The child's part: make one check, and write its answer."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # which a shell's background ignores, and children with it
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
        print(
            "accept_gpu.py: error: PyTorch sees no CUDA device: there is nothing to prove here",
            file=sys.stderr,
        )
        return 2
    if not options.input_file.is_file():
        print(
            f"accept_gpu.py: error: no {options.input_file}: name a text with --input_file",
            file=sys.stderr,
        )
        return 2
    options = replace(options, input_file=options.input_file.resolve())
    names = [name for name in CHECKS[options.part] if options.only in name]
    if not names:
        print(
            f"accept_gpu.py: error: --only {options.only}: no check of this part has that name",
            file=sys.stderr,
        )
        return 2
    record = options.record
    if record is None and options.device == "cuda" and not options.only:
        record = ROOT / "benchmarks" / "records" / f"accept-gpu-{options.part}.json"
    rows, end = [], time.monotonic() + 60 * options.minutes
    with contextlib.ExitStack() as stack:
        work = options.work or Path(
            stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        )
        for number, name in enumerate(names):
            began, seconds = time.monotonic(), CHECKS[options.part][name][1]
            found, left = (
                {"outcome": "left out", "figure": f"the {options.minutes:g} minutes were over"},
                end - began,
            )
            if left > 10:
                here = work.resolve() / f"{options.part}-{number:02}"
                tried = in_a_process_of_its_own(name, options, here, min(left, seconds))
                if time.monotonic() < end or tried["outcome"] != "FAILED":
                    found = tried
            took = time.monotonic() - began
            rows.append({"check": name, **found, "seconds": round(took, 1)})
            print(f"{found['outcome']:8} {took:5.0f} s  {name}: {found['figure']}", flush=True)
            with contextlib.redirect_stdout(None):  # the table; each check has had its line
                write_record(record, __file__, rows, asdict(options))
    return int(any(row["outcome"] == "FAILED" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
