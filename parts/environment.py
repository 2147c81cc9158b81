"""What a run was made with, for its records: commit, versions, hardware."""

import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import tiktoken
import torch

from parts.config import Config


def git_commit() -> str | None:
    """The commit of this script's checkout, with -dirty when tracked files differ; None outside git."""
    here = Path(__file__).resolve().parent
    try:
        describe = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor_name() -> str:
    """The CPU's model name; its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(config: Config) -> dict[str, dict]:
    """Versions and hardware, for config.json."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    versions |= {"numpy": np.__version__, "tiktoken": tiktoken.__version__}
    hardware: dict = {"cpu": processor_name(), "cores": os.cpu_count(), "os": platform.platform(terse=True)}
    if config.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(config.device)
        hardware |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return {"versions": versions, "hardware": hardware}
