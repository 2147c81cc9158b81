"""Saves, signals, memory and several processes do on a card what they do on a CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import train
from benchmarks.gpu.common import (
    ROOT,
    SLOW,
    SMALL,
    LeftOut,
    Options,
    assert_equal,
    at_most,
    check,
    clones,
    command,
    log_of,
    losses,
    needs_card,
    run,
    started,
    trainer_of,
    wait_for,
    worst,
)
from parts.compute.ranks import Ranks
from parts.run.background import Snapshot
from parts.run.checkpoint import load_checkpoint
from parts.run.directory import RunDir


@contextmanager
def saver_of(trainer: train.Trainer, out: Path) -> Iterator[train.Saver]:
    """A saver with a run directory."""
    directory = RunDir(out)
    with directory.locked():
        directory.make()
        yield train.Saver(directory, trainer, {}, 0)


def occupy(cycles: int) -> None:
    """Keep the card busy for so long."""
    if torch.cuda.is_available():
        torch.cuda._sleep(cycles)


def save_and_compare(trainer: train.Trainer, saver: train.Saver, before: int, after: int) -> int:
    """Save in the background, with so many cycles of other work before the state is what is saved,
    and before it is copied; train on at once; compare the files with clones. Returns how many
    tensors were the same."""
    trainer.update()
    occupy(before)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter *= (
                1.001  # behind that work: a copy that does not wait takes what was there before
            )
    state, weights = clones(trainer.state()), clones({"model": trainer.model.state_dict()})
    with torch.cuda.stream(trainer.copying):  # nothing without a card
        occupy(after)  # a step that does not wait overtakes the copies
    saver.keep_best(trainer.progress.loss)
    saver.save()
    for _ in range(3):
        trainer.update()
    saver.writer.finish()
    assert not saver.run.missing(), saver.run.missing()
    return assert_equal(load_checkpoint(saver.run.last), state) + assert_equal(
        load_checkpoint(saver.run.best), weights
    )


@check(
    "robustness",
    "last.pt and best.pt are of their step, with slow work before it and before the copies",
    seconds=240,
)
def snapshots(options: Options, here: Path) -> str:
    trainer, count = trainer_of(options, "--compile=off"), 0
    with saver_of(trainer, here / "run") as saver:
        for before, after in ((0, 0), (SLOW, 0), (0, SLOW), (SLOW, SLOW)):
            count += save_and_compare(trainer, saver, before, after)
    return f"{count} tensors the same"


@check("robustness", "page-locked memory that is refused costs no save")
def refused_pinning(options: Options, here: Path) -> str:
    allocate = torch.empty_like

    def refuse(values: torch.Tensor, **how) -> torch.Tensor:
        if how.get("pin_memory"):
            raise RuntimeError("CUDA error: out of memory")
        return allocate(values, **how)

    trainer = trainer_of(options, "--compile=off")
    torch.empty_like = refuse
    with saver_of(trainer, here / "run") as saver:
        count = save_and_compare(trainer, saver, SLOW, 0)
    assert options.device == "cpu" or not Snapshot.page_locked, "nothing was refused"
    return f"{count} tensors the same"


@check("robustness", "a micro-batch that does not fit shrinks to the one that does")
def shrinking(options: Options, here: Path) -> str:
    needs_card(options)
    total = torch.cuda.get_device_properties(0).total_memory

    def step(micro_batch: int, cap: float = 0) -> tuple[int, int, float]:
        """Peak memory in bytes, the micro-batch at the end, the loss."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        trainer = trainer_of(
            options, "--batch_size=128", f"--micro_batch={micro_batch}", "--compile=off"
        )
        if cap:
            torch.cuda.set_per_process_memory_fraction(cap / total)
        loss = [trainer.update()[0] for _ in range(3)][-1]
        return torch.cuda.max_memory_reserved(), trainer.config.micro_batch, loss

    whole, _, expected = step(128)
    half, _, _ = step(64)
    assert whole > 1.2 * half, f"{whole / 1e9:.2f} GB and {half / 1e9:.2f} GB are too near"
    _, settled, loss = step(128, cap=(whole + half) / 2)
    assert settled == 64, f"{settled} slices"
    gigabytes = " and ".join(f"{peak / 1e9:.2f}" for peak in (whole, half))
    difference = at_most(abs(loss - expected), 0.05)
    return f"128 to 64 slices between {gigabytes} GB; loss {difference} from the other's"


def interrupted(options: Options, out: Path, name: str, in_a_save: bool) -> int:
    """The step at which a run that was sent this signal stopped and saved."""
    if os.name == "nt":
        raise LeftOut("Windows sends no signals to a program")
    flags = [f"--device={options.device}", "--compile=off", "--log_every=1", "--num_prompts=0"]
    flags += (
        ["--save_every=3"] if in_a_save else [*SMALL, "--steps=1000000", "--save_every=1000000"]
    )
    writing = out / "checkpoints" / "last.pt.tmp"
    with started(command(options, out, *flags)) as process:
        wait_for(writing.exists if in_a_save else lambda: "step 20/" in log_of(out), process)
        process.send_signal(getattr(signal, name))
        code = process.wait(timeout=100)
    assert code == (130 if name == "SIGINT" else 143), f"exit code {code}"
    step = int(re.search(rf"Interrupted by {name} after step (\d+)", log_of(out))[1])
    saved = load_checkpoint(out / "checkpoints" / "last.pt")["step"]
    assert saved == step, f"it stopped after step {step} and saved {saved}"
    return step


