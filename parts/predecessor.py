"""The checkpoint that a run goes on from, or whose weights it starts from: whether it fits."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from parts.flags import Config, text_names
from parts.run.checkpoint import checkpoint_in, load_checkpoint
from parts.run.directory import read_if_there
from parts.text.vocabulary import one_form

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
    needed = [
        f"--{name} {saved.get(name)}" for name in SHAPE if saved.get(name) != getattr(config, name)
    ]
    if one_form(checkpoint["tokenizer"]["content"]) != vocabulary:
        needed.append(f"--tokenizer {vocabulary_of(path, checkpoint)}")
    if needed:
        made_with = f"it was made with --preset {saved.get('preset')} and --tokenizer {saved.get('tokenizer')}"
        raise ValueError(
            f"--init_from {config.init_from} is another model than these flags make ({made_with}): give "
            f"{' '.join(needed)}"
        )
    if (rows := len(weights["wte.weight"])) != config.vocab_size:
        raise ValueError(
            f"--init_from {config.init_from} has weights for {rows:,} tokens, not {config.vocab_size:,}"
        )
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


def check_same_run(
    path: Path, checkpoint: dict, config: Config, vocabulary: str, sha256: str, n_tokens: int
) -> None:
    """Raises ValueError when the checkpoint has other weights or another corpus than the flags ask for."""
    remedy = "choose another --out_dir, or --resume never to move that run aside and start anew"
    saved, texts = checkpoint["config"], text_names(config.input_file)
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
