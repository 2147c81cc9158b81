"""Kill a training run over and over, start it again each time, and compare what is left with a run
that was left alone.

    python benchmarks/torture.py --kills 120
    python benchmarks/torture.py --kills 40 --nanogpt PATH    # nanoGPT's trainer, at equal settings

Of four kills two wait until a checkpoint is being written and fall at a random instant within that,
one waits for the last sample, and one falls at a random instant of the process's life, its start
included; the first kill of a run falls into its first save. A kill is SIGKILL (TerminateProcess on
Windows): the process gets no chance to tidy up. After each one every checkpoint is loaded; what
should have been there and was not, is counted.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from parts.run.checkpoint import load_checkpoint  # noqa: E402
from parts.run.layout import logged_steps  # noqa: E402
from parts.text.vocabulary import load_tokenizer  # noqa: E402


@dataclass(frozen=True)
class Arguments:
    """Flags of the command line."""

    kills: int = 120
    """how many times to kill"""
    steps: int = 1500
    """length of the run; when it ends before the last kill, it is started anew"""
    save_every: int = 20
    """steps between checkpoints"""
    seed: int = 0
    """of the instants"""
    work: Path = Path("out/torture")
    """folder for the runs; emptied first"""
    nanogpt: Path | None = None
    """checkout of nanoGPT, to torture its trainer instead"""
    flags: str = "--amp=bf16 --dropout=0.1"
    """further flags of train.py"""


SHAPE = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=2)
TEXT = "".join(f"Line {i}: {i * i} is the square of {i}, {i**3} its cube.\n" for i in range(400))


class OurTrainer:
    """train.py, and where it leaves what."""

    names = ("last.pt", "prev.pt")
    moments = ("life", "write", "write", "last sample")  # at which it is killed, in turn

    def __init__(self, arguments: Arguments):
        self.text = arguments.work / "input.txt"
        self.text.write_text(TEXT, encoding="utf-8")
        self.flags = [f"--{name}={value}" for name, value in (SHAPE | {"seq_len": 16}).items()]
        self.flags += [
            f"--steps={arguments.steps}",
            f"--save_every={arguments.save_every}",
            "--sample_every=30",
        ]
        self.flags += [
            "--log_every=1",
            "--target_window=3",
            "--target_loss=0",
            "--max_new_tokens=32",
            "--device=cpu",
        ]
        self.flags += ["--threads=1", f"--input_file={self.text}", *arguments.flags.split()]

    def start(self, out: Path) -> subprocess.Popen:
        """The command that the user types, first and again."""
        command = [sys.executable, str(ROOT / "train.py"), *self.flags, f"--out_dir={out}"]
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return subprocess.Popen(command, text=True, encoding="utf-8", errors="replace", **pipes)

    def checkpoints(self, out: Path) -> list[Path]:
        """The files that must be whole at every instant at which they are there."""
        return [out / "checkpoints" / name for name in self.names]

    def unfinished(self, out: Path) -> set[tuple[str, int]]:
        """The checkpoints that are being written, or were when the process died: name and time of
        the latest change."""
        paths = [out / "checkpoints" / f"{name}.pt.tmp" for name in ("last", "best")]
        return {(path.name, stat.st_mtime_ns) for path in paths if (stat := stat_of(path))}

    def load(self, path: Path) -> int:
        """The step of a checkpoint; raises when it is damaged."""
        return load_checkpoint(path)["step"]

    def logged_step(self, out: Path) -> int:
        """The last step that the log speaks of."""
        log = out / "logs" / "train.log"
        steps = logged_steps(log.read_text(encoding="utf-8") if log.exists() else "")
        return int(steps[-1]["step"]) if steps else 0

    def samples_at_the_end(self, out: Path, behind: int) -> bool:
        """Whether what the log tells behind so many bytes ends with what is told before the last
        sample."""
        log = out / "logs" / "train.log"
        told = log.read_bytes()[behind:] if log.exists() else b""
        return b" | Corpus loss " in told[told.rfind(b"\n", 0, -1) + 1 :]

    def discard(self, out: Path) -> None:
        """What the user does about a run that cannot be continued."""
        shutil.rmtree(out)


class NanoGPT(OurTrainer):
    """nanoGPT's train.py: no biases, no CSV, one checkpoint that is overwritten in place, otherwise
    the same shape."""

    moments = ("life", "write")

    def __init__(self, arguments: Arguments):
        self.repo = arguments.work / "nanogpt"
        shutil.copytree(arguments.nanogpt, self.repo, ignore=shutil.ignore_patterns(".git"))
        data = self.repo / "data" / "torture"
        data.mkdir()
        tokens = np.array(load_tokenizer().encode_ordinary(TEXT), dtype=np.uint16)
        for name in ("train.bin", "val.bin"):
            tokens.tofile(data / name)
        values = SHAPE | dict(
            dataset="torture",
            device="cpu",
            dtype="float32",
            compile=False,
            gradient_accumulation_steps=1,
            eval_interval=arguments.save_every,
            eval_iters=1,
            always_save_checkpoint=True,
            warmup_iters=150,
            max_iters=arguments.steps,
            lr_decay_iters=arguments.steps,
            learning_rate=3e-4,
            min_lr=3e-5,
        )
        self.flags = [f"--{name}={value}" for name, value in values.items()]
        self.full_size = 0  # of a checkpoint, known after the undisturbed run

    def start(self, out: Path) -> subprocess.Popen:
        out.mkdir(parents=True, exist_ok=True)
        origin = "resume" if (out / "ckpt.pt").exists() else "scratch"
        command = [
            sys.executable,
            "-u",
            "train.py",
            *self.flags,
            f"--out_dir={out.resolve()}",
            f"--init_from={origin}",
        ]
        with open(out / "log.txt", "a", encoding="utf-8") as log:
            return subprocess.Popen(
                command, cwd=self.repo, stdout=log, stderr=subprocess.PIPE, text=True
            )

    def checkpoints(self, out: Path) -> list[Path]:
        return [out / "ckpt.pt"]

    def unfinished(self, out: Path) -> set[tuple[str, int]]:
        stat = stat_of(out / "ckpt.pt")
        return {("ckpt.pt", stat.st_mtime_ns)} if stat and stat.st_size < self.full_size else set()

    def load(self, path: Path) -> int:
        return torch.load(path, weights_only=True)["iter_num"]

    def logged_step(self, out: Path) -> int:
        return last_match(r"iter (\d+):", (out / "log.txt").read_text(encoding="utf-8"))


def stat_of(path: Path) -> os.stat_result | None:
    """What the system knows about a file that may vanish at any moment."""
    try:
        return path.stat()
    except OSError:
        return None


def last_match(pattern: str, text: str) -> int:
    """The number in the last match; 0 when there is none."""
    return int([0, *re.findall(pattern, text)][-1])


@dataclass
class Tally:
    """What happened."""

    kills: int = 0
    inside_a_write: int = 0
    inside_the_first_save: int = 0
    in_the_last_sample: int = 0
    before_the_first_checkpoint: int = 0
    resumed: int = 0
    runs: int = 0  # that came to their end, of which the last is compared
    steps_repeated_at_most: int = 0
    checkpoints_lost: int = 0
    lost_runs: int = 0  # could not be continued: all of their steps were for nothing
    steps_lost_with_them: int = 0
    complaints: Counter[str] = field(default_factory=Counter)


def torture(
    arguments: Arguments, trainer: OurTrainer, startup_sec: float, write_sec: float
) -> Tally:
    """Start, kill, look; until all kills are done, and then to the end."""
    random, tally, out = Random(arguments.seed), Tally(), arguments.work / "killed"
    new = True  # a run that has not been killed yet
    while True:
        existed = {path for path in trainer.checkpoints(out) if path.exists()}
        unfinished_before = trainer.unfinished(out)
        log = stat_of(out / "logs" / "train.log")
        behind = log.st_size if log else 0
        process = trainer.start(out)
        if tally.kills == arguments.kills:
            process.wait()
        else:
            moment = trainer.moments[tally.kills % len(trainer.moments)]
            if new:
                aim_into_a_write(process, trainer, out, 1, random.uniform(0, write_sec))
            elif moment == "write":
                aim_into_a_write(
                    process, trainer, out, random.randint(1, 3), random.uniform(0, write_sec)
                )
            elif moment == "last sample":
                while process.poll() is None and not trainer.samples_at_the_end(out, behind):
                    time.sleep(0.002)
                time.sleep(random.uniform(0, 0.02))
            else:
                time.sleep(random.uniform(0, startup_sec + 3))
        at_the_end = trainer.samples_at_the_end(out, behind)
        done = process.poll() is not None
        process.kill()
        process.communicate()
        if done and process.returncode == 0:
            tally.runs += 1
            if tally.kills == arguments.kills:
                return tally
            trainer.discard(out)
            new = True
            continue
        if done:
            tally.lost_runs += 1
            tally.steps_lost_with_them += trainer.logged_step(out)
            trainer.discard(out)
            new = True
            continue
        tally.kills += 1
        new = False
        inside_a_write = bool(trainer.unfinished(out) - unfinished_before)
        tally.inside_a_write += inside_a_write
        tally.inside_the_first_save += inside_a_write and not existed
        tally.in_the_last_sample += at_the_end
        tally.resumed += bool(existed)
        inspect(trainer, out, existed, tally)


def aim_into_a_write(
    process: subprocess.Popen, trainer: OurTrainer, out: Path, number: int, delay: float
) -> None:
    """Wait for the `number`-th write of a checkpoint to begin, and then a little longer."""
    was_writing = True  # what an earlier kill left does not count
    while number and process.poll() is None:
        now = bool(trainer.unfinished(out))
        number -= now and not was_writing
        was_writing = now
        time.sleep(0.0002)
    time.sleep(delay)


def inspect(trainer: OurTrainer, out: Path, existed: set[Path], tally: Tally) -> None:
    """After a kill: whether each checkpoint that was or is there loads, and how many steps it
    costs."""
    steps = []
    for path in trainer.checkpoints(out):
        if path.exists() or path in existed:
            try:
                steps.append(trainer.load(path))
            except Exception as error:
                tally.checkpoints_lost += 1
                tally.complaints[f"{path.name}: {type(error).__name__}"] += 1
    if steps:
        tally.steps_repeated_at_most = max(
            tally.steps_repeated_at_most, trainer.logged_step(out) - max(steps)
        )
    else:
        tally.before_the_first_checkpoint += 1


def differences(whole: Path, killed: Path) -> dict[str, object]:
    """What tells the killed run of train.py from the other: nothing, if all is well."""
    timing = {"tokens_per_sec", "elapsed_sec"}
    tables = []
    for run in (whole, killed):
        lines = (run / "logs" / "train_metrics.csv").read_text(encoding="utf-8").splitlines()
        columns = [i for i, name in enumerate(lines[0].split(",")) if name not in timing]
        tables.append([tuple(line.split(",")[i] for i in columns) for line in lines[1:]])
    expected, found = tables
    steps, unequal = (
        [row[0] for row in found],
        sum(a != b for a, b in zip(expected, found, strict=False)),
    )
    answer = {
        "rows lost": len({row[0] for row in expected} - set(steps)),
        "rows doubled": len(steps) - len(set(steps)),
        "rows that differ": unequal + abs(len(expected) - len(found)),
        "samples differ": (whole / "samples/samples.txt").read_bytes()
        != (killed / "samples/samples.txt").read_bytes(),
    }
    for name in ("last.pt", "best.pt"):
        first, second = (load_checkpoint(run / "checkpoints" / name) for run in (whole, killed))
        answer[f"weights of {name} that differ"] = differing(first["model"], second["model"])
        answer[f"step of {name} differs"] = first["step"] != second["step"]
        if name == "last.pt":
            states = [
                {
                    f"{name}.{i}.{key}": value
                    for name, parameters in c["optimizer"].items()
                    for i, state in parameters.items()
                    for key, value in state.items()
                }
                for c in (first, second)
            ]
            answer["optimizer tensors that differ"] = differing(*states)
            answer["gradient scaler differs"] = first["scaler"] != second["scaler"]
    answer["leftovers"] = [path.name for path in killed.rglob("*.tmp")]
    return answer


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> int:
    """How many tensors are not the same bit for bit."""
    return len(first.keys() ^ second.keys()) + sum(
        not torch.equal(first[key], second[key]) for key in first
    )


def undisturbed(trainer: OurTrainer, out: Path) -> tuple[float, float]:
    """Run to the end; seconds until the first step, and how long the average write of a checkpoint
    takes."""
    started = now = time.perf_counter()
    process = trainer.start(out)
    startup_sec, writing_sec, writes, was_writing = None, 0.0, 0, False
    while process.poll() is None:
        before, now = now, time.perf_counter()
        if startup_sec is None and trainer.logged_step(out):
            startup_sec = now - started
        writing = bool(trainer.unfinished(out))
        writing_sec += (now - before) * writing
        writes += writing and not was_writing
        was_writing = writing
        time.sleep(0.0005)
    error = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(f"the undisturbed run failed: {error}")
    return startup_sec, writing_sec / max(1, writes)


def main() -> None:
    """Torture and report."""
    arguments = tyro.cli(Arguments, description=__doc__, use_underscores=True)
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    trainer = NanoGPT(arguments) if arguments.nanogpt else OurTrainer(arguments)
    startup_sec, write_sec = undisturbed(trainer, arguments.work / "whole")
    if arguments.nanogpt:
        trainer.full_size = (arguments.work / "whole" / "ckpt.pt").stat().st_size
        write_sec = 0.02  # as train.py's: the files have one size
    print(
        f"PyTorch {torch.__version__}; first step after {startup_sec:.1f} s, "
        f"a write takes {write_sec:.3f} s"
    )
    started = time.perf_counter()
    tally = torture(arguments, trainer, startup_sec, write_sec)
    for name, value in vars(tally).items():
        print(f"{name.replace('_', ' ')}: {value}")
    print(f"seconds: {time.perf_counter() - started:.0f}")
    if arguments.nanogpt:
        models = [
            torch.load(arguments.work / run / "ckpt.pt")["model"] for run in ("whole", "killed")
        ]
        print(f"weights that differ: {differing(*models)} of {len(models[0])}")
        return
    for name, value in differences(arguments.work / "whole", arguments.work / "killed").items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
