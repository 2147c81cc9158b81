"""Checkpoints: written whole, read without trust; which one a run continues from."""

import errno
import math
import statistics
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from parts.config import Config, names, out_of_range
from parts.files import RunDir, read_if_there, read_json, replacing
from parts.machine import is_out_of_memory
from parts.text import one_form

CHECKPOINT_FORMAT = 3
FOLDER = 0x10  # among the attributes of a zip archive's member
COMPLETE = ("target", "patience", "steps")  # reasons to stop that end a run; signals only interrupt it
WEIGHT_BYTES, STATE_BYTES = 4, 12  # of a parameter: in fp32, and with both moments of AdamW (with Muon it is less)


@dataclass
class Progress:
    """How far a run has come: all of its state beside weights, optimizer and gradient scale."""

    step: int = 0
    tokens: int = 0
    elapsed_sec: float = 0.0
    loss: float = math.nan  # of the latest step's whole slices
    grad_norm: float = math.nan  # of the latest step, before clipping
    untold: bool = False  # whether the latest step still has to be measured and logged
    recent_losses: list[float] = field(default_factory=list)  # at most target_window, oldest first
    best_loss: float = math.inf
    best_step: int = 0
    best_error: float = 0.0  # standard error of best_loss, where that is a validation loss; 0: not measured
    skipped_steps: int = 0  # because of a non-finite loss or gradient
    skipped_in_a_row: int = 0
    trained_context: int = 0  # the longest slices trained
    sampled_step: int = 0  # at which text was last sampled
    val_loss: float = math.inf  # of the latest measurement
    val_step: int = 0  # of the latest measurement; 0: none yet
    val_error: float = 0.0  # its standard error over the slices
    measured_in_vain: int = 0  # in a row, without a new lowest
    corpus_loss: float = math.inf  # on random slices, of the latest measurement
    corpus_loss_error: float = 0.0  # its standard error
    corpus_loss_slices: int = 0
    corpus_step: int = 0  # of the latest measurement; 0: none yet
    checked_window: float = math.inf  # window_loss at the latest check of the target that failed
    checked_step: int = 0  # of that check; 0: none yet

    def window_loss(self, config: Config) -> float | None:
        """Mean of the last target_window step losses, None before there are so many."""
        if len(self.recent_losses) < config.target_window:
            return None
        return statistics.fmean(self.recent_losses[-config.target_window :])

    def stop_reason(self, config: Config) -> str | None:
        """One of `COMPLETE` when the run is over, else None."""
        if self.corpus_reached(config) or self.step_reached(config):
            return "target"
        if 0 < config.patience <= self.measured_in_vain:
            return "patience"
        return "steps" if self.step >= config.steps else None

    def window_reached(self, config: Config) -> bool:
        """Whether window_loss is at or below the target."""
        window_loss = self.window_loss(config)
        return window_loss is not None and window_loss <= config.target_loss > 0

    def step_reached(self, config: Config) -> bool:
        """Whether the latest step is at or below the target, where no more is asked for."""
        return config.one_low_step_is_enough and self.window_reached(config)

    @property
    def corpus_measured(self) -> bool:
        """Whether the loss on random slices was measured at this step."""
        return 0 < self.corpus_step == self.step

    def corpus_reached(self, config: Config) -> bool:
        """Whether the loss on random slices, measured at this step, is at or below the target."""
        return self.corpus_measured and self.corpus_loss <= config.target_loss > 0

    def check_is_due(self, config: Config) -> bool:
        """Whether to measure now if the target is reached: window_loss says so, and after a check
        that failed there is a full new window, with a lower loss."""
        if config.one_low_step_is_enough or not self.window_reached(config):
            return False
        if self.step >= config.steps:  # it is measured anyway
            return False
        window_loss = self.window_loss(config)
        assert window_loss is not None, "it is at the target"
        in_full = self.step >= self.checked_step + config.target_window
        return in_full and window_loss < self.checked_window

    def note_failed_check(self, config: Config) -> None:
        """Remember where window_loss was at the target, and the loss on random slices was not."""
        window_loss = self.window_loss(config)
        assert window_loss is not None, "without it there is no check"
        self.checked_window, self.checked_step = window_loss, self.step

    def forget_incomparable(self, before: Config, config: Config) -> None:
        """Losses of slices of another length do not compare, nor checks of another target."""
        if before.seq_len != config.seq_len:
            self.recent_losses, self.corpus_step = [], 0
        target = ("seq_len", "target_loss", "target_window")
        if any(getattr(before, name) != getattr(config, name) for name in target):
            self.checked_window, self.checked_step = math.inf, 0

    def forget_best(self) -> None:
        """What the best was does not compare with what comes."""
        self.best_loss, self.best_step, self.best_error, self.measured_in_vain = math.inf, 0, 0.0, 0


