"""What a run is computed on: device, precision, compilation, threads, memory."""

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from textwrap import shorten

import numpy as np
import tiktoken
import torch

from parts.flags import DEVICE, Amp, Config, From, Origin, decided
from parts.startup import WAITING, usable_cores

# Bytes of a card beside what PyTorch's allocator hands out, for kernels.
BESIDES = 2**29


def device_problem(device: str, processes: int = 1) -> str | None:
    """Why this many processes cannot use this device, with the remedy; None when they can."""
    if not DEVICE.fullmatch(device):
        return f"--device {device} is none of auto, cpu, cuda, cuda:N, mps"
    kind, _, index = device.partition(":")
    cards = torch.cuda.device_count()
    here = processes_here(processes)
    if kind == "cuda" and not torch.cuda.is_available():
        why = cpu_only_hint() or "no usable NVIDIA driver"
        problem = f"this PyTorch sees no CUDA device ({why})"
    elif kind == "cuda" and index and int(index) >= cards:
        problem = f"there are {cards} CUDA devices, numbered from 0"
    elif kind == "mps" and not torch.backends.mps.is_available():
        problem = "Apple's Metal is not available here; use --device cpu"
    elif kind == "mps" and processes > 1:
        problem = f"one process alone can use Apple's GPU, not {processes}; use --device cpu"
    elif index and processes > 1:
        problem = f"each of the {processes} processes takes a card of its own; use --device cuda"
    elif kind == "cuda" and here > cards:
        remedy = "start one process for each, or use --device cpu"
        problem = f"{here} processes on a machine with {cards} CUDA devices; {remedy}"
    else:
        return None
    return f"--device {device}: {problem}"


def processes_here(processes: int) -> int:
    """How many of the run's processes are on this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes)) if processes > 1 else 1


def make_current(device: str) -> None:
    """Make a card the one whose streams are used and that is asked, instead of the first."""
    if ":" in device:
        torch.cuda.set_device(device)


def cpu_only_hint() -> str | None:
    """The install command for a machine whose NVIDIA card a CPU-only PyTorch cannot use."""
    if torch.version.cuda or torch.version.hip or not shutil.which("nvidia-smi"):
        return None
    index = "https://download.pytorch.org/whl/cu130"
    return (
        f"an NVIDIA card is here, but PyTorch {torch.__version__} is a CPU-only build: "
        f"pip install --force-reinstall torch==2.13.0 --index-url {index}"
    )


def choose_device() -> tuple[str, str]:
    """The fastest device present, and why."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return "mps", "Apple GPU"
    return "cpu", "no CUDA or Apple GPU was found"


def choose_amp(device: str) -> tuple[Amp, str]:
    """The precision of matrix products that the device is fast in, and why."""
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU computes in bf16"
        return "fp16", "this GPU has no bf16"
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # PyTorch has no public ones
    if device == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks):
        return "bf16", "this CPU multiplies in bf16"
    return "off", "no fast half precision is known for this device"


def choose_compile(config: Config) -> tuple[str, str]:
    """Whether torch.compile works here and is likely to repay its own time, and why."""
    kind = torch.device(config.device).type
    if kind == "mps":
        return "off", "not proven on Apple GPUs"
    if kind == "cuda" and importlib.util.find_spec("triton") is None:
        return "off", "Triton is not installed (Windows: pip install triton-windows)"
    if kind == "cuda" and config.deterministic:
        return "off", "--deterministic: Triton may tune its kernels otherwise in the next run"
    if kind == "cpu":
        # benchmarks/records/throughput-8x128-more.json: 1.034 times as fast; quartiles 1.01 to
        # 1.066; compiling took 95 to 210 s on the same two cores.
        return "off", "on a CPU it takes minutes and gains about 3 %; --compile on asks for it"
    if config.n_embd < 512:
        return "off", "a model this narrow gains too little"
    # On a GPU it gains more, but half a minute is long there: an estimate, for a card between an
    # RTX 4060 Ti and an H200.
    repays = 3e15  # tokens times parameters
    if config.steps * config.tokens_per_step * config.n_params < repays:
        return "off", "the run is too short to repay the compilation"
    return "on", "a compiler is here and the run is long enough to repay it"


