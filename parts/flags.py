"""Each flag once: its type, range, default and help; what cannot be together; the presets."""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

DEMO_CORPUS = Path("pydoc_data.topics")  # the language reference that ships inside every Python
DEMO_PROMPT = "Every object has an identity, a type and a value."
VOCAB_SIZE = 50_257
Amp = Literal["auto", "off", "bf16", "fp16"]
Preset = Literal["write", "demo", "small", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
OPEN: Any = None  # the default of what parts/recipe.py or parts/compute/device.py decides


@dataclass(frozen=True)
class Between:
    """The inclusive range of values a numeric flag accepts; NaN lies in no range."""

    low: float
    high: float


# In a flag's type stand its range, and what the help says about a default that is no constant.


@dataclass(frozen=True)
class TextFlags:
    """What is trained on."""

    input_file: tuple[Path, ...] = (Path("data/input.txt"),)
    """UTF-8 texts: files, folders of .txt files, globs; pydoc_data.topics: ships with Python"""
    tokenizer: str = "gpt2"
    """gpt2; bpe:N for N tokens learned from the text; or a tokenizer.json"""
    max_tokens: Annotated[int, Between(0, 10**12), "0; 1,500 for pydoc_data.topics"] = OPEN
    """train on the first N tokens only; 0: all"""
    cache_dir: Path = Path("data/cache")
    """where the token ids of large or several texts are kept between runs"""


@dataclass(frozen=True)
class RunFlags:
    """Where the run lies, and what it starts from."""

    preset: Preset = "gpt2"
    """named set of defaults, which any other flag overrides; write: new text from your text in
    minutes; its defaults follow from the text, and the help shows those for 1 MB"""
    out_dir: Path = OPEN
    """run directory: out/PRESET, or out/PRESET-NAME for a text that is not the preset's own"""
    resume: str = "auto"
    """auto: continue the run in out_dir, if any, with its flags; never: move it aside, start anew;
    or a last.pt to continue from"""
    init_from: Path | None = None
    """run directory or checkpoint whose weights a new run starts from, with a fresh optimizer"""
    seed: Annotated[int, Between(0, 2**63 - 1)] = 1337
    """of weights, slices, dropout and sampled text, each with a stream of its own"""
    dry_run: bool = False
    """say what would happen, do two steps for time and memory, and write no file of a run"""


@dataclass(frozen=True)
class ModelFlags:
    """GPT-2's shape; --preset sets it."""

    n_layer: Annotated[int, Between(1, 1024)] = 12
    """transformer blocks"""
    n_head: Annotated[int, Between(1, 1024)] = 12
    """attention heads; must divide n_embd"""
    n_embd: Annotated[int, Between(1, 65_536)] = 768
    """width of the model"""
    block_size: Annotated[int, Between(1, 65_536)] = 1024
    """positions the model has; seq_len may be shorter"""
    dropout: Annotated[float, Between(0, 0.99)] = 0.0
    """probability of dropping an activation while training"""
    init_std: Annotated[float, Between(1e-6, 1)] = 0.02
    """standard deviation of the initial weights (GPT-2: 0.02, which suits a width of 768)"""


@dataclass(frozen=True)
class BatchFlags:
    """What a step consists of, and its learning rate."""

    steps: Annotated[int, Between(1, 10**9), "follows from the text"] = OPEN
    """optimizer updates at most"""
    batch_size: Annotated[int, Between(1, 65_536)] = 32
    """slices in a batch; a step learns from batch_size x grad_accum of them"""
    grad_accum: Annotated[int, Between(1, 65_536)] = 1
    """batches in a step; half the batch_size and twice the grad_accum: the same in less memory"""
    micro_batch: Annotated[int, Between(1, 65_536), "batch_size; 2,048 tokens on a CPU"] = OPEN
    """slices computed at once: changes memory and speed, not the step; less if memory runs out"""
    seq_len: Annotated[int, Between(1, 65_536)] = 128
    """tokens in one slice"""
    mixed_steps: Annotated[int, Between(0, 10**9), "80 % of the steps"] = OPEN
    """in the first N steps, cut three of every four slices into quarters; 0: never"""
    slices: Literal["shuffled", "independent"] = "shuffled"
    """where they start. shuffled: in random order, pass after pass; independent: anywhere"""
    lr: Annotated[float, Between(1e-12, 10)] = OPEN
    """peak learning rate; by default 3.5e-3 with muon, 1e-3 with adamw"""
    min_lr: Annotated[float, Between(0, 10)] = 0.0
    """learning rate at decay_steps and after"""
    warmup_steps: Annotated[int, Between(0, 10**9), "1/30 of decay_steps; adamw: 1/10"] = OPEN
    """steps of linear warm-up"""
    decay_steps: Annotated[int, Between(1, 10**9), "the last step"] = OPEN
    """step at which min_lr is reached"""
    schedule: Literal["cosine", "linear"] = "cosine"
    """half a cosine or a line by which the learning rate falls from lr to min_lr"""


@dataclass(frozen=True)
class OptimizerFlags:
    """How a step changes the weights."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the matrices of the blocks, AdamW for all else; adamw: AdamW for all"""
    weight_decay: Annotated[float, Between(0, 10)] = 0.1
    """decay of matrices and embeddings, times the learning rate, each step"""
    beta1: Annotated[float, Between(0, 0.999999)] = 0.9
    """decay of AdamW's mean of gradients"""
    beta2: Annotated[float, Between(0, 0.999999)] = OPEN
    """decay of AdamW's mean of squared gradients; by default 0.99 with muon, 0.95 with adamw"""
    clip_grad: Annotated[float, Between(0, 1e9)] = 1.0
    """largest global gradient norm, larger ones are scaled down; 0: no clipping"""


@dataclass(frozen=True)
class StoppingFlags:
    """When the run ends before its last step."""

    target_loss: Annotated[float, Between(0, 100)] = 0.099999
    """stop when window_loss, then the loss on random slices, is at most this; 0: run all steps"""
    target_window: Annotated[int, Between(1, 100_000)] = 20
    """step losses in window_loss; 1: the first low step stops, without a check on random slices"""
    patience: Annotated[int, Between(0, 10**6)] = 0
    """stop after so many measurements in a row without a new lowest; 0: never"""


@dataclass(frozen=True)
class ValidationFlags:
    """Text that is held out."""

    val_fraction: Annotated[float, Between(0, 0.5)] = 0.0
    """part of the tokens, at their end, that is held out; 0: none"""
    val_file: tuple[Path, ...] = ()
    """texts to validate on instead"""
    eval_every: Annotated[int, Between(1, 10**9), "1/20 of the steps"] = OPEN
    """steps between measurements of the validation loss"""


@dataclass(frozen=True)
class DeviceFlags:
    """What it computes on; `auto` is decided at the start, with a reason in the log."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    amp: Amp = "auto"
    """precision of matrix products; weights and optimizer stay in fp32"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; without a working compiler the run goes on without, and says why"""
    threads: Annotated[int, Between(1, 4096), "PyTorch's choice"] = OPEN
    """CPU threads"""
    deterministic: bool = False
    """the same bits in every run on CUDA too, which is slower; on a CPU they always are"""


@dataclass(frozen=True)
class ReportingFlags:
    """What is written, and how often."""

    log_every: Annotated[int, Between(1, 10**9)] = 10
    """steps between log lines and CSV rows"""
    save_every: Annotated[int, Between(1, 10**9)] = 100
    """steps between checkpoints"""
    sample_every: Annotated[int, Between(1, 10**9), "1/10 of the steps, at least 10"] = OPEN
    """steps between text samples; the first one after half of them"""
    prompt: str = ""
    """start of sampled text; \\n, \\t, \\\\ and \\uXXXX are decoded; empty: the text's first words,
    or a sentence of the text that ships with Python"""
    num_prompts: Annotated[int, Between(0, 256)] = 2
    """samples drawn from the prompt each time; 0: none"""
    max_new_tokens: Annotated[int, Between(1, 65_536)] = 200
    """tokens added to the prompt"""
    top_k: Annotated[int, Between(0, 10**6)] = 50
    """sample among the k likeliest tokens; 0: among all"""
    temperature: Annotated[float, Between(0, 100)] = 0.9
    """divides the logits before sampling; 0: always the likeliest token"""
    tensorboard: bool = False
    """write TensorBoard events (pip install tensorboard), earlier steps included; a start without
    this flag empties them"""


@dataclass(frozen=True)
class Flags(
    ReportingFlags,
    DeviceFlags,
    ValidationFlags,
    StoppingFlags,
    OptimizerFlags,
    BatchFlags,
    ModelFlags,
    RunFlags,
    TextFlags,
):
    """Every flag. `None` and "auto" stand for what parts/recipe.py decides."""


class From(StrEnum):
    """Where the value of a flag comes from."""

    TYPED = "typed"
    RUN = "kept from the run so far"
    PRESET = "preset"
    TEXT = "follows from the text"
    FLAGS = "follows from other flags"
    MACHINE = "this machine"
    MEMORY = "memory ran out"
    DEFAULT = "default"


BY_USER = (From.TYPED, From.RUN)  # typed at this start, or at an earlier one


class Origin(NamedTuple):
    """Where a value comes from, and why it is what it is."""

    source: From
    reason: str = ""


@dataclass(frozen=True)
class Config(Flags):
    """The flags of a run as decided, and what is computed instead of typed."""

    vocab_size: int = VOCAB_SIZE
    processes: int = 1
    origins: dict[str, Origin] = field(default_factory=dict, compare=False)  # of each flag

    @property
    def global_batch(self) -> int:
        """Slices in one step."""
        return self.batch_size * self.grad_accum

    @property
    def share(self) -> int:
        """Slices in one step of each process."""
        return self.global_batch // self.processes

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.seq_len

    def slice_lengths(self, step: int) -> tuple[int, ...]:
        """Tokens of the slices that a step trains on, of the shorter and of the whole ones."""
        return (self.seq_len // 4, self.seq_len) if step <= self.mixed_steps else (self.seq_len,)

    def whole_slices(self, step: int) -> int:
        """How many slices of a step are whole, those of all processes together."""
        return math.ceil(self.global_batch / 4) if step <= self.mixed_steps else self.global_batch

    @property
    def one_low_step_is_enough(self) -> bool:
        """Whether the classic rule holds: the first low step reaches the target, unchecked."""
        return self.target_window == 1

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
    def best_metric(self) -> str:
        """The loss by which weights are the best."""
        return "val_loss" if self.validates else "window_loss"

    def contradictions(self) -> list[str]:
        """What resolved flags, each in its range, cannot be together, a sentence each."""
        return [*self.problems_of_texts(), *self.problems_of_sizes()]

    def problems_of_texts(self) -> Iterator[str]:
        """What is wrong with paths, the vocabulary and the validation split."""
        if not self.input_file:
            yield "--input_file is empty: name a text, or a folder with texts"
        for name in ("input_file", "val_file", "cache_dir", "out_dir"):
            value = getattr(self, name)
            if value == Path() or (isinstance(value, tuple) and Path() in value):
                yield f"--{name} is empty or the current folder: name another path"
        vocabulary = re.fullmatch(r"bpe:(\d{3,7})|gpt2|.+\.json", self.tokenizer)
        if not vocabulary or not 257 <= int(vocabulary[1] or 257) <= 10**6:
            forms = "gpt2, bpe:N with N from 257 to 1,000,000, PATH.json"
            yield f"--tokenizer {self.tokenizer} is none of {forms}"
        if self.tokenizer != "gpt2" and DEMO_CORPUS in self.input_file:
            yield f"{DEMO_CORPUS} goes with --tokenizer gpt2 only: name a text with --input_file"
        if self.val_fraction and self.val_file:
            yield "--val_fraction and --val_file are two ways to validate: choose one"
        if self.patience and not self.validates:
            splits = "--val_fraction or --val_file"
            yield f"--patience {self.patience} needs a validation split: {splits}"

    def problems_of_sizes(self) -> Iterator[str]:
        """What is wrong with the model, its device, the slices of a step and the schedule."""
        if self.n_embd % self.n_head:
            remedy = "choose a --n_head that divides it"
            yield f"--n_embd {self.n_embd} is not divisible by --n_head {self.n_head}: {remedy}"
        if self.n_params > 20e9:
            size = f"{self.n_params:,} parameters"
            yield f"a model of {size} is beyond one device: lower --n_embd or --n_layer"
        if not DEVICE.fullmatch(self.device):
            yield f"--device {self.device} is none of auto, cpu, cuda, cuda:N, mps"
        limits = {"seq_len": "block_size", "warmup_steps": "decay_steps"}
        limits |= {"mixed_steps": "steps", "min_lr": "lr"}
        for name, limit in limits.items():
            value, most = getattr(self, name), getattr(self, limit)
            if value > most:
                yield f"--{name} {value} exceeds --{limit} {most}: lower the one or raise the other"
        slices = f"--batch_size x --grad_accum = {self.global_batch} slices"
        if self.tokens_per_step > 2**26:
            tokens = f"{self.tokens_per_step:,} tokens per step"
            yield f"--batch_size x --grad_accum x --seq_len = {tokens} exceeds {2**26:,}"
        if self.global_batch % self.processes:
            nearest = [n * self.processes for n in (self.share, self.share + 1) if n]
            remedy = f"{' or '.join(map(str, nearest))} would"
            yield f"{slices} do not divide evenly among {self.processes} processes: {remedy}"
        elif self.share % (self.micro_batch or 1):
            micro_batch = f"--micro_batch {self.micro_batch}"
            of_each = f"{self.share}, the slices of each process"
            yield f"{micro_batch} does not divide {of_each}: choose a divisor of it"
        if self.mixed_steps and self.seq_len % 4:
            remedy = "choose a multiple of 4, or --mixed_steps 0"
            yield f"--seq_len {self.seq_len} has no quarters: {remedy}"
        if self.mixed_steps and self.global_batch < 4:
            few = f"{slices} are too few for --mixed_steps {self.mixed_steps}"
            yield f"{few}, which cuts three of four: choose 4 or more, or --mixed_steps 0"

    def as_dict(self) -> dict[str, str | int | float | list[str] | None]:
        """Plain values for JSON and checkpoints, without the origins; paths as POSIX has them."""
        values = {k: v.as_posix() if isinstance(v, Path) else v for k, v in asdict(self).items()}
        for name in ("input_file", "val_file"):
            values[name] = [path.as_posix() for path in getattr(self, name)]
        del values["origins"]
        return values

    def origins_as_dict(self) -> dict[str, dict[str, str]]:
        """Where the values come from, for JSON and checkpoints."""
        return {name: {"from": str(o.source), "why": o.reason} for name, o in self.origins.items()}

    @classmethod
    def from_dict(cls, values: dict, origins: dict | None = None) -> "Config":
        """The inverse of `as_dict` and `origins_as_dict`; keys that are no flags are ignored.

        Raises KeyError, TypeError, AttributeError or ValueError for other contents.
        """
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        for name in known.keys() & {"cache_dir", "out_dir", "init_from"}:
            known[name] = None if known[name] is None else Path(known[name])
        for name in known.keys() & {"input_file", "val_file"}:
            known[name] = tuple(map(Path, known[name]))
        known["origins"] = {
            name: Origin(From(origin["from"]), origin["why"])
            for name, origin in (origins or {}).items()
        }
        return cls(**known)


def decided(config: Config, name: str, value: object, origin: Origin) -> Config:
    """The config with this value of a flag, and where it comes from."""
    changed: dict[str, Any] = {name: value}
    return replace(config, **changed, origins=config.origins | {name: origin})


def out_of_range(flags) -> list[str]:
    """The numeric flags of a dataclass whose value its `Between` excludes, a sentence each."""
    problems = []
    for flag in fields(flags):
        value = getattr(flags, flag.name)
        for limit in getattr(flag.type, "__metadata__", ())[:1]:
            if value is not None and not limit.low <= value <= limit.high:
                limits = f"{limit.low:,} to {limit.high:,}"
                problems.append(f"--{flag.name} {brief(value)} is outside {limits}")
    return problems


def brief(value: object) -> str:
    """A value as a message shows it: of a long one the beginning, of an empty one the quotes."""
    text = str(value)
    return f"{text[:40]}..." if len(text) > 80 else text or "''"


PRESETS: dict[str, dict[str, Any]] = {  # what is not constant stands in parts/recipe.py
    "write": {
        **dict(n_layer=4, seq_len=128, dropout=0.1, target_loss=0.0, temperature=0.8),
        **dict(num_prompts=1, max_new_tokens=100),  # beyond the trained context a sample is slow
    },
    "demo": {
        **dict(input_file=(DEMO_CORPUS,), n_layer=2, n_head=2, n_embd=128, block_size=128),
        **dict(seq_len=128, batch_size=4, lr=4e-3, init_std=0.07, save_every=200),
        **dict(num_prompts=1, temperature=0.0, max_new_tokens=69),
    },
    "small": dict(n_layer=6, n_head=8, n_embd=512, block_size=512),
    "gpt2": {},
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}


def text_names(paths: tuple[Path, ...]) -> str:
    """Texts as messages and files call them."""
    return ", ".join(path.as_posix() for path in paths)
