"""How fast, in how much memory, beside nanoGPT if it is there."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu.common import ROOT, LeftOut, Options, check, needs_card, run, trainer_of
from benchmarks.throughput import Options as Shape
from benchmarks.throughput import nanogpt, ours
from parts.recipe import decide
from parts.run.directory import read_json


@check("speed", "the default recipe, from launch to target", seconds=300)
def default_recipe(options: Options, here: Path) -> str:
    needs_card(options)
    started = time.perf_counter()
    run(options, here / "run")
    seconds, found = time.perf_counter() - started, read_json(here / "run" / "results.json")
    length = f"{found['final_step']} steps and {found['tokens']:,} tokens"
    said = f"{seconds:.0f} s, {found['stop_reason']} after {length}"
    assert found["stop_reason"] == "target", said
    loss = f"corpus loss {found['corpus_loss']:.4f}"
    return f"{said}, {loss}, {found['elapsed_sec']:.0f} s of it in the loop"


@check("speed", "the demo, from launch to target")
def demo(options: Options, here: Path) -> str:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--preset=demo", f"--out_dir={here / 'run'}"]
    )
    assert done.returncode == 0, f"exit code {done.returncode}"
    found = read_json(here / "run" / "results.json")
    seconds = time.perf_counter() - started
    return f"{seconds:.1f} s, {found['stop_reason']} after {found['final_step']} steps"


def matrix_rate() -> float:
    """Floating-point operations a second of the card in large bf16 products."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return 2 * 8192**3 / seconds_of(lambda: a @ b, 20)


def seconds_of(work: Callable[[], object], times: int) -> float:
    """Of one call, after three that are not timed."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def throughput(options: Options, shape: Shape, step_of: Callable[[], Callable[[], object]]) -> str:
    needs_card(options)
    rate = matrix_rate()
    torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(step_of(), 20)
    tokens_per_sec = shape.batch_size * shape.seq_len / seconds
    share = 6 * decide({}).n_params * tokens_per_sec / rate
    return (
        f"{tokens_per_sec:,.0f} tokens a second, {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, "
        f"{100 * share:.0f} % of the {rate / 1e12:.0f} TFLOP/s of large bf16 products"
    )


@check("speed", "Muon's kernels, and its share of a step of 32 x 128")
def muon_share(options: Options, here: Path) -> str:
    needs_card(options)
    trainer = trainer_of(options, "--amp=bf16", "--compile=off", "--mixed_steps=0")
    whole = seconds_of(trainer.update, 20)
    trainer.accumulate(1, trainer.slices(1), trainer.forward)
    muon = trainer.optimizers["muon"]
    share = seconds_of(muon.step, 20)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        muon.step()
        torch.cuda.synchronize()
    kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    times = f"{1000 * share:.1f} ms of {1000 * whole:.1f} ms"
    return f"{kernels} kernels, {times}: {100 * share / whole:.0f} %"


@check("speed", "a save, beside training and waited for", seconds=240)
def saves(options: Options, here: Path) -> str:
    record = here / "stalls.json"
    program = [
        sys.executable,
        str(ROOT / "benchmarks" / "stalls.py"),
        f"--input-file={options.input_file}",
    ]
    flags = [
        "--batch-size=32",
        "--optimizer=muon",
        "--steps=30",
        "--rounds=3",
        f"--record={record}",
    ]
    done = subprocess.run([*program, *flags], capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-500:]
    return "; ".join(
        f"{row['saves']}: {row['cost_of_a_save_sec']} s, "
        f"{row['share_of_wall_clock_percent']} % of the wall clock "
        f"at one in {row['save_every']} steps"
        for row in read_json(record)["rows"]
    )


@check("speed", "the largest micro-batch of 128 tokens that fits, a power of two")
def largest_micro_batch(options: Options, here: Path) -> str:
    needs_card(options)
    total, answers = torch.cuda.get_device_properties(0).total_memory, []
    for gigabytes in (8, 12, 16, 24):
        if gigabytes * 1e9 > total:
            break
        torch.cuda.empty_cache()
        trainer = trainer_of(
            options, "--batch_size=1024", "--amp=bf16", "--compile=off", "--mixed_steps=0"
        )
        torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total)
        for _ in range(2):
            trainer.update()
        answers.append(f"{gigabytes} GB: {trainer.config.micro_batch}")
        del trainer
    return ", ".join(answers)


SHAPES = {"32 x 128": (32, 128), "16 x 1024": (16, 1024), "16 x 128": (16, 128)}
for shape_name, (batch_size, seq_len) in SHAPES.items():
    for compiled in (False, True):
        how = "compiled" if compiled else "eager"
        for optimizer in ("muon", "adamw"):

            @check("speed", f"{shape_name}, {how}, {optimizer}", seconds=240)
            def our_speed(
                options: Options,
                here: Path,
                size=(batch_size, seq_len),
                compiled=compiled,
                optimizer=optimizer,
            ) -> str:
                shape = Shape(
                    batch_size=size[0], seq_len=size[1], grad_accum=1, input_file=options.input_file
                )
                flags = [
                    f"--compile={'on' if compiled else 'off'}",
                    f"--optimizer={optimizer}",
                    "--amp=bf16",
                ]
                return throughput(options, shape, lambda: ours(shape, *flags))

        @check("speed", f"{shape_name}, {how}, nanoGPT with adamw")
        def their_speed(
            options: Options, here: Path, size=(batch_size, seq_len), compiled=compiled
        ) -> str:
            if options.nanogpt is None:
                raise LeftOut("no --nanogpt")
            shape = Shape(
                batch_size=size[0], seq_len=size[1], grad_accum=1, input_file=options.input_file
            )
            shape = replace(shape, nanogpt=options.nanogpt)
            try:
                return throughput(options, shape, lambda: nanogpt(shape, compiled))
            except torch.OutOfMemoryError as error:
                raise LeftOut(str(error)) from error
