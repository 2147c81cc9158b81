"""Training throughput and peak memory of GPT-2 124M: train.py, Hugging Face, nanoGPT, and the
matrix products alone.

    python benchmarks/throughput.py --record throughput.json --nanogpt ../nanoGPT
    python benchmarks/throughput.py --seq_len 1024 --grad_accum 1 --nanogpt ../nanoGPT

Each program runs in a process of its own, with its own settings, and does one optimizer step per
round, one program after the other, so that drift of the machine reaches all of them alike; ratios
are those of one round. Warm-up, compilation included, is not timed. `products` is the ceiling:
nothing but the matrix products of the linear layers and the head, there and back, in bf16. All
train in bf16 autocast and with clipping, and with AdamW where no other optimizer is named; peak
memory is that of the process, compilation included. All programs are held in memory at once, about
33 GB for all of them on a CPU; what does not fit is left out, and named.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from benchmarks.record import write_record
from parts.commandline import parse_config
from parts.compute.device import choose_device, choose_runtime, configure_torch, peak_memory
from parts.flags import PRESETS, VOCAB_SIZE, Config
from parts.recipe import decide
from parts.text.corpus import load_corpus
from parts.text.vocabulary import load_tokenizer

ROOM = 1.2  # a program is started where this many times the largest so far would fit
# What train.py does for itself, as the environment of another program (see its
# `keep_freed_memory`).
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000"}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    record: Path | None = None
    """JSON file to write"""
    nanogpt: Path | None = None
    """checkout of karpathy/nanoGPT"""
    preset: str = "gpt2"
    """train.py's preset; the peers are always GPT-2 124M"""
    batch_size: int = 8
    seq_len: int = 128
    grad_accum: int = 2
    rounds: int = 9
    """timed steps of each program"""
    warm_up: int = 2
    """steps before them"""
    only: list[str] | None = None
    """programs to run; None: all"""
    device: str = "auto"
    """auto, cpu or cuda"""
    input_file: Path = Path("data/input.txt")
    """text for train.py and, as random slices, for the others"""


Step = Callable[[], object]


def ours(options: Options, *flags: str) -> Step:
    """train.py as the command line would run it, one `Trainer.update` a step."""
    shape = [
        f"--{name}={getattr(options, name)}"
        for name in ("batch_size", "seq_len", "grad_accum", "input_file")
    ]
    config = parse_config(
        [f"--preset={options.preset}", *shape, f"--device={options.device}", *flags]
    )
    config = choose_runtime(config, None)
    configure_torch(config)
    trainer = train.Trainer(config, load_corpus(config, load_tokenizer()), None)
    if reason := trainer.compile():
        raise RuntimeError(reason)  # what is called compiled is compiled
    return trainer.update


def peer(
    options: Options, model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Callable
) -> Step:
    """The usual loop around a model: bf16 autocast, accumulation, clipping to 1, one optimizer
    step."""
    corpus = load_corpus(decide(dict(input_file=(options.input_file,))), load_tokenizer())
    count, T, device = (
        options.batch_size * options.grad_accum,
        options.seq_len,
        next(model.parameters()).device,
    )
    step = 0

    def update() -> float:
        nonlocal step
        step += 1
        starts = train.slice_starts(0, step, count, len(corpus.tokens) - T)
        total = 0.0
        for slices in (
            train.take_slices(corpus.tokens, starts, T).to(device).split(options.batch_size)
        ):
            with torch.autocast(device.type, torch.bfloat16):
                value = (
                    loss(slices[:, :-1].contiguous(), slices[:, 1:].contiguous())
                    / options.grad_accum
                )
            value.backward()
            total += value.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return update


def nanogpt(options: Options, compiled: bool) -> Step:
    """Its own model and optimizer."""
    sys.path.insert(0, str(options.nanogpt))
    from model import GPT, GPTConfig

    device = choose_device()[0] if options.device == "auto" else options.device
    model = GPT(GPTConfig(vocab_size=VOCAB_SIZE, bias=True, dropout=0.0)).to(device)
    optimizer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), device)
    forward = torch.compile(model) if compiled else model
    return peer(options, model, optimizer, lambda x, y: forward(x, y)[1])


