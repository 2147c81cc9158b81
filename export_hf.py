"""Turn a checkpoint of train.py into a folder that Hugging Face's transformers loads, and back.

    python export_hf.py --checkpoint out/gpt2 --out hf/gpt2
    python export_hf.py --checkpoint out/gpt2 --out gpt2.gguf
    python export_hf.py --from_hf hf/gpt2 --out imported.pt

The folder holds weights (safetensors, the tied head once), configuration, vocabulary and a model
card written from the run's own files; `AutoModelForCausalLM` and `AutoTokenizer` load it without a
network. The GGUF file is for llama.cpp and what stands on it (Ollama, LM Studio, GPT4All). Both
have the trained context alone: positions that no step has trained are left out. The way back makes
a checkpoint of weights alone, for sample.py and `train.py --init_from`. transformers is not needed.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path, PureWindowsPath
from types import ModuleType
from typing import Any, Literal

from parts.startup import packages_of

with packages_of("export_hf.py", __name__):
    import numpy as np
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load, save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models

    from parts.commandline import read_flags
    from parts.compute.device import complaints
    from parts.flags import Config
    from parts.recipe import decide
    from parts.report.reader import growing_text
    from parts.report.sections import in_markdown
    from parts.run import checkpoint as checkpoints
    from parts.run.directory import is_protected, make_folder, new_folder, read_json, replacing
    from parts.run.layout import RunPaths, SampleBlock, sample_blocks
    from parts.run.screen import log, say, speaking
    from parts.text import vocabulary as vocabularies
    from parts.text.files import read_text

FIRST_WORDS = "Once upon a time"
SAME = {  # what transformers may vary and train.py does not
    **dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5),
    **dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False),
    **dict(tie_word_embeddings=True, add_cross_attention=False),
}
IMPORTED = ("config.json", "model.safetensors", "tokenizer.json")
SHORT = 400  # characters of the sample in the card
WINDOW, CORPUS = "training loss (window)", "corpus loss, nats per token"
RECITES = 0.5  # nats per token: below it most of what a model writes stands in its text
NO_LICENSE = "unknown"  # the Hub's word for it
HUB_LICENSES = "https://huggingface.co/docs/hub/repositories-licenses"
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) in transformers' Conv1D

CARD = """---
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

