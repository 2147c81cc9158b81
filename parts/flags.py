"""Each flag once: its type, range, default and help; what cannot be together; the presets."""

import math
import os
import re
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

DEMO_CORPUS = Path("pydoc_data.topics")  # the language reference that ships inside every Python
DEMO_PROMPT = "Every object has an identity, a type and a value."
VOCAB_SIZE = 50_257
Amp = Literal["auto", "off", "bf16", "fp16"]
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


@dataclass(frozen=True)
class ByDefault:
    """What the help says about a default that is no constant."""

    words: str


@dataclass(frozen=True)
class Between:
    """The inclusive range of values a numeric flag accepts; NaN lies in no range."""

    low: float
    high: float


@dataclass(frozen=True)
class TextFlags:
    """What is trained on."""

    input_file: tuple[Path, ...] = (Path("data/input.txt"),)
    """UTF-8 texts to train on: files, folders of .txt files, globs (pydoc_data.topics: what ships with Python)"""
    tokenizer: str = "gpt2"
    """gpt2; bpe:N for N tokens learned from the text; or a tokenizer.json"""
    max_tokens: Annotated[int | None, Between(0, 10**12)] = None
    """train on the first N tokens only; 0: all. Default 0 (1,500 for pydoc_data.topics)"""
    cache_dir: Path = Path("data/cache")
    """where the token ids of large or several texts are kept between runs"""


