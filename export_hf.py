"""Turn a checkpoint of train.py into a folder that Hugging Face's transformers loads, and back.

    python export_hf.py --checkpoint out/gpt2 --out hf/gpt2
    python export_hf.py --from_hf hf/gpt2 --out imported.pt

The folder holds weights (safetensors, the tied head once), configuration, vocabulary and a model card written from
the run's own files; `AutoModelForCausalLM` and `AutoTokenizer` load it without a network. The way back makes a
checkpoint of weights alone, for sample.py and `train.py --init_from`. Neither needs transformers.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

from parts.start import packages_of

with packages_of("export_hf.py", __name__):
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load, save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from parts.commandline import read_flags
    from parts.compute.device import complaints
    from parts.flags import Config, out_of_range
    from parts.recipe import decide
    from parts.report.sections import in_markdown
    from parts.run.checkpoint import (
        CHECKPOINT_FORMAT,
        checkpoint_in,
        is_sound,
        load_checkpoint,
        shapes,
        write_checkpoint,
    )
    from parts.run.directory import existing_part, make_folder, new_folder, read_if_there, read_json
    from parts.run.layout import RunPaths, sample_blocks
    from parts.run.screen import log, speaking
    from parts.text.vocabulary import (
        DOCUMENT_END,
        OwnVocabulary,
        read_text,
        saved_tokenizer,
        vocabulary_folder,
    )

FIRST_WORDS = "Once upon a time"
SHAPE = ("n_layer", "n_head", "n_embd", "vocab_size")  # as both programs call it
SAME = {  # what transformers may vary and train.py does not
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True, "add_cross_attention": False,
}  # fmt: skip
WINDOW, CORPUS = "training loss (window)", "corpus loss, nats per token"
RECITES = (
    0.5  # nats per token: below this training loss most of what a model writes stands in its text
)
NO_LICENSE = "unknown"  # the Hub's word for it
HUB_LICENSES = "https://huggingface.co/docs/hub/repositories-licenses"
TRANSPOSED = (
    "c_attn.weight",
    "c_proj.weight",
    "c_fc.weight",
)  # transformers' Conv1D stores (in, out)


@dataclass(frozen=True)
class Options:
    """Flags of the command line."""

    out: Path
    """folder to make; with --from_hf the checkpoint to write"""
    checkpoint: Path | None = None
    """what to export: a run directory, for its best.pt, or a checkpoint"""
    from_hf: Path | None = None
    """folder to import instead: a GPT-2 with a byte-level vocabulary"""
    license: str = NO_LICENSE
    """for the model card, as the Hub spells it, such as mit or cc0-1.0; the rights in the text decide which"""
    replace: bool = False
    """write over an earlier export, also over a card that was edited since; with --from_hf over an earlier import"""


# ---------------------------------------------------------------------------------------------
# To Hugging Face
# ---------------------------------------------------------------------------------------------


def export(path: Path, out: Path, license: str, over: bool = False) -> None:
    """Write the folder, which appears when it is whole, also `over` an earlier export. Raises OSError or ValueError."""
    if out.exists() and not over:
        raise FileExistsError(
            f"--out {out} is there already: give --replace, or choose another folder"
        )
    if not re.fullmatch(r"[a-z][a-z0-9.-]*", license):
        raise ValueError(
            f"--license {license!r} is none of the Hub's, such as mit, cc0-1.0, other: see {HUB_LICENSES}"
        )
    if not (existing := existing_part(out.parent)).is_dir():
        raise NotADirectoryError(f"--out {out}: {existing} is no folder; choose another")
    checkpoint = load_checkpoint(path, "--checkpoint")
    end = saved_tokenizer(
        checkpoint
    ).eot_token  # complains if the tokenizer is not that of the weights
    config, run = Config.from_dict(checkpoint["config"]), own_run(path, checkpoint)
    measured = losses(
        checkpoint, config, {} if run is None else read_json(RunPaths(run).results_json)
    )
    vocabulary = hf_tokenizer(checkpoint["tokenizer"]["content"])
    weights = hf_weights(checkpoint.pop("model"))
    context = checkpoint["trained_context"]
    files = {
        "config.json": hf_config(config, end),
        "generation_config.json": {
            "bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "do_sample": True, "temperature": 0.9,
            "top_k": 50, "max_length": context,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, "add_prefix_space": False,
            "bos_token": DOCUMENT_END, "eos_token": DOCUMENT_END, "unk_token": DOCUMENT_END,
            "clean_up_tokenization_spaces": False,
        },
    }  # fmt: skip
    texts = {file: json.dumps(values, indent=2) + "\n" for file, values in files.items()} | {
        "tokenizer.json": OwnVocabulary(vocabulary.to_str(), "tokenizer.json").content,
        "prompts.json": json.dumps(
            [FIRST_WORDS] if run is None else beginnings(run), ensure_ascii=False
        )
        + "\n",
        "README.md": model_card(checkpoint, config, measured, license),
    }
    present = (
        {file.name for file in out.iterdir()}
        if out.is_dir()
        else {out.name}
        if out.exists()
        else set()
    )
    if foreign := present - {"model.safetensors", *texts}:
        raise FileExistsError(
            f"--out {out}: {min(foreign)} is of no export: move it away, or choose another folder"
        )
    with writing(out), new_folder(out) as folder:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8", newline="\n")
        shutil.copymode(
            folder / "config.json", folder / "model.safetensors"
        )  # which is born for its owner alone


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Say what it means when the disk refuses. Raises OSError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or error
        raise OSError(
            f"--out {out} cannot be written ({cause}): free room there, or choose another place"
        ) from error


def own_run(path: Path, checkpoint: dict) -> Path | None:
    """The run directory that the checkpoint lies in, if it is the one that it was made in."""
    run = path.resolve().parent.parent
    corpus = read_json(RunPaths(run).config_json).get("corpus")
    own = isinstance(corpus, dict) and corpus.get("sha256") == checkpoint["corpus_sha256"] != ""
    return run if own else None


def beginnings(run: Path) -> list[str]:
    """Prompts in the manner of the text, for space/app.py: that of the run's last samples, and their lines that end
    with a colon."""
    blocks = sample_blocks(read_if_there(RunPaths(run).samples_txt))
    samples = blocks[-1].texts if blocks else ""
    prompt = samples.partition("PROMPT:\n")[2].partition("\nOUTPUT:")[0]
    names = [
        line + "\n" for line in samples.splitlines() if line.endswith(":") and not line.isupper()
    ]
    return [text for text in dict.fromkeys([prompt, *names]) if text][:5] or [FIRST_WORDS]


def hf_weights(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under transformers' names, taken out of `model`, so that none is held twice."""
    return {f"transformer.{name}": transposed(name, model.pop(name)) for name in list(model)}


