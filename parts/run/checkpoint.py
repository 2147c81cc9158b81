"""Checkpoints: written whole, read without trust; which one a run continues from."""

import errno
import os
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from parts.compute.device import is_out_of_memory
from parts.flags import Config, out_of_range
from parts.progress import Progress
from parts.run.directory import RunDir, read_json, replacing
from parts.run.layout import RunPaths

CHECKPOINT_FORMAT = 3
COUNTS = ("corpus_tokens", "step", "trained_context")
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "seq_len", "vocab_size")
FOLDER = 0x10  # among the attributes of a zip archive's member


def write_checkpoint(path: Path, checkpoint: dict, previous: Path | None = None) -> None:
    """Write a checkpoint as a whole. Raises OSError."""
    try:
        with replacing(path, previous) as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:  # of torch.save, which hides the disk's
        cause = error.__context__
        raise (cause if isinstance(cause, OSError | KeyboardInterrupt) else error) from None


def load_checkpoint(path: Path, flag: str = "--resume") -> dict:
    """Read a checkpoint onto the CPU; nothing in it is executed (tensors and plain values only).
    Raises OSError, or ValueError when it is no checkpoint of this program, or damaged."""
    if not path.is_file():
        problem = "a folder" if path.is_dir() else "no such file"
        example = "name a checkpoint such as out/demo/checkpoints/best.pt"
        raise FileNotFoundError(f"{flag} {path}: {problem}; {example}")
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as there are bytes in it
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # the disk's fault, or the permissions'
        if is_out_of_memory(error):
            remedy = "close other programs and try again"
            raise OSError(f"{path} does not fit into memory: {remedy}") from error
        reason = type(error).__name__
        if isinstance(error, zipfile.BadZipFile):
            reason = "torch.save writes other files"
        elif type(error) is ValueError:
            reason = str(error).partition("\n")[0][:100]
        raise ValueError(f"{path} is damaged or no checkpoint ({reason})") from error
    if isinstance(checkpoint, dict):
        found = checkpoint.get("format", CHECKPOINT_FORMAT)
        if found != CHECKPOINT_FORMAT:
            reads = f"this train.py reads {CHECKPOINT_FORMAT}"
            raise ValueError(f"{path} has format {found!r}, {reads}")
        progress = checkpoint.get("progress")
        if isinstance(progress, dict) and "measured_in_vain" in progress:  # its earlier name
            progress["validations_since_best"] = progress.pop("measured_in_vain")
    if not is_sound(checkpoint):
        raise ValueError(f"{path} is no checkpoint of train.py")
    return checkpoint


def check_archive(path: Path) -> None:
    """Check all checksums, as torch.load does not. Raises ValueError or BadZipFile."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("packed, which PyTorch never does")
        if any(member.external_attr & FOLDER for member in members):
            raise ValueError("marked as a folder, of which PyTorch reads nothing")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")


def checkpoint_in(path: Path, flag: str) -> Path:
    """The checkpoint that a run directory means, or its folder `checkpoints`; other paths as they
    are. Raises FileNotFoundError for a folder without any."""
    if not path.is_dir():
        return path
    models = RunPaths(path).models
    names = [model.name for model in models]
    for file in [*models, *(path / name for name in names)]:
        if file.is_file():
            return file
    problem = f"no {', '.join(names)} in this folder or its folder checkpoints"
    if (path / "model.safetensors").is_file():
        problem = "a model for transformers, of which export_hf.py --from_hf makes a checkpoint"
    example = "name a run directory such as out/demo, or a checkpoint"
    raise FileNotFoundError(f"{flag} {path}: {problem}; {example}")


def newest_run(out: Path) -> Path | None:
    """The run directory in `out` whose best.pt or last.pt changed last; None without any."""
    runs = [RunPaths(folder) for folder in out.glob("*")]
    files = [path for run in runs for path in (run.best, run.last) if can_be_read(path)]
    newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
    return None if newest is None else RunPaths.around(newest).root


def can_be_read(path: Path) -> bool:
    """Whether a path is a file that this user may read."""
    try:
        return path.is_file() and os.access(path, os.R_OK)
    except PermissionError:  # of a folder on the way
        return False


def is_sound(checkpoint: object) -> bool:
    """Whether everything is there and of the right kind, and the weights are finite and those of
    the config."""
    if not isinstance(checkpoint, dict):
        return False
    start = asdict(Progress())
    try:
        config = Config.from_dict(checkpoint["config"], checkpoint.get("origins"))
        progress = checkpoint.get("progress", {})
        weights = checkpoint["model"]
        return (
            not out_of_range(config)
            and not config.contradictions()
            and all(type(getattr(config, name)) is int for name in SIZES)
            and {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes(config)
            and all(tensor.is_floating_point() for tensor in weights.values())
            and all(tensor.isfinite().all() for tensor in weights.values())
            and all(isinstance(checkpoint[name], str) for name in ("corpus_sha256", "val_sha256"))
            and isinstance(checkpoint["tokenizer"]["content"], str)
            and all(type(checkpoint[name]) is int for name in COUNTS)
            and 1 <= checkpoint["trained_context"] <= config.block_size
            and all(type(value) in (type(start[name]), float) for name, value in progress.items())
            and all(isinstance(loss, float) for loss in progress.get("recent_losses", []))
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        return False


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors, by name; linear weights are (out, in)."""
    C = config.n_embd
    found: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, C),
        "wpe.weight": (config.block_size, C),
    }
    linear = {
        "attn.c_attn": (3, 1),
        "attn.c_proj": (1, 1),
        "mlp.c_fc": (4, 1),
        "mlp.c_proj": (1, 4),
    }
    norms = ["ln_f"]
    for layer in range(config.n_layer):
        norms += [f"h.{layer}.ln_1", f"h.{layer}.ln_2"]
        for name, (rows, columns) in linear.items():
            found[f"h.{layer}.{name}.weight"] = (rows * C, columns * C)
            found[f"h.{layer}.{name}.bias"] = (rows * C,)
    for name in norms:
        found[f"{name}.weight"] = found[f"{name}.bias"] = (C,)
    return found