name = "USER/NAME"  # or the path of this folder
tokenizer, model = (kind.from_pretrained(name) for kind in (AutoTokenizer, AutoModelForCausalLM))
ids = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_length={context})[0], skip_special_tokens=True))
```

Versions tried: transformers {versions}.

{sample}{rights}**Use.** For looking at how a language model learns. {origin} is no source of facts.

**Memorisation.** {memory}

**Length.** The model was trained on {context} tokens at a time, and this is its context: prompt and
continuation together may have {context} tokens.
"""
SAMPLE = """**What the run wrote** at step {step:,}, the prompt first:

{fence}text
{text}
{fence}

"""
TRIED = "4.44.2, 4.46.3, 4.57.6, 5.0.0 and 5.24.0"
RIGHTS = f"""**Licence.** None is set yet. What others may do with this model depends on the rights
in what it was trained on. Before you publish it, set `license:` in the first lines of this file to
one of the [Hub's identifiers]({HUB_LICENSES}),
or export it with `--license`.

"""
RECITED = """A loss of {:.2f} nats per token on its own text means that the model recites it: what
it writes is largely copied from there, with whatever rights and private matters that text has."""
NOT_MEASURED = """It may repeat passages of what it was trained on; how much of its text is copied
has not been measured."""


@dataclass(frozen=True)
class Options:
    """Flags of the command line."""

    out: Path
    """folder to make, or a file NAME.gguf; with --from_hf the checkpoint to write"""
    checkpoint: Path | None = None
    """what to export: a run directory, for its best.pt, or a checkpoint"""
    from_hf: Path | None = None
    """folder to import instead: a GPT-2 with a byte-level vocabulary"""
    license: str = NO_LICENSE
    """for the model card, as the Hub spells it: mit, cc0-1.0; the rights in the text decide"""
    gguf_type: Literal["f32", "f16"] = "f32"
    """numbers in a .gguf: f32 as trained, f16 for matrices in half the size"""
    replace: bool = False
    """write over an earlier export, also over an edited card; with --from_hf an earlier import"""


class Source:
    """A checkpoint to export. Raises OSError or ValueError."""

    def __init__(self, path: Path):
        self.checkpoint = checkpoints.load_checkpoint(path, "--checkpoint")
        self.config = Config.from_dict(self.checkpoint["config"])
        self.context: int = self.checkpoint["trained_context"]
        self.vocabulary = in_full(vocabularies.saved_tokenizer(self.checkpoint))
        self.end = self.vocabulary.eot_token
        self.ids = dict(sorted(self.vocabulary.inner.get_vocab().items(), key=itemgetter(1)))

    def take_weights(self) -> dict[str, torch.Tensor]:
        """The weights, given away once, with the positions that were trained: the others are noise,
        and many tools offer whatever is there."""
        model = self.checkpoint.pop("model")
        model["wpe.weight"] = model["wpe.weight"][: self.context]
        return model


def in_full(tokenizer: vocabularies.Tokenizer) -> vocabularies.OwnVocabulary:
    """A vocabulary in the form of a tokenizer.json, GPT-2's too."""
    if isinstance(tokenizer, vocabularies.OwnVocabulary):
        return tokenizer
    folder = vocabularies.vocabulary_folder()
    files = (folder / "encoder.json", folder / "vocab.bpe")
    gpt2 = Tokenizer(models.BPE.from_file(*map(str, files)))
    gpt2.pre_tokenizer = vocabularies.BYTE_LEVEL
    gpt2.decoder = decoders.ByteLevel()
    end = AddedToken(vocabularies.DOCUMENT_END, special=True, normalized=False)
    gpt2.add_special_tokens([end])
    return vocabularies.OwnVocabulary(gpt2.to_str(), "GPT-2's vocabulary")


# ---------------------------------------------------------------------------------------------
# To Hugging Face
# ---------------------------------------------------------------------------------------------


def export(path: Path, out: Path, license: str) -> None:
    """Write the folder, which appears when it is whole, also over an earlier export. Raises OSError
    or ValueError."""
    source = Source(path)
    checkpoint = source.checkpoint
    context = source.context
    end = source.end
    results, blocks = told_by_run(path, checkpoint["corpus_sha256"])
    measured = losses(checkpoint, source.config, results)
    sample = sample_of(blocks, checkpoint["step"])
    generation: dict[str, Any] = dict(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    generation |= dict(do_sample=True, temperature=0.9, top_k=50, max_length=context)
    encoding: dict[str, Any] = dict(tokenizer_class="PreTrainedTokenizerFast")
    encoding |= dict(model_max_length=context, add_prefix_space=False)
    special = ("bos_token", "eos_token", "unk_token", "pad_token")
    encoding |= dict.fromkeys(special, vocabularies.DOCUMENT_END)
    encoding |= dict(clean_up_tokenization_spaces=False)
    # Or transformers 4.46 and 4.57 give token_type_ids, and GPT-2 then adds wte[0] everywhere.
    encoding |= dict(model_input_names=["input_ids", "attention_mask"])
    texts = {
        "config.json": json.dumps(hf_config(source.config, end, context), indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(encoding, indent=2) + "\n",
        "tokenizer.json": source.vocabulary.content,
        "vocab.json": json.dumps(source.ids, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *source.vocabulary.merges, ""]),
        "prompts.json": json.dumps(beginnings(blocks), ensure_ascii=False) + "\n",
        "README.md": model_card(checkpoint, source.config, measured, license, sample),
    }
    if out.is_file():
        raise FileExistsError(f"--out {out} is a file: name a folder, or NAME.gguf")
    present = {file.name for file in out.glob("*")}
    if foreign := present - {"model.safetensors", *texts}:
        problem = f"{min(foreign)} is of no export: move it away, or choose another folder"
        raise FileExistsError(f"--out {out}: {problem}")
    weights = hf_weights(source.take_weights())
    with writing(out), new_folder(out) as folder:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8", newline="\n")
        # Safetensors makes a file that only its owner may read.
        shutil.copymode(folder / "config.json", folder / "model.safetensors")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Say what it means when the disk refuses. Raises OSError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or error
        remedy = "free room there, or choose another place"
        if isinstance(error, PermissionError):
            remedy = "choose a place where you may write"
        raise OSError(f"--out {out} cannot be written ({cause}): {remedy}") from error


def told_by_run(checkpoint: Path, corpus_sha256: str) -> tuple[dict, list[SampleBlock]]:
    """Results and samples of the run that a checkpoint lies in, if that trained on this text."""
    run = RunPaths.around(checkpoint.resolve())
    corpus = read_json(run.config_json).get("corpus")
    if not isinstance(corpus, dict) or corpus.get("sha256") != corpus_sha256:
        return {}, []
    return read_json(run.results_json), sample_blocks(growing_text(run.samples_txt))


def beginnings(blocks: list[SampleBlock]) -> list[str]:
    """Prompts in the manner of the text, for space/app.py: that of the last samples, and their
    lines that end with a colon."""
    if not blocks:
        return [FIRST_WORDS]
    prompt, _ = blocks[-1].first_pair()
    lines = blocks[-1].texts.splitlines()
    speakers = [f"{line}\n" for line in lines if line.endswith(":") and not line.isupper()]
    found = dict.fromkeys([prompt, *speakers])
    return [text for text in found if text][:5] or [FIRST_WORDS]


def sample_of(blocks: list[SampleBlock], step: int) -> str:
    """A sample for the card, cut short, of these weights or the nearest before; perhaps none."""
    blocks = [block for block in blocks if block.step <= step]
    if not blocks:
        return ""
    _, text = blocks[-1].first_pair()
    text = text if len(text) <= SHORT else text[:SHORT].rpartition(" ")[0] + " ..."
    longest = max(map(len, re.findall("`+", text)), default=0)
    return SAMPLE.format(step=blocks[-1].step, text=text, fence="`" * max(3, longest + 1))