def transposed(name: str, value: torch.Tensor) -> torch.Tensor:
    """A weight in the other program's layout; there and back are the same."""
    return (value.T if name.endswith(TRANSPOSED) else value).contiguous()


def hf_config(config: Config, end: int) -> dict:
    """The model's shape in transformers' words."""
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocab_size,
        "n_positions": config.block_size, "n_embd": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "initializer_range": config.init_std,
        "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        "bos_token_id": end, "eos_token_id": end, "tie_word_embeddings": True, "dtype": "float32",
    }  # fmt: skip


def hf_tokenizer(content: str) -> Tokenizer:
    """An own vocabulary, or GPT-2's where there is none, as transformers has it."""
    if content:
        return Tokenizer.from_str(content)
    folder = vocabulary_folder()
    merges = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    ids = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer(
        models.BPE(ids, [(left, right) for left, right in map(str.split, filter(None, merges))])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(DOCUMENT_END, special=True, normalized=False)])
    return tokenizer


def losses(checkpoint: dict, config: Config, results: dict) -> dict[str, float]:
    """What was measured of these very weights; `results` speaks of the run's last step."""
    found: dict[str, float | None] = {}
    if results.get("final_step") == checkpoint["step"]:
        found = {WINDOW: results.get("window_loss"), CORPUS: results.get("corpus_loss")}
        if found[CORPUS] is not None:  # the run was over, and all was measured at its last step
            found |= {
                "validation loss": results.get("val_loss"),
                "bits per byte": results.get("bits_per_byte"),
            }
    if "loss" in checkpoint:
        found["validation loss" if config.validates else WINDOW] = checkpoint["loss"]
    return {name: value for name, value in found.items() if isinstance(value, float)}