@dataclass(frozen=True)
class RunFlags:
    """Where the run lies, and what it starts from."""

    preset: Literal["write", "demo", "small", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = (
        "gpt2"
    )
    """named set of defaults, which any other flag overrides. write: new text from your text, in minutes; its defaults
    follow from the text, and are shown for one of 1 MB"""
    out_dir: Path | None = None
    """run directory; by default out/PRESET, and out/PRESET-NAME for a text that is not the preset's own"""
    resume: str = "auto"
    """auto: continue the run in out_dir, if any, with its flags; never: move it aside, start anew; or a last.pt to
    continue from"""
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

    steps: Annotated[int | None, Between(1, 10**9), ByDefault("follows from the text")] = None
    """optimizer updates at most"""
    batch_size: Annotated[int, Between(1, 65_536)] = 32
    """slices in a batch; a step learns from batch_size x grad_accum of them"""
    grad_accum: Annotated[int, Between(1, 65_536)] = 1
    """batches in a step; half the batch_size and twice the grad_accum is the same step in less memory"""
    micro_batch: Annotated[int | None, Between(1, 65_536), ByDefault("decided at the start")] = None
    """slices computed at once, which changes memory and speed but never the step; by default batch_size, on a CPU what
    makes 2,048 tokens; fewer when memory runs out"""
    seq_len: Annotated[int, Between(1, 65_536)] = 128
    """tokens in one slice"""
    mixed_steps: Annotated[int | None, Between(0, 10**9), ByDefault("80 % of the steps")] = None
    """in the first N steps, cut three of every four slices into quarters; 0: never"""
    slices: Literal["shuffled", "independent"] = "shuffled"
    """where they start: shuffled: in random order, pass after pass, each of which leaves no token out; independent:
    each anywhere"""
    lr: Annotated[float | None, Between(1e-12, 10)] = None
    """peak learning rate; by default 3.5e-3 with muon, 1e-3 with adamw"""
    min_lr: Annotated[float, Between(0, 10)] = 0.0
    """learning rate at decay_steps and after"""
    warmup_steps: Annotated[
        int | None, Between(0, 10**9), ByDefault("1/30 of decay_steps with muon, 1/10 with adamw")
    ] = None
    """steps of linear warm-up"""
    decay_steps: Annotated[int | None, Between(1, 10**9), ByDefault("the last step")] = None
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
    beta2: Annotated[float | None, Between(0, 0.999999)] = None
    """decay of AdamW's mean of squared gradients; by default 0.99 with muon, 0.95 with adamw"""
    clip_grad: Annotated[float, Between(0, 1e9)] = 1.0
    """largest global gradient norm, larger ones are scaled down; 0: no clipping"""


@dataclass(frozen=True)
class StoppingFlags:
    """When the run ends before its last step."""

    target_loss: Annotated[float, Between(0, 100)] = 0.099999
    """stop when window_loss and then the loss on random slices are at or below this; 0: run all steps"""
    target_window: Annotated[int, Between(1, 100_000)] = 20
    """step losses in window_loss; 1: the classic rule, which stops on the first low step and measures no random
    slices"""
    patience: Annotated[int, Between(0, 10**6)] = 0
    """stop after so many measurements in a row without a new lowest; 0: never"""


@dataclass(frozen=True)
class ValidationFlags:
    """Text that is held out."""

    val_fraction: Annotated[float, Between(0, 0.5)] = 0.0
    """part of the tokens, at their end, that is held out; 0: none"""
    val_file: tuple[Path, ...] = ()
    """texts to validate on instead"""
    eval_every: Annotated[int | None, Between(1, 10**9), ByDefault("1/20 of the steps")] = None
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
    threads: Annotated[int | None, Between(1, 4096), ByDefault("decided at the start")] = None
    """CPU threads; by default PyTorch's choice"""
    deterministic: bool = False
    """the same bits in every run on CUDA too, at the cost of speed; on a CPU they always are the same"""


@dataclass(frozen=True)
class ReportingFlags:
    """What is written, and how often."""

    log_every: Annotated[int, Between(1, 10**9)] = 10
    """steps between log lines and CSV rows"""
    save_every: Annotated[int, Between(1, 10**9)] = 100
    """steps between checkpoints"""
    sample_every: Annotated[
        int | None, Between(1, 10**9), ByDefault("1/10 of the steps, at least 10")
    ] = None
    """steps between text samples; the first one after half of them"""
    prompt: str = ""
    """start of sampled text; \\n, \\t, \\\\ and \\uXXXX are decoded; empty: the text's first words, or a sentence of
    the text that ships with Python"""
    num_prompts: Annotated[int, Between(0, 256)] = 2
    """samples drawn from the prompt each time; 0: none"""
    max_new_tokens: Annotated[int, Between(1, 65_536)] = 200
    """tokens added to the prompt"""
    top_k: Annotated[int, Between(0, 10**6)] = 50
    """sample among the k likeliest tokens; 0: among all"""
    temperature: Annotated[float, Between(0, 100)] = 0.9
    """divides the logits before sampling; 0: always the likeliest token"""
    tensorboard: bool = False
    """write TensorBoard events (pip install tensorboard), earlier steps included; a start without this flag empties
    them"""


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


class Origin(NamedTuple):
    """Where a value comes from, and why it is what it is."""

    source: From
    reason: str = ""


@dataclass(frozen=True)
class Computed(Flags):
    """What is computed instead of typed, beside the flags."""

    vocab_size: int = VOCAB_SIZE
    processes: int = 1
    origins: dict[str, Origin] = field(default_factory=dict, compare=False)  # of each flag


class Config(Computed):
    """The flags of a run as decided: none of these is `None`, once `choose_runtime` has had its say."""

    max_tokens: int
    out_dir: Path
    steps: int
    micro_batch: int
    lr: float
    beta2: float
    warmup_steps: int
    decay_steps: int
    mixed_steps: int
    eval_every: int
    sample_every: int
    threads: int

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
        """Everything about resolved flags, each in its range, that cannot be together, a sentence each."""
        return [
            *self.problems_of_out_dir(),
            *self.problems_of_texts(),
            *self.problems_of_shape(),
            *self.problems_of_batch(),
            *self.problems_of_schedule(),
        ]

    def problems_of_texts(self) -> list[str]:
        """What is wrong with the texts, their vocabulary and their validation split."""
        problems = []
        if not self.input_file or Path() in self.input_file:
            problems.append(
                "--input_file is empty or the current folder: name a text, or a folder with texts"
            )
        if Path() in self.val_file:
            problems.append(
                "--val_file is empty or the current folder: name a text, or a folder with texts"
            )
        if self.cache_dir == Path():
            problems.append(
                "--cache_dir is empty or the current folder: name a folder for token ids"
            )
        vocabulary = re.fullmatch(r"bpe:(\d{3,7})|gpt2|.+\.json", self.tokenizer)
        if not vocabulary or not 257 <= int(vocabulary[1] or 257) <= 10**6:
            problems.append(
                f"--tokenizer {self.tokenizer} is none of gpt2, bpe:N with N from 257 to 1,000,000, PATH.json"
            )
        if self.tokenizer != "gpt2" and DEMO_CORPUS in self.input_file:
            problems.append(
                f"{DEMO_CORPUS} goes with --tokenizer gpt2 only: name a text with --input_file"
            )
        if self.val_fraction and self.val_file:
            problems.append("--val_fraction and --val_file are two ways to validate: choose one")
        if self.patience and not self.validates:
            problems.append(
                f"--patience {self.patience} needs a validation split: --val_fraction or --val_file"
            )
        return problems

    def problems_of_shape(self) -> list[str]:
        """What is wrong with the shape of the model, and with its device."""
        problems = []
        if self.seq_len > self.block_size:
            problems.append(
                f"--seq_len {self.seq_len} exceeds --block_size {self.block_size}: lower the one or raise the other"
            )
        if self.n_embd % self.n_head:
            problems.append(f"--n_embd {self.n_embd} is not divisible by --n_head {self.n_head}")
        if self.n_params > 20e9:
            problems.append(
                f"a model of {self.n_params:,} parameters is beyond one device: lower --n_embd or --n_layer"
            )
        if not DEVICE.fullmatch(self.device):
            problems.append(f"--device {self.device} is none of auto, cpu, cuda, cuda:N, mps")
        return problems

    def problems_of_batch(self) -> list[str]:
        """What is wrong with the slices of a step."""
        problems = []
        slices = f"--batch_size x --grad_accum = {self.global_batch}"
        if self.tokens_per_step > 2**26:
            problems.append(
                f"--batch_size x --grad_accum x --seq_len = {self.tokens_per_step:,} tokens per step exceeds {2**26:,}"
            )
        if self.global_batch % self.processes:
            nearest = [n * self.processes for n in (self.share, self.share + 1) if n]
            problems.append(
                f"{slices} slices do not divide evenly among {self.processes} processes: "
                f"{' or '.join(map(str, nearest))} would"
            )
        elif self.share % (self.micro_batch or 1):
            among = f", shared by {self.processes} processes" if self.processes > 1 else ""
            problems.append(f"--micro_batch {self.micro_batch} does not divide {slices}{among}")
        if self.mixed_steps and self.seq_len % 4:
            problems.append(
                f"--seq_len {self.seq_len} has no quarters: choose a multiple of 4, or --mixed_steps 0"
            )
        if self.mixed_steps and self.global_batch < 4:
            problems.append(
                f"{slices} slices are too few for --mixed_steps {self.mixed_steps}, which cuts three of four: "
                "choose 4 or more, or --mixed_steps 0"
            )
        return problems

    def problems_of_schedule(self) -> list[str]:
        """What is wrong with the steps and the learning rate."""
        problems = []
        if self.warmup_steps > self.decay_steps:
            default = " (--steps, if it is not given)" if self.decay_steps == self.steps else ""
            problems.append(
                f"--warmup_steps {self.warmup_steps} exceeds --decay_steps {self.decay_steps}{default}"
            )
        if self.mixed_steps > self.steps:
            problems.append(f"--mixed_steps {self.mixed_steps} exceeds --steps {self.steps}")
        if self.min_lr > self.lr:
            problems.append(f"--min_lr {self.min_lr} exceeds --lr {self.lr}")
        return problems

    def problems_of_out_dir(self) -> list[str]:
        """What is wrong with the name of the run directory, a sentence each."""
        if self.out_dir == Path():
            return ["--out_dir is empty or the current folder: name a folder for the run"]
        if any(
            len(os.fsencode(part) if sys.platform == "linux" else part) > 255
            for part in self.out_dir.parts
        ):
            return [
                f"--out_dir {brief(self.out_dir)}: a name over 255 letters (on Linux bytes); choose a shorter one"
            ]
        return []

    def as_dict(self) -> dict[str, str | int | float | list[str] | None]:
        """Plain values for JSON and checkpoints, without the origins; paths with forward slashes."""
        values = {k: v.as_posix() if isinstance(v, Path) else v for k, v in asdict(self).items()}
        del values["origins"]
        return values | {
            name: [path.as_posix() for path in getattr(self, name)]
            for name in ("input_file", "val_file")
        }

    def origins_as_dict(self) -> dict[str, dict[str, str]]:
        """Where the values come from, for JSON and checkpoints."""
        return {name: {"from": str(o.source), "why": o.reason} for name, o in self.origins.items()}

    @classmethod
    def from_dict(cls, values: dict, origins: dict | None = None) -> "Config":
        """The inverse of `as_dict` and `origins_as_dict`. Keys that are no flags are ignored, missing ones default."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        known.setdefault("mixed_steps", 0)  # younger than the oldest checkpoints
        known.setdefault("schedule", "linear")
        for name in ("cache_dir", "out_dir", "init_from"):
            if known.get(name) is not None:
                known[name] = Path(known[name])
        for name in known.keys() & {"input_file", "val_file"}:
            known[name] = tuple(map(Path, known[name]))
        known["origins"] = (
            {name: origin_of(o) for name, o in origins.items()} if isinstance(origins, dict) else {}
        )
        return cls(**known)


def origin_of(value: object) -> Origin:
    """An origin as a file has it; one that this program does not know counts as kept."""
    try:
        return Origin(From(value["from"]), str(value["why"]))  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return Origin(From.RUN)


def decided(config: Config, name: str, value: object, origin: Origin) -> Config:
    """The config with this value of a flag, and where it comes from."""
    changed: dict[str, Any] = {name: value}
    return replace(config, **changed, origins=config.origins | {name: origin})


def out_of_range(flags) -> list[str]:
    """Every numeric flag of a dataclass whose value its `Between` excludes, a sentence each."""
    return [
        f"--{field.name} {brief(value)} is outside {limit.low:,} to {limit.high:,}"
        for field in fields(flags)
        for limit in getattr(field.type, "__metadata__", ())
        if isinstance(limit, Between) and (value := getattr(flags, field.name)) is not None
        if not limit.low <= value <= limit.high
    ]


def brief(value: object) -> str:
    """A value as a message shows it: of a long one the beginning, of an empty one the quotes."""
    text = str(value)
    return f"{text[:40]}..." if len(text) > 80 else text or "''"


PRESETS: dict[str, dict] = {  # what is not constant stands in parts/recipe.py
    "write": dict(  # samples end before the trained context does: beyond it they take as long as the training
        n_layer=4, seq_len=128, dropout=0.1, target_loss=0.0, temperature=0.8, num_prompts=1, max_new_tokens=100,
    ),
    "demo": dict(
        input_file=(DEMO_CORPUS,), n_layer=2, n_head=2, n_embd=128, block_size=128, seq_len=128, batch_size=4,
        lr=4e-3, init_std=0.07, save_every=200, num_prompts=1, temperature=0.0, max_new_tokens=69,
    ),
    "small": dict(n_layer=6, n_head=8, n_embd=512, block_size=512),
    "gpt2": {},
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}  # fmt: skip


def names(inputs: tuple[Path, ...]) -> str:
    """Texts as messages and files call them."""
    return ", ".join(path.as_posix() for path in inputs)
