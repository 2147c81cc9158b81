"""What a run was made with, for its records: command and launches, commit, versions, hardware."""

import os
import platform
import shlex
import subprocess
from datetime import datetime
from pathlib import Path

import numpy as np
import tiktoken
import torch

from parts.flags import Config, names
from parts.text.corpus import Corpus


def git_commit() -> str | None:
    """The commit of this script's checkout, with -dirty when tracked files differ; None outside git."""
    here = Path(__file__).resolve().parent
    try:
        describe = [
            "git",
            "-C",
            str(here),
            "describe",
            "--always",
            "--abbrev=40",
            "--dirty",
            "--exclude=*",
        ]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor_name() -> str:
    """The CPU's model name; its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(config: Config) -> dict[str, dict]:
    """Versions and hardware, for config.json."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    versions |= {"numpy": np.__version__, "tiktoken": tiktoken.__version__}
    hardware: dict = {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "os": platform.platform(terse=True),
    }
    if config.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(config.device)
        hardware |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return {"versions": versions, "hardware": hardware}


def launch_words(argv: list[str], config: Config) -> list[str]:
    """The words of a command that starts train.py with these flags, torchrun included."""
    start = ["python", "train.py"]
    if config.processes > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", config.processes))
        machines = (
            ["--standalone"]
            if here == config.processes
            else [f"--nnodes={config.processes // here}"]
        )
        start = ["torchrun", *machines, f"--nproc_per_node={here}", "train.py"]
    return [*start, *argv]


def launch_command(argv: list[str], config: Config) -> str:
    """What was typed, torchrun included."""
    return shlex.join(launch_words(argv, config))


def launch_record(
    argv: list[str], config: Config, corpus: Corpus, checkpoint: dict | None, before: dict
) -> dict:
    """What config.json says of a launch; the launches that it spoke of `before` are kept. Of one that goes on from a
    checkpoint it says what has changed since, each flag with its value until then, and the validation text."""
    command = launch_command(argv, config)
    first_step = 1 if checkpoint is None else checkpoint["step"] + 1
    launches = before.get("launches") if first_step > 1 else None
    launch: dict = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "first_step": first_step,
        "command": command,
    }
    if checkpoint is not None:
        launch["changed"] = changed(checkpoint["config"], config)
        if checkpoint["val_sha256"] != corpus.val_sha256:
            launch["changed"]["val_sha256"] = checkpoint["val_sha256"]
    return {
        "command": command,
        "seed": config.seed,
        "git_commit": git_commit(),
        **environment(config),
        "corpus": {
            "file": names(config.input_file),
            "files": corpus.n_files,
            "sha256": corpus.sha256,
            "tokens": len(corpus.tokens),
            **({"val_sha256": corpus.val_sha256} if corpus.val_sha256 else {}),
        },
        "parameters": config.n_params,
        "launches": [*(launches if isinstance(launches, list) else []), launch],
    }


def changed(saved: dict, config: Config) -> dict:
    """The flags that differ from those of a checkpoint's config, with their values there."""
    unimportant = ("resume", "out_dir", "preset", "processes", "dry_run", "tensorboard")
    return {
        name: saved.get(name, "unknown")
        for name, value in config.as_dict().items()
        if saved.get(name, "unknown") != value and name not in unimportant
    }
