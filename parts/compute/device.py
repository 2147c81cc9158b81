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
from parts.start import WAITING, usable_cores


def device_problem(device: str, processes: int = 1) -> str | None:
    """Why this many processes cannot use this device, with the remedy; None when they can."""
    if not DEVICE.fullmatch(device):
        return f"--device {device} is none of auto, cpu, cuda, cuda:N, mps"
    kind, _, index = device.partition(":")
    here = processes_here(processes)
    if kind == "cuda" and not torch.cuda.is_available():
        return f"--device {device}: this PyTorch sees no CUDA device ({cpu_only_hint() or 'no usable NVIDIA driver'})"
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        return f"--device {device}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0"
    if kind == "mps" and not torch.backends.mps.is_available():
        return "--device mps: Apple's Metal is not available here; use --device cpu"
    if kind == "mps" and processes > 1:
        return f"--device mps: one process alone can use Apple's GPU, not {processes}; use --device cpu"
    if index and processes > 1:
        return f"--device {device}: each of the {processes} processes takes a card of its own; use --device cuda"
    if kind == "cuda" and here > torch.cuda.device_count():
        return (
            f"--device {device}: {here} processes on a machine with {torch.cuda.device_count()} CUDA devices; start "
            "one process for each, or use --device cpu"
        )
    return None


def processes_here(processes: int) -> int:
    """How many of the run's processes are on this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes)) if processes > 1 else 1


def make_current(device: str) -> None:
    """Have streams, and questions about the card, be of the one that is used, and not of the first."""
    if ":" in device:
        torch.cuda.set_device(device)


def cpu_only_hint() -> str | None:
    """The install command for a machine whose NVIDIA card a CPU-only PyTorch cannot use."""
    if torch.version.cuda or torch.version.hip or not shutil.which("nvidia-smi"):
        return None
    return (
        f"an NVIDIA card is here, but PyTorch {torch.__version__} is a CPU-only build: "
        "pip install --force-reinstall torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
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
        # benchmarks/records/throughput-8x128-more.json: 1.034 times as fast, quartiles 1.01 to 1.066;
        # compiling took 95 to 210 s on the same two cores.
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
    return largest_divisor(
        config.share, max(1, 2048 // config.seq_len)
    ), "on a CPU at most 2,048 tokens at once"


def choose_threads(config: Config) -> tuple[int, str]:
    """How many CPU threads to use, and why; torchrun's environment allows each process one, whatever the cores."""
    cores, limit = usable_cores()
    threads, reason = torch.get_num_threads(), "PyTorch's choice"
    if config.processes > 1:
        here, shared = processes_here(config.processes), limit or f"{cores} cores"
        threads, reason = max(1, cores // here), f"{shared} shared by {here} processes"
    elif limit and threads == cores:
        reason = limit
    return threads, "; ".join(filter(None, [reason, WAITING]))


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is no larger than `at_most`."""
    return next(n for n in range(min(number, at_most), 0, -1) if number % n == 0)


def choose_runtime(config: Config, previous: Config | None) -> Config:
    """Replace what is open by what the run so far used, else by what suits this machine; the origins say why.

    Raises ValueError for an unusable --device.
    """

    def decide(
        name: str, choose: Callable[[], tuple[str | int, str]], usable: Callable[[str], bool]
    ) -> None:
        nonlocal config
        if getattr(config, name) not in ("auto", None):
            return
        before = (
            previous.origins.get(name, Origin(From.RUN))
            if previous is not None
            else Origin(From.MACHINE)
        )
        source = From.RUN if before.source == From.TYPED else before.source
        value, origin = getattr(previous, name, None), Origin(source, "as in the run so far")
        if value is None or not usable(value):
            value, reason = choose()
            if previous is not None:
                reason += f"; the run so far used {getattr(previous, name)}, so results agree to rounding only"
            origin = Origin(From.MACHINE, reason)
        config = decided(config, name, value, origin)

    decide("device", choose_device, lambda device: device_problem(device, config.processes) is None)
    if problem := device_problem(config.device, config.processes):
        raise ValueError(problem)
    make_current(config.device)

    def same(*names: str) -> bool:
        return all(getattr(config, name) == getattr(previous, name) for name in names)

    decide("amp", lambda: choose_amp(config.device), lambda _: same("device"))
    decide("compile", lambda: choose_compile(config), lambda _: same("device"))
    decide("threads", lambda: choose_threads(config), lambda _: same("device", "processes"))
    shape = ("device", "processes", "batch_size", "grad_accum", "seq_len")
    decide("micro_batch", lambda: choose_micro_batch(config), lambda _: same(*shape))
    return config


def autocast(config: Config) -> torch.autocast:
    """The context in which matrix products run in the chosen precision."""
    dtype = torch.float16 if config.amp == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(config.device).type, dtype, enabled=config.amp != "off")


def for_sampling(config: Config, one_at_a_time: bool) -> Config:
    """With the precision for text: a CPU reads the weights for a single token faster in fp16 than in bf16, and they are
    no less exact. A whole context, as beyond the trained one, takes it ten times as long."""
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
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # asked for by PyTorch's reproducibility notes
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # added at run time
    torch.use_deterministic_algorithms(
        same_bits
    )  # or compiled code adds up gradients in varying order


BESIDES = (
    2**29
)  # bytes of a card for what PyTorch's allocator does not hand out: kernels, loaded as they are needed


def driver_spills() -> bool:
    """Whether the NVIDIA driver hands out the computer's memory, at a crawl, when the card's is gone, instead of
    refusing: under Windows, and in WSL on top of it. A cap on what PyTorch may take then has it refuse in time."""
    return os.name == "nt" or "microsoft" in platform.release().lower()


def release_memory(device: torch.device) -> None:
    """Give back what the allocator of a GPU keeps for later, in blocks that no longer suit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def peak_memory(device: str) -> int | None:
    """Bytes that this process has taken at most, of the card's memory if it uses one; None where that is not told."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def keep_freed_memory() -> None:
    """Have glibc keep freed memory: each step allocates the same blocks again, and the system takes longer to hand
    out fresh pages than the CPU to compute on them. Elsewhere nothing happens."""
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own, to be unmapped when freed
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch has an exception for it, which not all of its parts raise."""
    words = "out of memory|allocate memory|ALLOC_FAILED"  # MPS, the CPU's allocator, cuBLAS
    words += "|bad_alloc|could not (create|execute) a primitive|can't start new thread"
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or re.search(words, str(error)) is not None


def complaints(error: Exception) -> list[str]:
    """What a script says of bad input or too little memory, line by line. Raises other errors."""
    if is_out_of_memory(error):
        return [f"out of memory: close other programs, or use a smaller model ({in_short(error)})"]
    if isinstance(error, ValueError | OSError):
        return str(error).splitlines()
    raise error


def first_words(error: BaseException) -> str:
    """One line of a long message: its first two lines, and a compiler's first complaint."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    complaints = [line for line in lines[2:] if "error:" in line]
    return shorten(" ".join([*lines[:2], *complaints[:1]]), width=300, placeholder=" ...")


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
