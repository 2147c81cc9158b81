"""What a run was made with, for its records: command and launches, commit, text."""

import hashlib
import os
import shlex
import subprocess
from datetime import datetime
from pathlib import Path

from parts import VERSION
from parts.flags import Config, text_names
from parts.recipe import OF_ONE_START
from parts.text.corpus import Corpus

ROOT = Path(__file__).resolve().parents[2]
NO_NEWS = OF_ONE_START | {"preset", "processes"}  # flags whose change need not be told


def git_commit() -> str | None:
    """The commit of this checkout, with -dirty when tracked files differ; None outside git, and in
    a repository that does not track these files."""
    tracked = ["git", "-C", str(ROOT), "ls-files", "--error-unmatch", "train.py"]
    form = ["--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        subprocess.run(tracked, capture_output=True, check=True)
        command = ["git", "-C", str(ROOT), "describe", *form]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def sources_sha256(root: Path = ROOT) -> str:
    """The hash of the scripts and parts, whatever their line ends: what an archive has of them."""
    digest = hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *root.glob("parts/**/*.py")]):
        text = path.read_text(encoding="utf-8")  # with \n for each line end
        digest.update(f"{path.relative_to(root).as_posix()}\n{text}".encode())
    return digest.hexdigest()


def source() -> dict[str, str | None]:
    """The version, and the commit or, outside git, the hash of the sources."""
    commit = git_commit()
    found = {"version": VERSION, "git_commit": commit}
    return found if commit else found | {"sources_sha256": sources_sha256()}


def launch_words(argv: list[str], config: Config) -> list[str]:
    """The words of a command that starts train.py with these flags, torchrun included."""
    if config.processes == 1:
        return ["python", "train.py", *argv]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", config.processes))
    machines = f"--nnodes={config.processes // here}"
    if here == config.processes:
        machines = "--standalone"
    return ["torchrun", machines, f"--nproc_per_node={here}", "train.py", *argv]


def launch_record(
    argv: list[str],
    config: Config,
    corpus: Corpus,
    checkpoint: dict | None,
    before: dict,
    machine: dict[str, dict],
) -> dict:
    """What config.json says of a launch on this `machine`; earlier ones, of `before`, are kept.

    Of a launch that goes on from a checkpoint it says what has changed since: each flag with its
    value until then, and the validation text.
    """
    command = shlex.join(launch_words(argv, config))
    launch: dict = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "first_step": 1 if checkpoint is None else checkpoint["step"] + 1,
        "command": command,
    }
    launches = None
    if checkpoint is not None:
        launches = before.get("launches")
        launch["changed"] = changed(checkpoint["config"], config)
        if checkpoint["val_sha256"] != corpus.val_sha256:
            launch["changed"]["val_sha256"] = checkpoint["val_sha256"]
    text = {
        "file": text_names(config.input_file),
        "files": corpus.n_files,
        "sha256": corpus.sha256,
        "tokens": len(corpus.tokens),
    }
    if corpus.val_sha256:
        text["val_sha256"] = corpus.val_sha256
    return {
        "command": command,
        "seed": config.seed,
        **source(),
        **machine,
        "corpus": text,
        "parameters": config.n_params,
        "launches": [*(launches if isinstance(launches, list) else []), launch],
    }


def changed(saved: dict, config: Config) -> dict:
    """The flags that differ from those of a checkpoint's config, with their values there."""
    now = {name: value for name, value in config.as_dict().items() if name not in NO_NEWS}
    before = {name: saved.get(name, "unknown") for name in now}
    return {name: before[name] for name in now if before[name] != now[name]}