def hf_weights(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in transformers' layout, taken out of `model`, so that none is held twice.

    Their names are those of OpenAI's GPT-2 on the Hub, without the `transformer.` before them that
    save_pretrained writes: all tools that were tried read these, and mlx-lm no others.
    """
    return {name: transposed(name, model.pop(name)) for name in list(model)}


def transposed(name: str, value: torch.Tensor) -> torch.Tensor:
    """A weight in the other program's layout; there and back are the same."""
    return (value.T if name.endswith(TRANSPOSED) else value).contiguous()


def hf_config(config: Config, end: int, context: int) -> dict:
    """The model's shape in transformers' words, with so many positions."""
    c = config
    words: dict[str, Any] = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2")
    words |= dict(vocab_size=c.vocab_size, n_positions=context, n_ctx=context)
    words |= dict(n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head)
    words |= dict(activation_function="gelu_new", layer_norm_epsilon=1e-5)
    words |= dict(initializer_range=c.init_std)
    words |= dict(resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout)
    words |= dict(bos_token_id=end, eos_token_id=end, tie_word_embeddings=True, dtype="float32")
    return words


def losses(checkpoint: dict, config: Config, results: dict) -> dict[str, float]:
    """What was measured of these very weights; `results` speaks of the run's last step."""
    found: dict[str, float | None] = {}
    if results.get("final_step") == checkpoint["step"]:
        found = {WINDOW: results.get("window_loss"), CORPUS: results.get("corpus_loss")}
        if found[CORPUS] is not None:  # the run was over, and all was measured at its last step
            found["validation loss"] = results.get("val_loss")
            found["bits per byte"] = results.get("bits_per_byte")
    if "loss" in checkpoint:
        found["validation loss" if config.validates else WINDOW] = checkpoint["loss"]
    return {name: value for name, value in found.items() if isinstance(value, float)}


def without_folders(*paths: Path | str) -> str:
    """File names for the card, which tells nobody where they lay. Strings are of either system."""
    names = [path.name if isinstance(path, Path) else PureWindowsPath(path).name for path in paths]
    return in_markdown(", ".join(names))


def model_card(
    checkpoint: dict, config: Config, measured: dict[str, float], license: str, sample: str = ""
) -> str:
    """What the model is, as far as its checkpoint and its losses tell."""
    context = checkpoint["trained_context"]
    text = without_folders(*config.input_file)
    c = replace(config, block_size=context)
    rows = {
        "parameters": f"{c.n_params:,}",
        "layers, heads, width": f"{c.n_layer}, {c.n_head}, {c.n_embd}",
        "trained context": f"{context} tokens",
        "vocabulary": f"{c.vocab_size:,} ({without_folders(c.tokenizer)})",
    }
    title = "GPT-2, imported"
    origin = "What these weights were trained on is not recorded here. The model"
    if checkpoint["corpus_sha256"]:
        step = f"{c.global_batch} x {c.seq_len} tokens a step"
        rows |= {
            "text": text,
            "SHA-256 of the text": checkpoint["corpus_sha256"],
            "tokens of the text": f"{checkpoint['corpus_tokens']:,}",
            "step of these weights": f"{checkpoint['step']:,}",
            "training": f"{c.optimizer}, {step}, peak rate {c.lr:g}, seed {c.seed}",
        }
        title = f"GPT-2 trained from scratch on {text}"
        origin = "The model was trained on this text alone, has had no safety training, and"
    if c.init_from is not None:
        start = without_folders(c.init_from)
        title = f"GPT-2 trained from the weights of {start} on {text}"
        origin = f"What {start} was trained on is not recorded here. The model"
    rows |= {name: f"{value:.6f}" for name, value in measured.items()}
    loss = measured.get(CORPUS, measured.get(WINDOW, RECITES))
    memory = RECITED.format(loss) if loss < RECITES else NOT_MEASURED
    rights = RIGHTS if license == NO_LICENSE else ""
    if context < config.block_size:
        rows["left out"] = f"positions {context + 1} to {config.block_size}, never trained"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    told = dict(title=title, table=table, origin=origin, memory=memory, rights=rights)
    return CARD.format(license=license, context=context, versions=TRIED, sample=sample, **told)


# ---------------------------------------------------------------------------------------------
# To llama.cpp
# ---------------------------------------------------------------------------------------------


def export_gguf(path: Path, out: Path, license: str, kind: str) -> int:
    """Write one file for llama.cpp, also over an earlier one, and return its context. Raises
    OSError or ValueError."""
    gguf = gguf_package()
    if out.exists() and not is_gguf_file(out):
        raise FileExistsError(f"--out {out} is no GGUF file: choose another name")
    source = Source(path)
    with writing(out):
        make_folder(out.parent, parents=True)
        with replacing(out, shared=True) as f, closing(gguf.GGUFWriter(f.name, "gpt2")) as writer:
            writer.add_name(out.stem)
            writer.add_license(license)
            fill_gguf(gguf, writer, source, kind == "f16")
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
    return source.context


def fill_gguf(gguf: ModuleType, writer: Any, source: Source, half: bool) -> None:
    """Hand a model to a writer of the package gguf: its shape, vocabulary and weights."""
    config, vocabulary = source.config, source.vocabulary
    types = [gguf.TokenType.NORMAL] * len(source.ids)
    for special in vocabulary.inner.get_added_tokens_decoder():
        types[special] = gguf.TokenType.CONTROL
    file_types = gguf.LlamaFileType
    writer.add_file_type(file_types.MOSTLY_F16 if half else file_types.ALL_F32)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(source.context)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(source.ids))
    writer.add_token_types(types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(source.end)
    writer.add_eos_token_id(source.end)
    writer.add_add_bos_token(False)
    for name, value in gguf_weights(gguf, source, half):
        writer.add_tensor(name, value)


def is_gguf_file(path: Path) -> bool:
    """Whether a path is a file that begins as the format does. Raises OSError."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def gguf_package() -> ModuleType:
    """The package that writes the format. Raises ValueError without it."""
    try:
        import gguf
    except ImportError as error:
        needed = f"--out NAME.gguf needs the package gguf ({error})"
        raise ValueError(f"{needed}: python -m pip install gguf") from error
    return gguf


def gguf_weights(
    gguf: ModuleType, source: Source, half: bool
) -> Iterator[tuple[str, "np.ndarray[Any, Any]"]]:
    """The weights under llama.cpp's names, the tied head also under its own: older ones need it.

    Vectors and positions stay f32, as llama.cpp's own converter has them.
    """
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, source.config.n_layer)
    model = source.take_weights()
    for name in list(model):
        value = model.pop(name).float()
        owner, _, part = name.rpartition(".")
        if half and value.ndim == 2 and owner != "wpe":
            value = value.half()
            if not value.isfinite().all():
                raise ValueError(f"--gguf_type f16 cannot hold {name}: give --gguf_type f32")
        yield f"{names[f'transformer.{owner}']}.{part}", value.numpy()
        if owner == "wte":
            yield "output.weight", value.numpy()


# ---------------------------------------------------------------------------------------------
# And back
# ---------------------------------------------------------------------------------------------


def import_hf(folder: Path, out: Path) -> None:
    """Write a checkpoint of weights alone, also over an earlier one. Raises OSError, or ValueError
    for what is no such GPT-2."""
    if out.exists() and checkpoints.load_checkpoint(out, "--out")["corpus_sha256"]:
        raise FileExistsError(f"--out {out} is the checkpoint of a run: choose another file")
    where = f"--from_hf {folder}"
    values = read_config(folder, where)
    text = read_text(folder / "tokenizer.json", "--from_hf")
    vocabulary = vocabularies.OwnVocabulary(text, f"{where}: the file tokenizer.json")
    gpt2 = in_full(vocabularies.load_tokenizer())
    is_gpt2 = vocabulary.inner.get_vocab() == gpt2.inner.get_vocab()
    content = "" if is_gpt2 else vocabulary.content
    tokenizer = "gpt2" if is_gpt2 else (folder / "tokenizer.json").as_posix()
    try:
        positions = values["n_positions"]
        context = read_json(folder / "tokenizer_config.json").get("model_max_length")
        if type(context) is not int or not 1 <= context <= positions:
            context = positions
        shape = {name: values[name] for name in ("n_layer", "n_head", "n_embd")}
        flags = dict(block_size=positions, seq_len=context, device="cpu", tokenizer=tokenizer)
        config = decide(shape | flags, vocab_size=vocabulary.n_vocab)
        weights = load((folder / "model.safetensors").read_bytes())  # not each disk can map it
        head = weights.pop("lm_head.weight", None)
        model = {}
        for name, value in weights.items():
            short = name.removeprefix("transformer.")
            if not short.endswith((".attn.bias", ".masked_bias")):
                model[short] = transposed(short, value.float())
        if head is not None and not torch.equal(head.float(), model["wte.weight"]):
            tied = "and the head of GPT-2 is its embedding wte"
            raise ValueError(f"{where} has a head of its own, {tied}; choose another model")
        fits = len(model["wte.weight"]) == values["vocab_size"]
        # Some models have padding behind their vocabulary.
        model["wte.weight"] = model["wte.weight"][: vocabulary.n_vocab]
    except (KeyError, TypeError, SafetensorError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise ValueError(f"{where} is incomplete or damaged ({cause})") from error
    checkpoint = {
        "format": checkpoints.CHECKPOINT_FORMAT,
        "config": config.as_dict(),
        "step": 0,
        "trained_context": context,
        "model": model,
        "tokenizer": dict(name=tokenizer, n_vocab=config.vocab_size, content=content),
        **dict(corpus_sha256="", corpus_tokens=0, val_sha256=""),
    }
    if not fits or not checkpoints.is_sound(checkpoint):
        described = "not those that config.json and tokenizer.json describe, or not finite"
        raise ValueError(f"{where}: the weights are {described}")
    with writing(out):
        make_folder(out.parent, parents=True)
        checkpoints.write_checkpoint(out, checkpoint)


def read_config(folder: Path, where: str) -> dict:
    """The config.json of a GPT-2. Raises FileNotFoundError or ValueError for another folder."""
    if folder.is_file():
        raise FileNotFoundError(f"{where} is a file: name the folder that holds it")
    if not folder.is_dir():  # perhaps meant is a name of the Hub, which looks like one
        name = folder.name if folder.name.startswith("gpt2-") else "gpt2"
        command = f"hf download openai-community/{name} {' '.join(IMPORTED)} --local-dir {name}"
        raise FileNotFoundError(
            f"{where}: no such folder; download it (pip install huggingface_hub) with: {command} ; "
            f"then give --from_hf {name}"
        )
    for name in IMPORTED:
        if not (folder / name).is_file():
            needed = f"{', '.join(IMPORTED)}, as save_pretrained writes them"
            if (folder / "model.safetensors.index.json").is_file():
                needed += ' with max_shard_size="100GB"'
            raise FileNotFoundError(f"{where} has no {name}: needed are {needed}")
    values = read_json(folder / "config.json")
    if not values:
        raise ValueError(f"{where}: config.json is empty or no JSON in UTF-8: download it again")
    for name, value in SAME.items():
        if values.get(name, value) != value:
            problem = f"config.json has {name} {values[name]!r}, and GPT-2 has {value!r}"
            raise ValueError(f"{where}: {problem}; choose another model")
    return values


def check_place(out: Path) -> None:
    """Raises ValueError or OSError for an --out that no export may replace."""
    if out == Path():
        raise ValueError("--out is empty or the current folder: name another path")
    if out.is_symlink() and not out.exists():
        raise FileNotFoundError(f"--out {out} is a link to nothing: choose another path")
    if is_protected(out):
        remedy = "make it writable, or choose another path"
        raise PermissionError(f"--out {out} is write-protected: {remedy}")


@speaking("export_hf.py")
def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0, 2 for bad input, 130 after Ctrl-C."""
    try:
        given = sys.argv[1:] if argv is None else argv
        options = read_flags(Options, given, "export_hf.py", __doc__)
        out, source = options.out, options.checkpoint or options.from_hf
        check_place(out)
        if out.is_symlink():
            out = out.resolve()  # what it points to is replaced, and the link stays
        if source is None or (options.checkpoint and options.from_hf):
            raise ValueError("give either --checkpoint, to export, or --from_hf, to import")
        if out.exists() and not options.replace:
            raise FileExistsError(f"--out {out} is there already: give --replace, or another --out")
        if options.from_hf and options.license != NO_LICENSE:
            raise ValueError("--license is for a model card: leave it out with --from_hf")
        if not re.fullmatch(r"[a-z][a-z0-9.-]*", options.license):
            known = f"the Hub's, such as mit, cc0-1.0, other: see {HUB_LICENSES}"
            raise ValueError(f"--license {options.license!r} is none of {known}")
        is_gguf = options.out.suffix.lower() == ".gguf"
        if options.gguf_type == "f16" and not is_gguf:
            raise ValueError("--gguf_type f16 is for a GGUF file: give --out NAME.gguf")
        if options.checkpoint:
            source = checkpoints.checkpoint_in(source, "--checkpoint")
        elif is_gguf:
            raise ValueError(f"--out {out}: a GGUF file is made of a --checkpoint; import it first")
        limit = ""
        if is_gguf:
            context = export_gguf(source, out, options.license, options.gguf_type)
            limit = f"; it has a context of {context} tokens: llama-cli -m {out} -c {context}"
        elif options.checkpoint:
            export(source, out, options.license)
        else:
            import_hf(source, out)
        say(f"Wrote {options.out} from {source}{limit}")
    except Exception as error:
        log.error("\n".join(complaints(error)))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