for name in ("SIGINT", "SIGTERM"):
    for in_a_save in (False, True):

        @check("robustness", f"{name} in a {'save' if in_a_save else 'step'}: finished and saved")
        def signalled(options: Options, here: Path, name=name, in_a_save=in_a_save) -> str:
            return f"step {interrupted(options, here / 'run', name, in_a_save)}"


@check("robustness", "tensors of the CPU and of the card travel, by gloo and by NCCL")
def backends(options: Options, here: Path) -> str:
    needs_card(options)
    if not dist.is_nccl_available():
        raise LeftOut("this PyTorch has no NCCL")
    meeting = f"file://{here / 'meeting'}"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=meeting, rank=0, world_size=1)
    ranks, x = (
        Ranks(0, 2),
        torch.ones(3, device="cuda"),
    )  # as if there were another, whose part is nothing
    ranks.average([x])
    assert x.tolist() == [0.5] * 3 and ranks.largest(7) == 7
    return "both"


def as_rank(rank: int, options: Options, here: Path, processes: int) -> None:
    """Eight steps as one of several processes on one card; the first writes their losses."""
    if processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{here / 'meeting'}", rank=rank, world_size=processes
        )
    trainer = trainer_of(options, *SMALL, "--amp=off", "--compile=off", "--steps=100")
    config = replace(
        trainer.config, processes=processes, micro_batch=trainer.config.global_batch // processes
    )
    trainer = train.Trainer(config, trainer.corpus, None, Ranks(rank, processes))
    found = [trainer.update()[0] for _ in range(8)]
    if rank == 0:
        (here / f"losses-{processes}.json").write_text(json.dumps(found), encoding="utf-8")
    trainer.ranks.end(0)


@check("robustness", "two processes on one card against one, losses of eight steps")
def two_on_one_card(options: Options, here: Path) -> str:
    if os.name == "nt":
        raise LeftOut("gloo is built without CUDA for Windows")
    as_rank(0, options, here, 1)
    torch.multiprocessing.spawn(as_rank, (options, here, 2), nprocs=2)
    found, expected = (
        json.loads((here / f"losses-{n}.json").read_text(encoding="utf-8")) for n in (2, 1)
    )
    return at_most(worst(found, expected), 1e-3)


# torchrun's script: one process is lost, or fails alone. On a single card two share it by gloo,
# which train.py refuses.
LOSES_ONE = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import torch
from parts.compute import device as machine
if torch.cuda.device_count() < 2:
    machine.device_problem = lambda *_: None
    machine.dist.is_nccl_available = lambda: False
import train
update = train.Trainer.update
def failing(trainer):
    if os.environ["RANK"] == "1" and trainer.progress.step == 5:
        Path(sys.argv[-1]).touch()
        if "killed" in sys.argv[-1]:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("of this process alone")
    return update(trainer)
train.Trainer.update = failing
sys.exit(train.main(sys.argv[1:-1]))
"""


for fate in ("killed", "failing"):

    @check("robustness", f"a {fate} process ends the run, and the first says why")
    def lost(options: Options, here: Path, fate=fate) -> str:
        if os.name == "nt":
            raise LeftOut("torchrun does not start under Windows")
        script, sign = here / "loses_one.py", here / fate
        script.write_text(LOSES_ONE, encoding="utf-8")
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(script),
        ]
        flags = [*SMALL, f"--device={options.device}", "--save_every=2", "--compile=off"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        line = [*torchrun, *command(options, here / "run", *flags)[2:], str(sign)]
        with started(line, **pipes) as process:
            wait_for(sign.exists, process)
            since = time.monotonic()
            said, _ = process.communicate(timeout=100)
        words = re.search(r"another process of this run is gone \(.*", said)
        assert words, said[-1500:]
        return f"{at_most(time.monotonic() - since, 60)} s; {words[0]}"


@check(
    "robustness",
    "a run that moves from CPU to card and back, against one that stays; losses of 30 steps",
)
def moving(options: Options, here: Path) -> str:
    flags = [*SMALL, "--amp=off", "--log_every=1", "--decay_steps=30", "--target_loss=0"]
    run(options, here / "stays", *flags, "--device=cpu", "--steps=30")
    for device, steps in (("cpu", 10), (options.device, 20), ("cpu", 30)):
        run(options, here / "moves", *flags, f"--device={device}", f"--steps={steps}")
    return at_most(worst(losses(here / "moves"), losses(here / "stays")), 2e-2)


@check("robustness", "export, and the same greedy text on CPU and card")
def export_and_sample(options: Options, here: Path) -> str:
    run(
        options, here / "run", *SMALL, f"--device={options.device}", "--steps=50", "--target_loss=0"
    )
    checkpoint = f"--checkpoint={here / 'run' / 'checkpoints' / 'best.pt'}"

    def said(script: str, *flags: str) -> str:
        line = [sys.executable, str(ROOT / script), checkpoint, *flags]
        done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr[-500:]
        return done.stdout

    said("export_hf.py", f"--out={here / 'exported'}")
    greedy = ["--prompt=The", "--temperature=0", "--amp=off", "--max_new_tokens=40"]
    texts = [said("sample.py", *greedy, f"--device={device}") for device in ("cpu", options.device)]
    assert texts[0] == texts[1] and len(texts[0]) > 40, texts
    n_files = len(list((here / "exported").iterdir()))
    return f"{len(texts[0])} characters the same, {n_files} files exported"