def without_folders(*paths: Path | str) -> str:
    """Names alone, for the card: where a file lay is nobody else's business. Strings are paths of either system."""
    return in_markdown(
        ", ".join(
            (path if isinstance(path, Path) else PureWindowsPath(path)).name for path in paths
        )
    )


def model_card(checkpoint: dict, config: Config, measured: dict[str, float], license: str) -> str:
    """What the model is, as far as its checkpoint and its losses tell."""
    context, text = checkpoint["trained_context"], without_folders(*config.input_file)
    untrained = context < config.block_size
    rows = {
        "parameters": f"{config.n_params:,}",
        "layers, heads, width": f"{config.n_layer}, {config.n_head}, {config.n_embd}",
        "trained context": f"{context} tokens"
        + f" (of {config.block_size} positions; the others are untrained)" * untrained,
        "vocabulary": f"{config.vocab_size:,} ({without_folders(config.tokenizer)})",
    }
    if not checkpoint["corpus_sha256"]:
        title, origin = (
            "GPT-2, imported",
            "What these weights were trained on is not recorded here. The model",
        )
    elif config.init_from is None:
        title = f"GPT-2 trained from scratch on {text}"
        origin = "The model was trained on this text alone, has had no safety training, and"
    else:
        start = without_folders(config.init_from)
        title = f"GPT-2 trained from the weights of {start} on {text}"
        origin = f"What {start} was trained on is not recorded here. The model"
    if checkpoint["corpus_sha256"]:
        rows |= {
            "text": text,
            "SHA-256 of the text": checkpoint["corpus_sha256"],
            "tokens of the text": f"{checkpoint['corpus_tokens']:,}",
            "step of these weights": f"{checkpoint['step']:,}",
            "training": f"{config.optimizer}, {config.global_batch} x {config.seq_len} tokens a step, "
            f"peak rate {config.lr:g}, seed {config.seed}",
        }
    rows |= {name: f"{value:.6f}" for name, value in measured.items()}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    loss = measured.get(CORPUS, measured.get(WINDOW))
    memory = "It may repeat passages of what it was trained on; how much of its text is copied has not been measured."
    if loss is not None and loss < RECITES:
        memory = (
            f"A loss of {loss:.2f} nats per token on its own text means that the model recites it: what it writes is "
            "largely copied\nfrom there, with whatever rights and private matters that text has."
        )
    rights = (
        "**Licence.** None is set yet. What others may do with this model depends on the rights in what it was trained "
        "on. Before\nyou publish it, set `license:` in the first lines of this file to one of the "
        f"[Hub's identifiers]({HUB_LICENSES}),\nor export it with `--license`.\n\n"
    ) * (license == NO_LICENSE)
    beyond = "; positions beyond were never trained" * untrained
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: {license}
tags:
- gpt2
---

# {title}