@dataclass(frozen=True)
class SavedRun:
    """A run as a checkpoint left it. Its tensors are given away once, never held twice."""

    path: Path
    facts: dict  # all that the checkpoint holds, and later all but the tensors
    damage: str | None = None  # what is wrong with the newer checkpoint that should have been it

    @property
    def step(self) -> int:
        """The step after which it was written."""
        return self.facts["step"]

    @property
    def config(self) -> Config:
        """The flags that it was trained with."""
        return Config.from_dict(self.facts["config"], self.facts.get("origins"))

    @property
    def progress(self) -> Progress:
        """How far the run had come."""
        return Progress(**self.facts["progress"])

    def take_tensors(self) -> tuple[dict, dict]:
        """Weights, and the states of the optimizers; they are not here afterwards."""
        return self.facts.pop("model"), self.facts.pop("optimizer")


def restore_optimizers(
    optimizers: dict[str, torch.optim.Optimizer], states: dict[str, dict], untouched: bool
) -> None:
    """Move the states out of a checkpoint into the optimizers. `untouched`: no step was applied,
    so that there may be none. Raises ValueError when one is missing or does not fit."""
    if states.keys() != optimizers.keys():
        wanted = " and ".join(optimizers)
        raise ValueError(f"it has the state of {' and '.join(states)}, not that of {wanted}")
    for name, optimizer in optimizers.items():
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states.pop(name), "param_groups": groups})
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                shape = (len(parameter), 1) if key == "row_mean_square" else parameter.shape
                if value.dim() and value.shape != shape:
                    raise ValueError(f"{key} of shape {tuple(value.shape)}, not {tuple(shape)}")
                state[key] = value.contiguous()  # fused kernels trust shapes and strides
        held = sum(len(group["params"]) for group in optimizer.param_groups)
        if len(optimizer.state) < held and not untouched:
            raise ValueError(f"{name} has the state of {len(optimizer.state)} tensors, not {held}")


def find_checkpoints(config: Config, run: RunDir) -> list[Path]:
    """The checkpoints to continue from as --resume asks, the newest first; none for a fresh start.
    Raises ValueError when a foreign checkpoint would overwrite another run."""
    if config.resume == "never":
        return []
    own = [path for path in (run.last, run.prev) if path.exists()]
    if config.resume == "auto":
        return own
    path = Path(config.resume)
    if not own or run.owns(path):
        return [path]
    flags = read_json(run.config_json).get("config")
    if isinstance(flags, dict) and flags.get("resume") == config.resume:
        return own  # the same command once more: the run it began goes on
    raise ValueError(
        f"--out_dir {run.root} holds another run than --resume {path}: choose another --out_dir"
    )


def load_newest(paths: list[Path]) -> SavedRun | None:
    """The first of the checkpoints that is whole; None without any. Raises FileNotFoundError, or
    ValueError when none is whole or it holds weights alone."""
    damage = None
    for path in paths:
        try:
            checkpoint = load_checkpoint(path)
        except ValueError as error:
            damage = damage or str(error)
            continue
        if not {"optimizer", "scaler", "progress", "offsets"} <= checkpoint.keys():
            raise ValueError(
                f"{path} holds weights alone, without the optimizer: continue from last.pt or "
                "prev.pt, or start a new run from it with --init_from"
            )
        return SavedRun(path, checkpoint, damage)
    if damage:
        remedy = "name another with --resume, or start anew with --resume never"
        raise ValueError(f"{damage}: {remedy}")
    return None