def hugging_face(options: Options, compiled: bool) -> Step:
    """GPT2LMHeadModel with SDPA and PyTorch's fused AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    device = choose_device()[0] if options.device == "auto" else options.device
    model = (
        GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        .to(device)
        .train()
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    forward = torch.compile(model) if compiled else model

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return forward(x, labels=x, use_cache=False).loss  # it shifts the labels itself

    return peer(options, model, optimizer, loss)


def products(options: Options) -> Step:
    """The matrix products of one step, three for each layer: forward, gradient of input, gradient
    of weight."""
    config = Config(**PRESETS[options.preset])
    device = choose_device()[0] if options.device == "auto" else options.device
    C, N = config.n_embd, options.batch_size * options.seq_len
    shapes = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)] * config.n_layer + [(C, VOCAB_SIZE)]
    made = {
        (i, o): tuple(
            torch.randn(*size, device=device).bfloat16() for size in ((N, i), (o, i), (N, o))
        )
        for i, o in shapes
    }

    def update() -> None:
        for _ in range(options.grad_accum):
            for shape in shapes:
                x, weight, d_y = made[shape]
                _ = x @ weight.T, d_y @ weight, d_y.T @ x

    return update


PROGRAMS: dict[str, tuple[Callable[[Options], Step], dict[str, str]]] = {
    "products": (products, KEPT_MEMORY),
    "train.py": (lambda o: ours(o, "--optimizer=adamw"), {}),
    "train.py, eager": (lambda o: ours(o, "--optimizer=adamw", "--compile=off"), {}),
    "train.py, muon": (lambda o: ours(o, "--optimizer=muon"), {}),
    "nanoGPT, compiled": (lambda o: nanogpt(o, True), {}),
    "nanoGPT, compiled, memory kept": (lambda o: nanogpt(o, True), KEPT_MEMORY),
    "nanoGPT": (lambda o: nanogpt(o, False), {}),
    "Hugging Face, compiled": (lambda o: hugging_face(o, True), {}),
    "Hugging Face": (lambda o: hugging_face(o, False), {}),
}


def serve(name: str, options: Options) -> None:
    """In a process of its own: one step for every line read, its seconds and the peak memory in MB
    printed."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a program prints is no answer
    step = PROGRAMS[name][0](options)
    cuda = torch.cuda.is_available() and options.device != "cpu"
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        print(
            seconds,
            torch.cuda.max_memory_allocated() / 1e6 if cuda else peak_rss_mb(),
            file=answers,
            flush=True,
        )


def peak_rss_mb() -> float:
    """Highest resident memory of this process so far; NaN where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return (peak_memory("cpu") or math.nan) / 1e6
    return int(status.partition("VmHWM:")[2].split()[0]) / 1000


def measure(options: Options, names: list[str]) -> tuple[dict[str, dict], dict[str, str]]:
    """Seconds of each step and peak memory of each program that fits into memory; why the others
    were left out."""
    found, left_out = {}, {}
    with ExitStack() as stack:
        servers = {}
        for name in names:
            largest = max((one["peak_mb"] for one in found.values()), default=0)
            if available_mb() < ROOM * largest:
                left_out[name] = (
                    f"{available_mb() / 1000:.1f} GB of memory are left, "
                    "one like the others may need more"
                )
                continue
            command = [
                sys.executable,
                __file__,
                "--serve",
                name,
                json.dumps(asdict(options), default=str),
            ]
            server = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                env=os.environ | PROGRAMS[name][1],
            )
            stack.callback(server.kill)
            try:
                peak = max(
                    ask(server)[1] for _ in tqdm(range(options.warm_up), desc=f"warm-up {name}")
                )
            except ChildProcessError as error:
                left_out[name] = str(error)
                continue
            found[name], servers[name] = {"seconds": [], "peak_mb": peak}, server
        for _ in tqdm(range(options.rounds), desc="rounds"):
            for name in list(servers):
                try:
                    seconds, found[name]["peak_mb"] = ask(servers[name])
                    found[name]["seconds"].append(seconds)
                except ChildProcessError as error:
                    left_out[name] = str(error)
                    del servers[name], found[name]
    return found, left_out


def available_mb() -> float:
    """Memory that a new process can have without another's being taken; beyond all needs where the
    system is silent."""
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return math.inf
    return int(meminfo.partition("MemAvailable:")[2].split()[0]) / 1000


def ask(server: subprocess.Popen) -> tuple[float, float]:
    """One step: its seconds, and the peak memory so far in MB. Raises ChildProcessError when the
    program has ended."""
    try:
        server.stdin.write("step\n")
        server.stdin.flush()
    except OSError:
        pass  # it answers no more; Windows has another word for a broken pipe
    answer = server.stdout.readline()
    if not answer:
        code = server.wait()
        raise ChildProcessError(
            "killed, probably for want of memory" if code == -9 else f"exit code {code}, see above"
        )
    seconds, peak = map(float, answer.split())
    return seconds, peak


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        values = json.loads(sys.argv[3])
        values |= {name: Path(values[name]) for name in ("nanogpt", "input_file") if values[name]}
        return serve(sys.argv[2], Options(**values))
    options = tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    names = [n for n in PROGRAMS if (not n.startswith("nanoGPT") or options.nanogpt)]
    names = [n for n in names if options.only is None or n in options.only]
    found, left_out = measure(options, names)
    tokens = options.batch_size * options.seq_len * options.grad_accum
    rows = []
    for name, one in found.items():
        row = {"program": name, "peak_gb": round(one["peak_mb"] / 1000, 2), "n": options.rounds}
        row["tokens_per_sec"] = round(tokens / statistics.median(one["seconds"]), 1)
        row["quartiles"] = [
            round(tokens / q, 1) for q in statistics.quantiles(one["seconds"], n=4)[::-2]
        ]
        if "train.py" in found:
            ratios = [
                b / a for a, b in zip(found["train.py"]["seconds"], one["seconds"], strict=True)
            ]
            row["train.py is faster by"] = round(statistics.median(ratios), 3)
            row["quartiles of that"] = [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]]
        rows.append(row)
    for name, reason in left_out.items():
        print(f"left out: {name} ({reason})", file=sys.stderr)
    write_record(options.record, __file__, rows, asdict(options) | {"left_out": left_out})


if __name__ == "__main__":
    main()
