"""The checkpoint that a run goes on from, or whose weights it starts from: whether it fits."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from parts.flags import Config, text_names
from parts.run.checkpoint import checkpoint_in, load_checkpoint
from parts.run.directory import read_if_there
from parts.run.layout import RunPaths
from parts.text.vocabulary import normal_form

MODEL_FLAGS = ("n_layer", "n_head", "n_embd", "block_size")  # flags that weights do not survive


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a new run begins with."""

    path: Path
    model: dict[str, torch.Tensor]
    trained_context: int  # positions that they know
    remark: str = ""  # what of the new model they do not have


def load_initial_weights(config: Config, vocabulary: str) -> InitialWeights | None:
    """What --init_from names. Raises OSError, or ValueError when it is of another model."""
    if config.init_from is None:
        return None
    path = checkpoint_in(config.init_from, "--init_from")
    checkpoint = load_checkpoint(path, "--init_from")
    saved = checkpoint["config"]
    weights = checkpoint["model"]
    positions = len(weights["wpe.weight"])
    is_longer = config.block_size > positions  # its other positions begin new
    fixed = tuple(name for name in MODEL_FLAGS if name != "block_size" or not is_longer)
    needed = [f"--{name} {saved.get(name)}" for name in different(saved, config, fixed)]
    if normal_form(checkpoint["tokenizer"]["content"]) != vocabulary:
        needed.append(f"--tokenizer {vocabulary_of(path, checkpoint)}")
    if needed:
        made_with = f"--preset {saved.get('preset')} and --tokenizer {saved.get('tokenizer')}"
        raise ValueError(
            f"--init_from {config.init_from} is another model than these flags make (it was made "
            f"with {made_with}): give {' '.join(needed)}"
        )
    rows = len(weights["wte.weight"])
    if rows != config.vocab_size:
        sizes = f"{rows:,} tokens, not {config.vocab_size:,}"
        raise ValueError(f"--init_from {config.init_from} has weights for {sizes}")
    remark = f" ({positions} positions; {positions + 1} to {config.block_size} begin new)"
    context = checkpoint["trained_context"]
    return InitialWeights(path, weights, context, remark if is_longer else "")


def vocabulary_of(path: Path, checkpoint: dict) -> str:
    """What to give --tokenizer for a checkpoint's vocabulary: gpt2, or the file of its run."""
    content = checkpoint["tokenizer"]["content"]
    if not content:
        return "gpt2"
    imported = Path(checkpoint["config"].get("tokenizer", ""))
    for file in (RunPaths.around(path).tokenizer_json, imported):
        with suppress(OSError, ValueError):
            if normal_form(read_if_there(file)) == normal_form(content):
                return str(file)
    return "PATH.json, with the tokenizer.json of its run"


def different(saved: dict, config: Config, flags: tuple[str, ...]) -> list[str]:
    """Those of these flags that a checkpoint's config has otherwise."""
    return [name for name in flags if saved.get(name) != getattr(config, name)]


def check_same_run(
    path: Path, checkpoint: dict, config: Config, vocabulary: str, sha256: str, n_tokens: int
) -> None:
    """Raises ValueError when a checkpoint has other weights or another corpus than the flags."""
    anew = "choose another --out_dir, or --resume never to move that run aside and start anew"
    saved = checkpoint["config"]
    texts = text_names(config.input_file)
    if normal_form(checkpoint["tokenizer"]["content"]) != vocabulary:
        other = f"--tokenizer {saved.get('tokenizer')}"
        raise ValueError(f"{path} has another vocabulary ({other}) than {config.tokenizer}: {anew}")
    other_flags = different(saved, config, (*MODEL_FLAGS, "optimizer"))
    if other_flags:
        name = other_flags[0]
        other = f"--{name} {saved.get(name)} (--preset {saved.get('preset')})"
        raise ValueError(f"{path} has {other}, not {getattr(config, name)}: {anew}")
    if checkpoint["corpus_sha256"] != sha256:
        own = f" --tokenizer {vocabulary_of(path, checkpoint)}" if vocabulary else ""
        raise ValueError(
            f"{path} was trained on another text than {texts}: to go on from its weights with this "
            f"one, give --init_from {path}{own} and another --out_dir; for a new model, {anew}"
        )
    n_saved = checkpoint["corpus_tokens"]
    if n_saved != n_tokens:
        flags = f"--max_tokens {saved.get('max_tokens')} --val_fraction {saved.get('val_fraction')}"
        counts = f"{n_saved:,} tokens of {texts}, not {n_tokens:,}"
        raise ValueError(f"{path} was trained on {counts}: set {flags}, or {anew}")