def write_checkpoint(path: Path, checkpoint: dict, previous: Path | None = None) -> None:
    """Write a checkpoint as a whole. Raises OSError, which torch.save may hide behind an error of its own."""
    try:
        with replacing(path, previous) as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError | KeyboardInterrupt) else error from None


def load_checkpoint(path: Path, flag: str = "--resume") -> dict:
    """Read a checkpoint onto the CPU; nothing in the file is executed (tensors and plain values only).

    Raises FileNotFoundError, or ValueError when it is no checkpoint of this program or not a byte as written.
    """
    if not path.is_file():
        problem = "a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{flag} {path}: {problem}; name a checkpoint such as out/demo/checkpoints/best.pt")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("packed, which PyTorch never does")
            if any(member.external_attr & FOLDER for member in archive.infolist()):
                raise ValueError("marked as a folder, of which PyTorch reads nothing and leaves memory as it was")
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as there are bytes in it
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # the disk's fault, or the permissions'
        if is_out_of_memory(error):
            raise OSError(f"{path} does not fit into memory: close other programs and try again") from error
        reason = str(error).partition("\n")[0][:100] if type(error) is ValueError else type(error).__name__
        reason = "torch.save writes other files" if isinstance(error, zipfile.BadZipFile) else reason
        raise ValueError(f"{path} is damaged or no checkpoint ({reason})") from error
    if isinstance(checkpoint, dict) and checkpoint.get("format", CHECKPOINT_FORMAT) != CHECKPOINT_FORMAT:
        raise ValueError(f"{path} has format {checkpoint['format']!r}, this train.py reads {CHECKPOINT_FORMAT}")
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
    raise FileNotFoundError(f"{flag} {path}: {problem}; name a run directory such as out/demo, or a checkpoint")


def newest_run(out: Path) -> Path | None:
    """Of the run directories in `out`, the one whose best.pt or last.pt changed last; None without any."""
    found = [path for name in KINDS[:2] for path in out.glob(f"*/checkpoints/{name}") if path.is_file()]
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
            and {name: tuple(value.shape) for name, value in checkpoint["model"].items()} == shapes(config)
            and all(value.is_floating_point() and value.isfinite().all() for value in checkpoint["model"].values())
            and all(isinstance(checkpoint[name], str) for name in ("corpus_sha256", "val_sha256"))
            and isinstance(checkpoint["tokenizer"]["content"], str)
            and all(type(checkpoint[name]) is int for name in ("corpus_tokens", "step", "trained_context"))
            and 1 <= checkpoint["trained_context"] <= config.block_size
            and all(type(value) in (type(start[name]), float) for name, value in progress.items())
            and all(isinstance(loss, float) for loss in progress.get("recent_losses", []))
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        return False


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Those of the model's tensors, by name; linear weights are (out, in)."""
    C = config.n_embd
    linear = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    found: dict[str, tuple[int, ...]] = {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.block_size, C)}
    for layer in range(config.n_layer):
        for name, (rows, columns) in linear.items():
            found[f"h.{layer}.{name}.weight"], found[f"h.{layer}.{name}.bias"] = (rows, columns), (rows,)
        for name in ("ln_1", "ln_2"):
            found[f"h.{layer}.{name}.weight"] = found[f"h.{layer}.{name}.bias"] = (C,)
    return found | {"ln_f.weight": (C,), "ln_f.bias": (C,)}


def restore_optimizers(optimizers: dict[str, torch.optim.Optimizer], checkpoint: dict) -> None:
    """Give the optimizers their states, out of the checkpoint, so that they are not held twice.

    Raises ValueError when one is missing, or does not fit its parameter.
    """
    states = checkpoint.pop("optimizer")
    if states.keys() != optimizers.keys():
        raise ValueError(f"it has the state of {' and '.join(states)}, not that of {' and '.join(optimizers)}")
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
        if len(optimizer.state) < held and checkpoint["progress"]["skipped_steps"] < checkpoint["step"]:
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
    raise ValueError(f"--out_dir {run.root} holds another run than --resume {path}: choose another --out_dir")


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