def choose_micro_batch(config: Config) -> tuple[int, str]:
    """How many slices to work on at once, and why."""
    if config.device != "cpu":
        return largest_divisor(config.share, config.batch_size), "--batch_size"
    fits = largest_divisor(config.share, max(1, 2048 // config.seq_len))
    return fits, "on a CPU at most 2,048 tokens at once"


def choose_threads(config: Config) -> tuple[int, str]:
    """How many CPU threads to use, and why. torchrun itself allows each process only one."""
    cores, limit = usable_cores()
    threads, reason = torch.get_num_threads(), "PyTorch's choice"
    if config.processes > 1:
        here = processes_here(config.processes)
        threads = max(1, cores // here)
        reason = f"{limit or f'{cores} cores'} shared by {here} processes"
    elif limit and threads == cores:
        reason = limit
    return threads, f"{reason}; {WAITING}" if WAITING else reason


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is no larger than `at_most`."""
    return next(n for n in range(min(number, at_most), 0, -1) if number % n == 0)


def choose_runtime(config: Config, previous: Config | None) -> Config:
    """The config with all decided, as in the run so far or as suits this machine. Raises ValueError
    for an unusable --device."""

    def decide(name: str, choose: Callable[[], tuple[str | int, str]], kept: bool) -> None:
        """Decide a flag, as in the run so far if that may be `kept`."""
        nonlocal config
        if getattr(config, name) not in ("auto", None):
            return
        before = getattr(previous, name, None)
        if previous is not None and before is not None and kept:
            source = previous.origins.get(name, Origin(From.RUN)).source
            source = From.RUN if source == From.TYPED else source
            config = decided(config, name, before, Origin(source, "as in the run so far"))
            return
        value, reason = choose()
        if previous is not None:
            reason += f"; the run so far used {before}, so results agree to rounding only"
        config = decided(config, name, value, Origin(From.MACHINE, reason))

    def same(*names: str) -> bool:
        return all(getattr(config, name) == getattr(previous, name, None) for name in names)

    before = "" if previous is None else previous.device
    decide("device", choose_device, device_problem(before, config.processes) is None)
    if problem := device_problem(config.device, config.processes):
        raise ValueError(problem)
    make_current(config.device)
    decide("amp", lambda: choose_amp(config.device), same("device"))
    decide("compile", lambda: choose_compile(config), same("device"))
    decide("threads", lambda: choose_threads(config), same("device", "processes"))
    shape = ("device", "processes", "batch_size", "grad_accum", "seq_len")
    decide("micro_batch", lambda: choose_micro_batch(config), same(*shape))
    return config


def autocast(config: Config) -> torch.autocast:
    """The context in which matrix products run in the chosen precision."""
    dtype = torch.float16 if config.amp == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(config.device).type, dtype, enabled=config.amp != "off")


def for_sampling(config: Config, one_at_a_time: bool) -> Config:
    """The config with the precision for text. For a single token a CPU reads weights faster in fp16
    than in bf16; a whole context, as beyond the trained one, takes it ten times as long."""
    suits = one_at_a_time and (config.device, config.amp) == ("cpu", "bf16")
    return replace(config, amp="fp16") if suits else config


def configure_torch(config: Config) -> None:
    """Threads, TF32, and the same bits in every run where that is asked for or costs nothing."""
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    if config.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32 for products that stay in fp32
        if driver_spills():
            free, total = torch.cuda.mem_get_info()
            share = (free + torch.cuda.memory_reserved() - BESIDES) / total
            torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)))
    same_bits = config.device == "cpu" or config.deterministic
    if same_bits:
        # PyTorch's reproducibility notes ask for it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Without, compiled code adds up gradients in varying order.
    torch.use_deterministic_algorithms(same_bits)


def driver_spills() -> bool:
    """Whether the NVIDIA driver, when a card's memory is gone, hands out the computer's instead of
    refusing, at a crawl: under Windows and WSL. A cap on what PyTorch may take makes it refuse."""
    return os.name == "nt" or "microsoft" in platform.release().lower()


def release_memory(device: torch.device) -> None:
    """Give back what the allocator of a GPU keeps for later, in blocks that no longer suit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def peak_memory(device: str) -> int | None:
    """The most bytes that this process has taken, of its card's memory if it uses one."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def keep_freed_memory() -> None:
    """Make glibc keep freed memory: handing out fresh pages takes longer than computing on them."""
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own, to be unmapped when freed
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. PyTorch has an exception for it, which not all of its parts raise."""
    words = "out of memory|allocate memory|ALLOC_FAILED"  # MPS, the CPU's allocator, cuBLAS
    words += "|bad_alloc|could not (create|execute) a primitive|can't start new thread"
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or re.search(words, str(error)) is not None


def complaints(error: Exception) -> list[str]:
    """The lines for bad input or too little memory. Raises other errors."""
    if is_out_of_memory(error):
        return [f"out of memory: close other programs, or use a smaller model ({in_short(error)})"]
    if isinstance(error, ValueError | OSError):
        return str(error).splitlines()
    raise error


def excerpt(error: BaseException) -> str:
    """One line of a long message: its first two lines, and a compiler's first complaint."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    complaint = [line for line in lines[2:] if "error:" in line][:1]
    return shorten(" ".join(lines[:2] + complaint), width=300, placeholder=" ...")


def in_short(error: Exception) -> str:
    """The first sentence of what PyTorch says, without the place in its sources."""
    words = re.sub(r"^\[[^]]*\] (err == 0\. )?", "", str(error) or type(error).__name__)
    return re.split(r"\n|\. ", words)[0]


def environment(device: str) -> dict[str, dict]:
    """Versions and hardware, for records of what was computed here."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
        "tiktoken": tiktoken.__version__,
    }
    system = platform.platform(terse=True)
    hardware: dict = {"cpu": processor_name(), "cores": os.cpu_count(), "os": system}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        hardware["gpu"] = properties.name
        hardware["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
    return {"versions": versions, "hardware": hardware}


def processor_name() -> str:
    """The CPU's model name; its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
