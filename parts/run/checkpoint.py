"""Checkpoints: written whole, read without trust; which one a run continues from."""

import errno
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from parts.compute.device import is_out_of_memory
from parts.flags import Config, out_of_range
from parts.progress import Progress
from parts.run.directory import RunDir, read_json, replacing

CHECKPOINT_FORMAT = 3
FOLDER = 0x10  # among the attributes of a zip archive's member
WEIGHT_BYTES, STATE_BYTES = (
    4,
    12,
)  # of a parameter: in fp32, and with both moments of AdamW (with Muon it is less)


def write_checkpoint(path: Path, checkpoint: dict, previous: Path | None = None) -> None:
    """Write a checkpoint as a whole. Raises OSError, which torch.save may hide behind an error of its own."""
    try:
        with replacing(path, previous) as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        raise (
            error.__context__
            if isinstance(error.__context__, OSError | KeyboardInterrupt)
            else error
        ) from None


def load_checkpoint(path: Path, flag: str = "--resume") -> dict:
    """Read a checkpoint onto the CPU; nothing in the file is executed (tensors and plain values only).

    Raises FileNotFoundError, or ValueError when it is no checkpoint of this program or not a byte as written.
    """
    if not path.is_file():
        problem = "a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(
            f"{flag} {path}: {problem}; name a checkpoint such as out/demo/checkpoints/best.pt"
        )
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("packed, which PyTorch never does")
            if any(member.external_attr & FOLDER for member in archive.infolist()):
                raise ValueError(
                    "marked as a folder, of which PyTorch reads nothing and leaves memory as it was"
                )
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as there are bytes in it
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # the disk's fault, or the permissions'
        if is_out_of_memory(error):
            raise OSError(
                f"{path} does not fit into memory: close other programs and try again"
            ) from error
        reason = (
            str(error).partition("\n")[0][:100]
            if type(error) is ValueError
            else type(error).__name__
        )
        reason = (
            "torch.save writes other files" if isinstance(error, zipfile.BadZipFile) else reason
        )
        raise ValueError(f"{path} is damaged or no checkpoint ({reason})") from error
    if (
        isinstance(checkpoint, dict)
        and checkpoint.get("format", CHECKPOINT_FORMAT) != CHECKPOINT_FORMAT
    ):
        raise ValueError(
            f"{path} has format {checkpoint['format']!r}, this train.py reads {CHECKPOINT_FORMAT}"
        )
    if not is_sound(checkpoint):
        raise ValueError(f"{path} is no checkpoint of train.py")
    return checkpoint


KINDS = ("best.pt", "last.pt", "prev.pt")  # in the order in which a model is looked for


def checkpoint_in(path: Path, flag: str) -> Path:
    """The checkpoint that a run directory means, or its folder `checkpoints`: the best, else the last, else the one
    before. What is no folder is returned as it is.

    Raises FileNotFoundError for a folder without any.
    """
    if not path.is_dir():
        return path
    for folder in (path / "checkpoints", path):
        for name in KINDS:
            if (folder / name).is_file():
                return folder / name
    problem = f"no {', '.join(KINDS)} in this folder or its folder checkpoints"
    if (path / "model.safetensors").is_file():
        problem = "a model for transformers, of which export_hf.py --from_hf makes a checkpoint"
    raise FileNotFoundError(
        f"{flag} {path}: {problem}; name a run directory such as out/demo, or a checkpoint"
    )


def newest_run(out: Path) -> Path | None:
    """Of the run directories in `out`, the one whose best.pt or last.pt changed last; None without any."""
    found = [
        path for name in KINDS[:2] for path in out.glob(f"*/checkpoints/{name}") if path.is_file()
    ]
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent.parent if found else None


def is_sound(checkpoint: object) -> bool:
    """Whether everything is there and of the right kind, and the weights are finite and those of the config."""
    if not isinstance(checkpoint, dict):
        return False
    start = asdict(Progress())
    try:
        config, progress = Config.from_dict(checkpoint["config"]), checkpoint.get("progress", {})
        return (
            not out_of_range(config)
            and not config.contradictions()
            and {name: tuple(value.shape) for name, value in checkpoint["model"].items()}
            == shapes(config)
            and all(
                value.is_floating_point() and value.isfinite().all()
                for value in checkpoint["model"].values()
            )
            and all(isinstance(checkpoint[name], str) for name in ("corpus_sha256", "val_sha256"))
            and isinstance(checkpoint["tokenizer"]["content"], str)
            and all(
                type(checkpoint[name]) is int
                for name in ("corpus_tokens", "step", "trained_context")
            )
            and 1 <= checkpoint["trained_context"] <= config.block_size
            and all(type(value) in (type(start[name]), float) for name, value in progress.items())
            and all(isinstance(loss, float) for loss in progress.get("recent_losses", []))
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        return False


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Those of the model's tensors, by name; linear weights are (out, in)."""
    C = config.n_embd
    linear = {
        "attn.c_attn": (3 * C, C),
        "attn.c_proj": (C, C),
        "mlp.c_fc": (4 * C, C),
        "mlp.c_proj": (C, 4 * C),
    }
    found: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, C),
        "wpe.weight": (config.block_size, C),
    }
    for layer in range(config.n_layer):
        for name, (rows, columns) in linear.items():
            found[f"h.{layer}.{name}.weight"], found[f"h.{layer}.{name}.bias"] = (
                (rows, columns),
                (rows,),
            )
        for name in ("ln_1", "ln_2"):
            found[f"h.{layer}.{name}.weight"] = found[f"h.{layer}.{name}.bias"] = (C,)
    return found | {"ln_f.weight": (C,), "ln_f.bias": (C,)}


def restore_optimizers(optimizers: dict[str, torch.optim.Optimizer], checkpoint: dict) -> None:
    """Give the optimizers their states, out of the checkpoint, so that they are not held twice.

    Raises ValueError when one is missing, or does not fit its parameter.
    """
    states = checkpoint.pop("optimizer")
    if states.keys() != optimizers.keys():
        raise ValueError(
            f"it has the state of {' and '.join(states)}, not that of {' and '.join(optimizers)}"
        )
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
        if (
            len(optimizer.state) < held
            and checkpoint["progress"]["skipped_steps"] < checkpoint["step"]
        ):
            raise ValueError(f"{name} has the state of {len(optimizer.state)} tensors, not {held}")


def find_checkpoints(config: Config, run: RunDir) -> list[Path]:
    """The checkpoints to continue from as --resume asks, the newest first; none for a fresh start.

    Raises ValueError when a foreign checkpoint would overwrite another run.
    """
    own = [path for path in (run.last, run.prev) if path.exists()]
    if config.resume == "never":
        return []
    path = Path(config.resume)
    if config.resume == "auto":
        return own
    if not own or run.owns(path):
        return [path]
    flags = read_json(run.config_json).get("config")
    if isinstance(flags, dict) and flags.get("resume") == config.resume:
        return own  # the same command once more: the run it began goes on
    raise ValueError(
        f"--out_dir {run.root} holds another run than --resume {path}: choose another --out_dir"
    )


def load_newest(paths: list[Path]) -> tuple[Path | None, dict | None, str | None]:
    """The first of the checkpoints that is whole: its path, what it holds, and what is wrong with the one before.

    Raises FileNotFoundError, or ValueError when none is whole.
    """
    damage = None
    for path in paths:
        try:
            return path, load_checkpoint(path), damage
        except ValueError as error:
            damage = damage or str(error)
    if damage:
        raise ValueError(f"{damage}: name another with --resume, or start anew with --resume never")
    return None, None, None