| | |
| --- | --- |
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = (kind.from_pretrained("PATH") for kind in (AutoTokenizer, AutoModelForCausalLM))
ids = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_length={context})[0], skip_special_tokens=True))
```

{rights}**Use.** For looking at how a language model learns. {origin} is no source of facts.

**Memorisation.** {memory}

**Length.** Prompt and continuation together may have {context} tokens{beyond}.
"""


# ---------------------------------------------------------------------------------------------
# And back
# ---------------------------------------------------------------------------------------------


def import_hf(folder: Path, out: Path, over: bool = False) -> None:
    """Write a checkpoint of weights alone, also `over` an earlier one. Raises OSError or ValueError for what is no such
    GPT-2."""
    if out.exists() and not over:
        raise FileExistsError(
            f"--out {out} is there already: give --replace, or choose another file"
        )
    if out.exists() and load_checkpoint(out, "--out")["corpus_sha256"]:
        raise FileExistsError(f"--out {out} is the checkpoint of a run: choose another file")
    if not folder.is_dir():
        raise FileNotFoundError(f"--from_hf {folder}: no such folder; {how_to_download(folder)}")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"--from_hf {folder} has no {name}: needed are config.json, model.safetensors (in one file) and "
                "tokenizer.json, as save_pretrained of a model and of its fast tokenizer writes them"
            )
    values = read_json(folder / "config.json")
    if other := [
        f"{name} {values[name]!r}"
        for name in SAME.keys() & values.keys()
        if values[name] != SAME[name]
    ]:
        raise ValueError(
            f"--from_hf {folder}: config.json is not that of a GPT-2 like train.py's ({', '.join(other)})"
        )
    vocabulary = OwnVocabulary(
        read_text(folder / "tokenizer.json", "--from_hf")[0], "tokenizer.json"
    )
    own = not is_gpt2(vocabulary.content)
    try:
        context = read_json(folder / "tokenizer_config.json").get("model_max_length")
        context = (
            context
            if type(context) is int and 1 <= context <= values["n_positions"]
            else values["n_positions"]
        )
        shape = {name: values[name] for name in SHAPE} | {
            "block_size": values["n_positions"],
            "seq_len": context,
        }
        if any(type(size) is not int for size in shape.values()):
            raise TypeError("sizes that are no whole numbers in config.json")
        config = decide(shape | {"device": "cpu"}, vocab_size=values["vocab_size"])
        problems = out_of_range(config) or config.contradictions()
        weights = load((folder / "model.safetensors").read_bytes())  # not each disk can map it
    except (KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"--from_hf {folder} is incomplete or damaged ({type(error).__name__}: {error})"
        ) from error
    if problems:
        raise ValueError("\n".join(f"--from_hf {folder}: {problem}" for problem in problems))
    names = {
        name: name.removeprefix("transformer.")
        for name in weights
        if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    model = {short: weights[name] for name, short in names.items()}
    described = {
        name: tuple(transposed(name, torch.empty(s, device="meta")).shape)
        for name, s in shapes(config).items()
    }
    if {name: tuple(value.shape) for name, value in model.items()} != described or len(model) < len(
        names
    ):
        raise ValueError(
            f"--from_hf {folder}: the weights are not those that its config.json describes"
        )
    if config.vocab_size < vocabulary.n_vocab:
        raise ValueError(
            f"--from_hf {folder}: {vocabulary.n_vocab:,} tokens, but weights for {config.vocab_size:,}"
        )
    model["wte.weight"] = model["wte.weight"][: vocabulary.n_vocab]  # behind them some have padding
    tokenizer = (folder / "tokenizer.json").as_posix() if own else "gpt2"
    config = replace(config, vocab_size=vocabulary.n_vocab, tokenizer=tokenizer)
    checkpoint = {
        "format": CHECKPOINT_FORMAT, "config": config.as_dict(), "step": 0, "trained_context": context,
        "model": {name: transposed(name, value.float()) for name, value in model.items()},
        "tokenizer": {"name": tokenizer, "n_vocab": config.vocab_size, "content": vocabulary.content if own else ""},
        "corpus_sha256": "", "corpus_tokens": 0, "val_sha256": "",
    }  # fmt: skip
    if not is_sound(checkpoint):
        raise ValueError(f"--from_hf {folder}: not all of its weights are finite")
    with writing(out):
        make_folder(out.parent, parents=True)
        write_checkpoint(out, checkpoint)


def how_to_download(folder: Path) -> str:
    """The command that brings a model here from the Hugging Face Hub, whose names look like folders."""
    name = (
        folder.name if folder.name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl") else "gpt2"
    )
    files = "config.json model.safetensors tokenizer.json"  # a tenth of what lies there
    return (
        f"from the Hugging Face Hub it comes with: hf download openai-community/{name} {files} --local-dir {name} "
        f"(hf: pip install huggingface_hub), and then --from_hf {name}"
    )


def is_gpt2(content: str) -> bool:
    """Whether a vocabulary is GPT-2's own."""
    ids = json.loads((vocabulary_folder() / "encoder.json").read_text(encoding="utf-8"))
    return Tokenizer.from_str(content).get_vocab() == ids


@speaking("export_hf.py")
def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0, 2 for bad input, 130 after Ctrl-C."""
    try:
        options = read_flags(
            Options, sys.argv[1:] if argv is None else argv, "export_hf.py", __doc__
        )
        if options.checkpoint is not None and options.from_hf is None:
            source = checkpoint_in(options.checkpoint, "--checkpoint")
            export(source, options.out, options.license, options.replace)
        elif options.from_hf is not None and options.checkpoint is None:
            source = options.from_hf
            import_hf(source, options.out, options.replace)
        else:
            raise ValueError("give either --checkpoint, to export, or --from_hf, to import")
    except SystemExit as answered:  # after --help
        return int(answered.code or 0)
    except Exception as error:
        log.error("\n".join(complaints(error)))
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"Wrote {options.out} from {source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