SHAPE = ("n_layer", "n_head", "n_embd", "block_size")  # flags that weights do not survive


@dataclass(frozen=True)
class Start:
    """Weights that a new run begins with."""

    path: Path
    model: dict[str, torch.Tensor]
    trained_context: int  # positions that they know


def load_start(config: Config, vocabulary: str) -> Start | None:
    """What --init_from names. Raises OSError, or ValueError when it is of another model."""
    if config.init_from is None:
        return None
    path = checkpoint_in(config.init_from, "--init_from")
    checkpoint = load_checkpoint(path, "--init_from")
    saved, weights = checkpoint["config"], checkpoint["model"]
    needed = [f"--{name} {saved.get(name)}" for name in SHAPE if saved.get(name) != getattr(config, name)]
    if one_form(checkpoint["tokenizer"]["content"]) != vocabulary:
        needed.append(f"--tokenizer {vocabulary_of(path, checkpoint)}")
    if needed:
        made_with = f"it was made with --preset {saved.get('preset')} and --tokenizer {saved.get('tokenizer')}"
        raise ValueError(
            f"--init_from {config.init_from} is another model than these flags make ({made_with}): give "
            f"{' '.join(needed)}"
        )
    if (rows := len(weights["wte.weight"])) != config.vocab_size:
        raise ValueError(f"--init_from {config.init_from} has weights for {rows:,} tokens, not {config.vocab_size:,}")
    return Start(path, weights, checkpoint["trained_context"])


def vocabulary_of(path: Path, checkpoint: dict) -> str:
    """What to give --tokenizer for the vocabulary of this checkpoint: gpt2, or the file that its run wrote."""
    content, file = checkpoint["tokenizer"]["content"], path.parent.parent / "tokenizer.json"
    with suppress(ValueError):
        if content and one_form(read_if_there(file)) == one_form(content):
            return str(file)
    return "PATH.json, with the tokenizer.json of its run" if content else "gpt2"


def difference(saved: dict, config: Config, flags: tuple[str, ...]) -> str | None:
    """The first of these flags that the checkpoint's config and this one have otherwise, in words."""
    for name in flags:
        if saved.get(name) != getattr(config, name):
            return f"--{name} {saved.get(name)} (--preset {saved.get('preset')}), not {getattr(config, name)}"
    return None


def check_same_run(path: Path, checkpoint: dict, config: Config, vocabulary: str, sha256: str, n_tokens: int) -> None:
    """Raises ValueError when the checkpoint has other weights or another corpus than the flags ask for."""
    remedy = "choose another --out_dir, or --resume never to move that run aside and start anew"
    saved, texts = checkpoint["config"], names(config.input_file)
    if not {"optimizer", "scaler", "progress", "offsets"} <= checkpoint.keys():
        raise ValueError(
            f"{path} holds weights alone, without the optimizer: continue from last.pt or prev.pt, or start a new run "
            "from it with --init_from"
        )
    if one_form(checkpoint["tokenizer"]["content"]) != vocabulary:
        raise ValueError(
            f"{path} has another vocabulary (--tokenizer {saved.get('tokenizer')}) than {config.tokenizer}: {remedy}"
        )
    if other := difference(saved, config, (*SHAPE, "optimizer")):
        raise ValueError(f"{path} has {other}: {remedy}")
    if checkpoint["corpus_sha256"] != sha256:
        own = f" --tokenizer {vocabulary_of(path, checkpoint)}" if vocabulary else ""
        raise ValueError(
            f"{path} was trained on another text than {texts}: to go on from its weights with this one, give "
            f"--init_from {path}{own} and another --out_dir; for a new model, {remedy}"
        )
    if checkpoint["corpus_tokens"] != n_tokens:
        raise ValueError(
            f"{path} was trained on {checkpoint['corpus_tokens']:,} tokens of {texts}, not {n_tokens:,}: set "
            f"--max_tokens {saved.get('max_tokens')} --val_fraction {saved.get('val_fraction')}, or {remedy}"
        )
