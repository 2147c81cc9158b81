"""Train a GPT-2 from scratch on one text file until a target training loss is reached.

    python train.py --preset demo                        # no GPU, no file: a minute on a laptop
    python train.py --input_file data/input.txt          # GPT-2 124M, one GPU
    python train.py --preset small                       # 45M parameters

Run the same command again and it continues where it stopped. Read from top to bottom, this file follows the data:
slices, model, optimizer and schedule, text and loss, Trainer (which learns), Saver (which writes), the loop, main.
What it stands on lies in parts/, each file with a promise of its own in its first line.

Shapes: B slices in a micro-batch, T tokens in a slice, C = n_embd channels, V vocabulary entries,
N tokens in the corpus. Losses are mean nats per token. A step is one optimizer update.

References:
- Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), and the
  released code, github.com/openai/gpt-2 (src/model.py)
- Hugging Face Transformers, GPT2LMHeadModel: the same weights give the same logits
- Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization" (AdamW), arXiv 1711.05101
- Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", and what
  parts/compute/muon.py names; parts/compute/kernels.py has its own
- Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3" (Philox)
"""

import logging
import math
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path

from parts.start import packages_of

with packages_of("train.py", __name__):
    import numpy as np
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

    from parts.commandline import decode_escapes
    from parts.compute.compiling import compile_proven
    from parts.compute.device import (
        autocast,
        configure_torch,
        first_words,
        for_sampling,
        is_out_of_memory,
        largest_divisor,
        peak_memory,
        release_memory,
    )
    from parts.compute.kernels import HeadLoss, attention, causal_attention, linear
    from parts.compute.muon import Muon
    from parts.compute.ranks import Ranks
    from parts.compute.signals import (
        Interrupted,
        Interruption,
        exit_code,
        look_for_signals,
        terminating,
    )
    from parts.flags import Config, From, Origin, decided
    from parts.progress import COMPLETE, Progress
    from parts.report import words
    from parts.report.provenance import launch_record
    from parts.report.steplog import StepLog, step_log
    from parts.report.tensorboard import shown
    from parts.report.verdict import how_to_continue, verdict
    from parts.run.background import Snapshot, Task, Writer
    from parts.run.checkpoint import (
        CHECKPOINT_FORMAT,
        STATE_BYTES,
        WEIGHT_BYTES,
        restore_optimizers,
        write_checkpoint,
    )
    from parts.run.directory import LogFile, RunDir, gigabytes, move, read_json, replacing
    from parts.run.layout import AT_CTRL_C
    from parts.run.screen import logging_to, speaking
    from parts.run.terminal import waiting
    from parts.setup import Setup, prepare, problems_of_all
    from parts.text.corpus import Corpus, loss_floor
    from parts.text.vocabulary import Tokenizer, encode_prompt, whole_characters

log = logging.getLogger("train")


# ---------------------------------------------------------------------------------------------
# Slices
# ---------------------------------------------------------------------------------------------

# Philox streams: (seed, pass) orders the slices of a pass, the others stand above every pass and step.
DROPOUT_STREAM, SAMPLES_STREAM, EVALUATION_STREAM = 2**61, 2**62, 2**63


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


def whole_and_quarters(slices: torch.Tensor, first: int) -> list[torch.Tensor]:
    """Of a step's slices (B, T + 1), the first being number `first`, every fourth; and the quarters of the others,
    (about 3 * B, T / 4 + 1), with the same inputs and targets, but without the text before them."""
    whole, length = torch.arange(first, first + len(slices)) % 4 == 0, slices.shape[1] // 4
    parts = slices[whole], slices[~whole].unfold(1, length + 1, length).flatten(0, 1)
    return [part for part in parts if len(part)]


def micro_batches(slices: torch.Tensor, n_tokens: int) -> tuple[torch.Tensor, ...]:
    """The slices in equal parts of at most so many tokens, as few as can be."""
    return slices.split(largest_divisor(len(slices), max(1, n_tokens // (slices.shape[1] - 1))))


@lru_cache(maxsize=2)  # a step may span two passes
def pass_starts(seed: int, number: int, n_starts: int, seq_len: int) -> np.ndarray:
    """Starts, int64, of the slices of one pass: every seq_len-th of a ring of all starts, from a random one on,
    in random order. So each start stays equally likely, and a pass leaves no token out."""
    words = random_words(seed, number, 1 + math.ceil(n_starts / seq_len))
    return (
        int(words[0] % np.uint64(n_starts)) + np.argsort(words[1:], kind="stable") * seq_len
    ) % n_starts


def covering_starts(seed: int, first: int, count: int, n_starts: int, seq_len: int) -> np.ndarray:
    """Starts of the run's slices number `first`, … `first + count - 1`, pass after pass."""
    per_pass = math.ceil(n_starts / seq_len)
    numbers = np.arange(first, first + count)
    parts = [
        pass_starts(seed, number, n_starts, seq_len)[
            numbers[numbers // per_pass == number] % per_pass
        ]
        for number in range(first // per_pass, (first + count - 1) // per_pass + 1)
    ]
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """x W' + b, (…, in_features) -> (…, out_features)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


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


@dataclass
class Past:
    """Keys and values of the tokens that one attention layer has seen, from the first position on."""

    slots: int
    length: int = 0  # slots in use
    keys: torch.Tensor | None = None  # (B, n_head, slots, head_dim)
    values: torch.Tensor | None = None

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store k and v behind what is there; q sees all up to its own position. All (B, n_head, T, head_dim)."""
        if self.keys is None or self.values is None:
            B, n_head, _, head_dim = k.shape
            self.keys, self.values = (
                k.new_zeros(B, n_head, self.slots, head_dim) for _ in range(2)
            )
        first, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, first : self.length], self.values[:, :, first : self.length] = k, v
        unseen = torch.ones(k.shape[2], self.length, dtype=torch.bool, device=q.device).triu(
            first + 1
        )
        return attention(
            q, self.keys[:, :, : self.length], self.values[:, :, : self.length], unseen
        )


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

        With one `Past` for each block, the tokens stand behind those that it holds, and see them.
        """
        first = pasts[0].length if pasts else 0
        end = first + tokens.shape[1]
        assert self.block_size >= end, f"{end} tokens exceed block_size {self.block_size}"
        x = self.wte(tokens) + self.wpe(torch.arange(first, end, device=tokens.device))
        x = F.dropout(x, self.dropout, self.training)
        for layer, block in enumerate(self.h):
            x = block(x, pasts[layer] if pasts else None)
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
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if config.optimizer == "muon":
        dtype = torch.bfloat16 if config.amp == "bf16" else torch.float32
        optimizers["muon"] = Muon(
            matrices, lr=config.lr, weight_decay=config.weight_decay, dtype=dtype
        )
    else:
        others += matrices
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizers["adamw"] = torch.optim.AdamW(
        [
            {"params": others, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
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
# Text and loss
# ---------------------------------------------------------------------------------------------

VAL_TOKENS = 2**15  # of the validation split that are measured


def generate(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, **options
) -> list[list[int]]:
    """The prompts with what `continuations` adds to them, without the `end`."""
    rows = [list(prompt) for prompt in prompts]
    for chosen in continuations(model, prompts, max_new_tokens, **options):
        for row, token in zip(rows, chosen, strict=True):
            if token != options.get("end"):
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
    end: int = -1,
) -> Iterator[list[int]]:
    """The next token of every prompt, max_new_tokens times; the prompts are equally long.

    A prompt that got the token `end` gets no other; once all have it, this stops (-1: never).
    `context` is the longest slice the model was trained on: positions beyond it are untrained, so each token
    depends on the `context` tokens before it. Each prompt has a (CPU) generator of its own. Temperature 0 takes
    the likeliest token; top_k 0 samples among all, top_p among the likeliest that make up this probability
    (Holtzman et al. 2020, arXiv 1904.09751).
    """
    tokens = torch.tensor(prompts, device=model.wte.weight.device)  # (B, T)
    pasts = [Past(context) for _ in model.h]
    ended = [False] * len(prompts)
    with evaluating(model):
        for _ in range(max_new_tokens):
            look_for_signals()
            logits = (
                model.logits(last_features(model, tokens, context, pasts))
                .float()
                .cpu()
                .nan_to_num()
            )  # (B, V)
            chosen = [
                end if over else choose(scores, temperature, top_k, top_p, g)
                for scores, g, over in zip(logits, generators, ended, strict=True)
            ]
            tokens = torch.cat([tokens, torch.tensor(chosen, device=tokens.device)[:, None]], 1)
            yield chosen
            ended = [token == end for token in chosen]
            if all(ended):
                return


def last_features(
    model: GPT, tokens: torch.Tensor, context: int, pasts: list[Past]
) -> torch.Tensor:
    """Hidden states (B, C) of the last of the tokens (B, T), which sees the `context` - 1 tokens before it.

    Up to the context, what the pasts hold is not computed again. Beyond it every token would stand at a new position
    each time, so all of them are.
    """
    if tokens.shape[1] <= context:
        return model.features(tokens[:, pasts[0].length :], pasts)[:, -1]
    return model.features(tokens[:, -context:])[:, -1]


def choose(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """A token by its logits (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits = logits.masked_fill(
            logits < logits.topk(min(top_k, len(logits))).values[-1], -math.inf
        )
    probabilities = ((logits - logits.max()).double() / temperature).softmax(
        -1
    )  # however low the temperature
    if top_p < 1:
        largest, order = probabilities.sort(descending=True)
        before = largest.cumsum(-1) - largest  # the probability of all likelier ones
        probabilities = torch.zeros_like(probabilities).scatter(
            0, order, largest.masked_fill(before >= top_p, 0.0)
        )
    return int(torch.multinomial(probabilities, 1, generator=generator))


def corpus_losses(
    model: GPT, tokens: np.ndarray, config: Config, step: int, first: int, end: int
) -> torch.Tensor:
    """Losses, float64 (end - first,), nats per token, of slices number `first` to `end` - 1 of the
    random ones that are drawn for the measurement after this step alone."""
    starts = slice_starts(config.seed, EVALUATION_STREAM + step, end, len(tokens) - config.seq_len)
    return slice_losses(model, take_slices(tokens, starts[first:], config.seq_len), config)


def mean_and_error(losses: torch.Tensor) -> tuple[float, float]:
    """The mean of independent losses, and its standard error; that of a single one is unknown, and 0."""
    error = losses.std() / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    return losses.mean().item(), float(error)


def validation_loss(model: GPT, tokens: np.ndarray, config: Config) -> tuple[float, float]:
    """Mean loss, nats per token, over the same slices every time, and its standard error: the slices are evenly
    spread, `VAL_TOKENS` at most."""
    n_slices = max(1, min(VAL_TOKENS, len(tokens) - 1) // config.seq_len)
    starts = np.linspace(0, len(tokens) - 1 - config.seq_len, n_slices).astype(np.int64)
    return mean_and_error(slice_losses(model, take_slices(tokens, starts, config.seq_len), config))


def slice_losses(model: GPT, slices: torch.Tensor, config: Config) -> torch.Tensor:
    """Mean loss of each slice (n, T + 1), float64 (n,), nats per token."""
    losses = []
    with (
        waiting("Measuring the loss", len(slices), "slices") as bar,
        evaluating(model),
        autocast(config),
    ):
        for chunk in slices.split(config.micro_batch):
            look_for_signals()
            chunk = chunk.to(config.device)
            features, targets = model.features(chunk[:, :-1]).flatten(0, 1), chunk[:, 1:].flatten()
            parts = zip(features.split(HeadLoss.BLOCK), targets.split(HeadLoss.BLOCK), strict=True)
            loss = torch.cat(
                [F.cross_entropy(model.logits(f).float(), t, reduction="none") for f, t in parts]
            )
            losses.append(loss.view(len(chunk), -1).mean(1).cpu())
            bar.update(len(chunk))
    return torch.cat(losses).double()


# ---------------------------------------------------------------------------------------------
# Trainer
# ---------------------------------------------------------------------------------------------

FIRST_LOOK = 16  # slices of the first look at the corpus loss; each further look has twice as many
LOOK = 128  # slices without which no check is passed, if there are as many
EXACT = 0.015  # of the target: a standard error that needs no further look
MAX_SKIPPED_IN_A_ROW = 20  # fp16 skips a few steps while it looks for its scale; 20 mean it is lost


class TrainingFailed(RuntimeError):
    """The run cannot go on; the last good checkpoint is intact."""


class Trainer:
    """Model, optimizer, gradient scale and progress of one run: it learns, and knows no file."""

    def __init__(
        self, config: Config, corpus: Corpus, checkpoint: dict | None, ranks: Ranks | None = None
    ):
        self.config = config
        self.corpus = corpus
        self.ranks = ranks or Ranks()
        self.device = torch.device(config.device)
        self.model = GPT(config).to(self.device)
        self.optimizers = build_optimizers(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.progress = Progress()
        self.copying = torch.cuda.Stream() if self.device.type == "cuda" else None
        self.forward: Callable[..., torch.Tensor] = self.model
        if checkpoint is not None:
            self._restore(checkpoint)

    def _restore(self, checkpoint: dict) -> None:
        """Take over a checkpoint's state, and its tensors out of it, so that they are not held twice."""
        self.model.load_state_dict(checkpoint.pop("model"))
        restore_optimizers(self.optimizers, checkpoint)
        if self.scaler.is_enabled() and checkpoint["scaler"]:
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.progress = replace(Progress(**checkpoint["progress"]), skipped_in_a_row=0)
        self.progress.forget_incomparable(Config.from_dict(checkpoint["config"]), self.config)

    def state(self) -> dict:
        """What `_restore` takes over, and the flags and facts that tell whether it may."""
        return {
            **self.description(),
            "step": self.progress.step,
            "model": self.model.state_dict(),
            # The flags say the rest.
            "optimizer": {
                name: optimizer.state_dict()["state"] for name, optimizer in self.optimizers.items()
            },
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
        }

    def description(self) -> dict:
        """What every checkpoint says about itself."""
        config, corpus = self.config, self.corpus
        tokenizer = {
            "name": config.tokenizer,
            "n_vocab": config.vocab_size,
            "content": corpus.vocabulary,
        }
        return {
            "format": CHECKPOINT_FORMAT,
            "config": config.as_dict(),
            "origins": config.origins_as_dict(),
            "tokenizer": tokenizer,
            "trained_context": self.progress.trained_context,
            "corpus_sha256": corpus.sha256,
            "corpus_tokens": len(corpus.tokens),
            "val_sha256": corpus.val_sha256,
        }

    def compile(self) -> None:
        """Compile the forward pass if the config says so, for each length of slices to come. A compiler that fails, or
        computes something else, is reported, and the run goes on without."""
        if self.config.compile == "off":
            return
        started, step = time.perf_counter(), self.progress.step + 1
        log.info(words.compiling_line(self.config))
        try:
            steps = sorted({step, max(step, min(self.config.mixed_steps + 1, self.config.steps))})
            with waiting("Compiling", shown=self.ranks.rank == 0):
                self.forward = compile_proven(self.model, self._trial, steps, self.config)
            log.info("Compiled in %.0f s", time.perf_counter() - started)
        except Exception as error:  # Inductor, Triton and C++ compilers fail in many ways
            if is_out_of_memory(error):
                raise
            log.warning(
                "torch.compile failed, going on without: %s: %s",
                type(error).__name__,
                first_words(error),
            )
            failed = Origin(From.MACHINE, "torch.compile failed, see the log")
            self.config, self.forward = decided(self.config, "compile", "off", failed), self.model
        finally:
            self.model.zero_grad(set_to_none=True)

    def _trial(self, step: int, forward: Callable[..., torch.Tensor], pieces: int) -> torch.Tensor:
        """Gradients and loss of a step's first micro-batches, one of each length of slices, in about so many pieces."""
        self.forward, fits = forward, self.config.micro_batch
        slices = [micro_batches(part, fits * self.config.seq_len)[0] for part in self.slices(step)]
        if pieces > 1:
            return self._accumulate(step, slices, max(1, fits // pieces))
        loss = self.accumulate(step, slices)
        if fits == self.config.micro_batch:
            return loss
        self.model.zero_grad(set_to_none=True)  # memory ran out: again with what fits
        return self._trial(step, forward, pieces)

    def slices(self, step: int) -> list[torch.Tensor]:
        """This process's share of one step's slices, on the device, (share, T + 1); of a mixed step in two parts."""
        c, tokens = self.config, self.corpus.tokens
        n_starts = len(tokens) - c.seq_len
        if c.slices == "shuffled":
            starts = covering_starts(
                c.seed, (step - 1) * c.global_batch, c.global_batch, n_starts, c.seq_len
            )
        else:
            starts = slice_starts(c.seed, step, c.global_batch, n_starts)
        first = self.ranks.rank * c.share
        slices = take_slices(tokens, starts[first : first + c.share], c.seq_len)
        parts = whole_and_quarters(slices, first) if step <= c.mixed_steps else [slices]
        if self.device.type == "cuda":
            return [part.pin_memory().to(self.device, non_blocking=True) for part in parts]
        return [part.to(self.device) for part in parts]

    def accumulate(self, step: int, slices: list[torch.Tensor]) -> torch.Tensor:
        """Gradients of the mean loss over all tokens of these slices. Returned is the mean loss of
        the whole slices among them, a scalar on the device: 0 without any.

        When memory runs out, the micro-batch shrinks to the next smaller divisor of the global batch:
        the same slices, and to rounding the same gradients.
        """
        while True:
            micro_batch = self.config.micro_batch
            try:
                return self._accumulate(step, slices, micro_batch)
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
            origin = Origin(From.MEMORY, f"{micro_batch} took more than there is")
            self.config = decided(self.config, "micro_batch", smaller, origin)
            release_memory(self.device)

    def _accumulate(self, step: int, slices: list[torch.Tensor], at_once: int) -> torch.Tensor:
        if self.config.dropout:
            seeds = random_words(self.config.seed, DROPOUT_STREAM + step, self.ranks.count)
            torch.manual_seed(int(seeds[self.ranks.rank]))
        n_tokens = sum(part[:, 1:].numel() for part in slices)
        n_whole = sum(part[:, 1:].numel() for part in slices if self._are_whole(part))
        mean = torch.zeros((), device=self.device)
        for micro_batch in chain.from_iterable(
            micro_batches(part, at_once * self.config.seq_len) for part in slices
        ):
            inputs, targets = micro_batch[:, :-1], micro_batch[:, 1:]
            with autocast(self.config):
                loss = self.forward(inputs, targets)
            share = loss / (n_tokens / targets.numel())  # learned from is the mean over all tokens
            self.scaler.scale(share).backward()
            if self._are_whole(micro_batch):
                mean += loss.detach() / (n_whole / targets.numel())
        return mean

    def _are_whole(self, slices: torch.Tensor) -> bool:
        return slices.shape[1] == self.config.seq_len + 1

    def update(self) -> tuple[float, float, float]:
        """One optimizer update. Returns loss (before the update), gradient norm (before clipping), rate.

        The loss is that of the step's whole slices, in a mixed step too: so all steps compare.

        A step whose loss or gradient is not finite leaves all weights and all of the optimizer alone;
        too many in a row raise TrainingFailed.
        """
        config, p, step = self.config, self.progress, self.progress.step + 1
        p.trained_context = max(p.trained_context, config.seq_len)
        slices = self.slices(step)
        n_whole = sum(len(part) for part in slices if self._are_whole(part))
        # So that the mean over the ranks is that of all whole slices: a rank may have none.
        weight = n_whole * self.ranks.count / config.whole_slices(step)
        loss = self.accumulate(step, slices) * weight
        self.ranks.average([loss, *(p.grad for p in self.model.parameters() if p.grad is not None)])
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad or math.inf)
        loss, grad_norm = torch.stack([loss, norm]).tolist()  # the one host read

        lr = learning_rate(step, config)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if self.copying is not None:
            torch.cuda.current_stream().wait_stream(
                self.copying
            )  # a snapshot of the weights may be under way
        if finite:
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        self._count(step, loss, grad_norm, finite)
        return loss, grad_norm, lr

    def _count(self, step: int, loss: float, grad_norm: float, finite: bool) -> None:
        p = self.progress
        p.step, p.loss, p.grad_norm, p.untold = step, loss, grad_norm, True
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
                "go on with a lower --lr, or with --amp off"
            )

    @contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """Around what only tells of the run: when it fails, that is a warning, and the run goes on without."""
        try:
            yield
        except Exception as error:  # backends fail in many ways
            reason = f"{type(error).__name__}: {first_words(error)}"
            step = self.progress.step
            log.warning("%s failed at step %d, the run goes on without: %s", what, step, reason)

    def evaluate(self) -> float | None:
        """Measure the validation loss of the present weights; None when that fails."""
        p, tokens = self.progress, self.corpus.val_tokens
        assert tokens is not None, "there is no validation split"
        with self.telling("The validation"):
            p.val_loss, p.val_error = validation_loss(self.model, tokens, self.config)
            p.val_step = p.step
        if p.val_step != p.step:
            return None
        if not math.isfinite(p.val_loss):
            raise TrainingFailed(
                f"the validation loss of step {p.step} is not finite: go on with a lower --lr"
            )
        return p.val_loss

    def sample(self, tokenizer: Tokenizer) -> tuple[str, list[str]]:
        """The prompt, and num_prompts texts that continue it."""
        c, p = self.config, self.progress
        first_words = whole_characters(tokenizer, self.corpus.tokens[:16].tolist())
        prompt = decode_escapes(c.prompt) or "".join(first_words)
        start = encode_prompt(prompt, tokenizer)
        seeds = random_words(c.seed, SAMPLES_STREAM + p.step, c.num_prompts)
        options = dict(
            context=p.trained_context,
            temperature=c.temperature,
            top_k=c.top_k,
            end=tokenizer.eot_token,
        )
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        with autocast(for_sampling(c, len(start) + c.max_new_tokens <= p.trained_context)):
            prompts = [start] * c.num_prompts
            outputs = generate(
                self.model, prompts, c.max_new_tokens, generators=generators, **options
            )
        return prompt, ["".join(whole_characters(tokenizer, output)) for output in outputs]

    def check_target(self) -> None:
        """Measure whether the target is reached, once window_loss says so: a few steps in a row
        are no fair sample of the text, so that their mean alone proves nothing."""
        p = self.progress
        if not p.check_is_due(self.config):
            return
        with self.telling("The check of the target"):
            self.measure_corpus_loss()
        if not p.corpus_reached(self.config):
            p.note_failed_check(self.config)
            if p.corpus_measured:
                log.info(words.failed_check_line(p, self.config))

    def measure_corpus_loss(self, at_end: bool = False) -> None:
        """Measure the mean loss over random slices drawn for this step alone, into the progress.

        There are a tenth as many as were trained, but 64 to 4,096; fewer when the loss clearly is
        above the target, or from 128 on exact enough. At the end there are at least a tenth, but 64 to 1,024.
        """
        c, p = self.config, self.progress
        tenth = max(64, p.tokens // c.seq_len // 10)
        usual, most = min(1024, tenth), min(4096, tenth)
        if not c.target_loss or c.one_low_step_is_enough:
            most = usual
        log.info(words.measuring_line(most, c, p))
        n_slices = usual if at_end else min(FIRST_LOOK, most)
        losses = torch.zeros(0, dtype=torch.float64)
        while True:
            while len(losses) < n_slices:
                look_for_signals()
                first, end = len(losses), min(len(losses) + LOOK, n_slices)
                chunk = corpus_losses(self.model, self.corpus.tokens, c, p.step, first, end)
                losses = torch.cat([losses, chunk])
            mean, error = mean_and_error(losses)
            is_above = (
                mean - (2 if n_slices >= LOOK else 3) * error > c.target_loss
            )  # few tell little of their spread
            is_exact = n_slices >= LOOK and error <= EXACT * c.target_loss
            if n_slices == most or is_above or is_exact:
                break
            n_slices = min(2 * n_slices, most)
        p.corpus_loss, p.corpus_loss_error, p.corpus_loss_slices = mean, error, n_slices
        p.corpus_step = p.step


# ---------------------------------------------------------------------------------------------
# Saver
# ---------------------------------------------------------------------------------------------

REDRAW_SEC = 60  # between two plots of a run that goes on


class Saver:
    """What of a run is written, and when: samples at once; checkpoints, results and plot in the background.

    `launch` is what config.json says of this start, `saved_step` that of the checkpoint on disk, 0 without one.
    """

    def __init__(self, run: RunDir, trainer: Trainer, launch: dict, saved_step: int):
        self.run, self.trainer, self.launch, self.saved_step = run, trainer, launch, saved_step
        self.floor = loss_floor(trainer.corpus.tokens, trainer.config.seq_len)
        self.writer = Writer(run)
        self.redrawn = (
            time.monotonic() - REDRAW_SEC / 2
        )  # so that there is something in the first minute
        self.snapshot, self.best_snapshots = (
            Snapshot(),
            (Snapshot(), Snapshot()),
        )  # one best may be under way
        self.best: dict | None = None  # what best.pt is to hold, while it is not on disk
        self.best_under_way: Snapshot | None = None
        self.best_before: Path | None = None  # where the next one moves what is there

    def write_config(self) -> None:
        """Write config.json, and the vocabulary if it is not GPT-2's. Raises OSError."""
        self.run.check_owner()
        if vocabulary := self.trainer.corpus.vocabulary:
            with replacing(self.run.tokenizer_json) as file:
                file.write(vocabulary.encode())
        config = self.trainer.config
        flags = {"config": config.as_dict(), "origins": config.origins_as_dict()}
        self.run.write_json(self.run.config_json, self.launch | flags)

    def sample(self, tokenizer: Tokenizer, remark: str = "") -> None:
        """Append texts of the model as it is now to samples.txt."""
        progress = self.trainer.progress
        if self.trainer.config.num_prompts:
            with self.trainer.telling("The sample"):
                with waiting("Sampling"):
                    prompt, outputs = self.trainer.sample(tokenizer)
                self.run.append_samples(progress.step, prompt, outputs, remark)
                log.info(words.sample_line(progress.step, prompt, outputs[0]))
                progress.sampled_step = progress.step

    def validate(self) -> float | None:
        """Measure the validation loss, and keep the weights if it is the lowest so far; None when that fails."""
        p, val_loss = self.trainer.progress, self.trainer.evaluate()
        if val_loss is not None and val_loss < p.best_loss:
            p.measured_in_vain, p.best_error = 0, p.val_error
            self.keep_weights(val_loss)
        elif val_loss is not None:
            p.measured_in_vain += 1
        return val_loss

    def consider_window_loss(self, at_end: bool = False) -> None:
        """Keep the weights if window_loss is the lowest so far.

        A run that ends before its first window is full has the mean of what there is; a full window
        does not compare with that, and replaces it.
        """
        p, config = self.trainer.progress, self.trainer.config
        window_loss, full_windows_before = (
            p.window_loss(config),
            p.best_step >= config.target_window,
        )
        if window_loss is None and at_end and p.recent_losses:
            window_loss = statistics.fmean(p.recent_losses)
        if window_loss is not None and (window_loss < p.best_loss or not full_windows_before):
            self.keep_weights(window_loss)

    def keep_weights(self, loss: float) -> None:
        """Copy the weights aside as the best, for the next save to write; or write them now, if
        there is no memory for a copy."""
        p = self.trainer.progress
        before, (p.best_loss, p.best_step) = (p.best_loss, p.best_step), (loss, p.step)
        free = next(
            snapshot for snapshot in self.best_snapshots if snapshot is not self.best_under_way
        )
        weights = free.take(self.trainer.model.state_dict(), self.trainer.copying)
        self.best = {"step": p.step, "loss": loss, "model": weights, "snapshot": free}
        if not free.is_copy:
            self.writer.finish()
            self._save_best(self.best)
            if self.best is not None:  # the disk refused it, and these weights will change
                self.best, (p.best_loss, p.best_step) = None, before

    def save(self) -> None:
        """Begin to write a checkpoint, then results and plot; an earlier save is waited for. Raises
        FileExistsError when the directory belongs to another run."""
        self.writer.finish()  # its buffers are about to be overwritten
        self.run.check_owner()
        name = f"{self.run.last} of {gigabytes(STATE_BYTES * self.trainer.config.n_params)}"
        try:
            task = self._checkpoint(name)
        except OSError as error:
            self.run.note(name, error)
        else:
            self.writer.start([task, *self._outcome("running", redraw=self._is_due())])
            if not self.snapshot.is_copy:
                self.writer.finish()

    def refresh(self) -> None:
        """Write results and plot for whoever looks at them now, when they are old and nothing else is written."""
        if self._is_due() and not self.writer.busy:
            self.writer.start(self._outcome("running"))

    def _is_due(self) -> bool:
        return time.monotonic() - self.redrawn >= REDRAW_SEC

    def _checkpoint(self, name: str) -> Task:
        """Take a snapshot of everything resume needs, to be written as last.pt, after a best that is not on disk yet:
        last.pt never speaks of a best that is not there. Raises OSError."""
        self.run.make()
        best, step, copying = self.best, self.trainer.progress.step, self.trainer.copying
        description = self.trainer.description()
        state = self.snapshot.take(self.trainer.state() | self.run.mark(), copying)
        self.best_under_way = None if best is None else best["snapshot"]
        previous = (
            None if step == self.saved_step else self.run.prev
        )  # which stays that of an earlier step

        def write() -> None:
            try:
                if copying is not None:
                    copying.synchronize()
                self.run.sync()
                if best is not None:
                    self._write_best(best, description)
                write_checkpoint(self.run.last, state, previous)
            finally:
                self.best_under_way = None

        def done() -> None:
            self._report_best(best)
            log.info("Saved checkpoint: %s", self.run.last)
            self.saved_step = step

        return Task(name, write, done)

    def _write_best(self, best: dict, description: dict) -> None:
        values = description | {name: best[name] for name in ("step", "loss", "model")}
        write_checkpoint(self.run.best, values, previous=self.best_before)
        self.best_before = None

    def _save_best(self, best: dict) -> None:
        """Write it now."""
        with self.run.attempt("best.pt"):
            self._write_best(best, self.trainer.description())
            self._report_best(best)

    def _report_best(self, best: dict | None) -> None:
        if best is not None:
            log.info(
                words.best_line(best["loss"], best["step"], self.trainer.config, self.run.best)
            )
        if self.best is best:
            self.best = None

    def _outcome(self, stop: str, redraw: bool = True) -> list[Task]:
        """config.json, results.json and the plot, as things stand now."""
        trainer = self.trainer
        results = words.results(trainer.config, trainer.progress, trainer.corpus, self.floor, stop)

        def write() -> None:
            self.write_config()
            self.run.write_json(self.run.results_json, results)

        tasks = [Task("config.json and results.json", write)]
        if redraw:
            self.redrawn = time.monotonic()
            tasks.append(Task("the plot", self._draw_plot))
        return tasks

    def _draw_plot(self) -> None:
        """Refresh loss_curve.png. Raises OSError whatever the reason: a plot must not cost the run anything else."""
        try:
            from update_readme import draw_loss_curve

            self.run.check_owner()
            draw_loss_curve(self.run.root)
        except Exception as error:
            raise (
                error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}")
            ) from error

    def publish(self, stop: str) -> None:
        """Write how the run stands, and wait until it is written."""
        self.writer.start(self._outcome(stop))
        self.writer.finish()

    def rescue(self) -> None:
        """Of a run that failed: write the best that is not on disk yet, and its results."""
        self.writer.finish()
        if self.best is not None:
            self._save_best(self.best)
        self.publish("failed")


# ---------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------

OUT_OF_MEMORY = "Out of memory: choose a smaller --seq_len or --preset. (%s)"
RUN_IS_OVER = 1000  # what rank 0 tells the others then, instead of the number of a signal


def sample_is_due(p: Progress, config: Config) -> bool:
    """Whether to sample after this step: every sample_every steps, and once after half as many."""
    sampled = p.step % config.sample_every == 0 or p.step == config.sample_every // 2
    return sampled and p.step != p.sampled_step


def train(trainer: Trainer, saver: Saver, tokenizer: Tokenizer) -> str:
    """Run steps until one of the `COMPLETE` reasons, which is returned, or a signal, whose name is.

    A signal breaks off what only tells of a step; the next start begins with it.
    """
    config, p = trainer.config, trainer.progress
    began, save_due = p.step, False
    with Interruption() as interruption, step_log(config, p, trainer.corpus, saver.run) as steps:
        while True:
            with suppress(Interrupted):
                if p.untold:
                    tell(trainer, saver, steps)
                    save_due = save_due or p.step % config.save_every == 0
                if not p.stop_reason(config):
                    if save_due and not p.skipped_in_a_row and not saver.writer.busy:
                        saver.save()
                        steps.eta()
                        save_due = False
                    if sample_is_due(p, config):
                        saver.sample(tokenizer)
                    if p.step > began:
                        saver.refresh()
            over = RUN_IS_OVER if p.stop_reason(config) else interruption.signal
            if end := trainer.ranks.largest(over):
                break
            saver.writer.collect()
            trainer.update()

        saver.writer.finish()
        if p.step != saver.saved_step:
            saver.save()
        stop = p.stop_reason(config) or signal.Signals(end).name
        if stop in COMPLETE:
            try:
                stop = conclude(trainer, saver, tokenizer, stop)
            except Interrupted as signal_name:
                stop = str(signal_name)
        saver.writer.finish()
        news = p.step > began and p.step != p.sampled_step
        if stop == "SIGINT" and news and config.num_prompts:
            log.info("Sampling once more; Ctrl-C leaves it out ...")
            Interruption.current = None
            with suppress(KeyboardInterrupt):
                saver.sample(tokenizer, AT_CTRL_C)
    return stop


def tell(trainer: Trainer, saver: Saver, steps: StepLog) -> None:
    """Measure and log what there is to tell of the step just done. Raises Interrupted: it is untold then."""
    config, p, val_loss = trainer.config, trainer.progress, None
    trainer.check_target()
    stops = p.stop_reason(config) is not None
    if config.validates and (stops or p.step % config.eval_every == 0):
        if stops and p.step != saver.saved_step:
            saver.save()
        val_loss = saver.validate()
    elif not config.validates and (stops or p.step % config.target_window == 0):
        saver.consider_window_loss(at_end=stops)
    steps.step(p.loss, p.grad_norm, learning_rate(p.step, config), val_loss)


def conclude(trainer: Trainer, saver: Saver, tokenizer: Tokenizer, stop: str) -> str:
    """Measure, tell and sample at the end of a run, which is saved already, and save what came of it.

    Returns why it stopped. Raises Interrupted.
    """
    config, p = trainer.config, trainer.progress
    saver.writer.finish()
    if not p.corpus_reached(config):
        with trainer.telling("The corpus loss"):
            trainer.measure_corpus_loss(at_end=True)
        stop = p.stop_reason(config) or stop
    if config.validates and p.val_step != p.step:
        saver.validate()
    for line in words.ending(p, config, trainer.corpus, stop):
        log.info(line)
    if p.step != p.sampled_step:
        saver.sample(tokenizer)
    saver.save()
    return stop


def follow(config: Config, trainer: Trainer) -> None:
    """What every process but the first does: its share of each step, until the first has enough. Raises OSError.

    However the run ends, this process ends well: torchrun would kill the first for the sake of another's exit code,
    before it has said and saved what it must.
    """
    configure_torch(config)
    if config.dry_run:
        go_to_whole_slices(trainer)
    else:
        trainer.compile()
    with Interruption(silent=True) as interruption, suppress(TrainingFailed):  # the first says so
        while not trainer.ranks.largest(interruption.signal):
            trainer.update()


# ---------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------


def build_trainer(setup: Setup, ranks: Ranks) -> Trainer:
    """The trainer at the step where the checkpoint left it. Raises ValueError when the checkpoint does not fit."""
    try:
        trainer = Trainer(setup.config, setup.corpus, setup.checkpoint, ranks)
    except (RuntimeError, MemoryError, ValueError, TypeError, KeyError, AttributeError) as error:
        if is_out_of_memory(error) or setup.checkpoint is None:
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{setup.resumed_from} does not fit this model ({type(error).__name__}: {reason})"
        ) from error
    if setup.start is not None:
        trainer.model.load_state_dict(setup.start.model)
        trainer.progress.trained_context = max(
            trainer.progress.trained_context, setup.start.trained_context
        )
    if not setup.best_compares:
        trainer.progress.forget_best()
    return trainer


def announce(setup: Setup, progress: Progress, floor: float) -> None:
    """Say what will happen, and what of it cannot go well."""
    for line in words.plan(setup.config, setup.corpus, floor, progress):
        log.info(line)
    for line in words.forebodings(setup.config, setup.corpus, floor):
        log.warning(line)


def begin(setup: Setup, trainer: Trainer, saver: Saver) -> None:
    """Say what will happen, and compile."""
    config, run, progress = setup.config, setup.run, trainer.progress
    announce(setup, progress, saver.floor)
    if setup.checkpoint is not None:
        log.info("Resuming from step %d (%s)", progress.step, setup.resumed_from)
        if changes := words.changes(setup.checkpoint["config"], config):
            log.info("Changed from here on: %s", changes)
        before = learning_rate(progress.step, Config.from_dict(setup.checkpoint["config"]))
        if (
            lr := learning_rate(progress.step + 1, config)
        ) > 1.1 * before and progress.step > config.warmup_steps:
            log.warning("The learning rate rises here, from %.2e to %.2e", before, lr)
    if setup.start is not None:
        log.info("Starting from the weights of %s", setup.start.path)
    if progress.best_step and not run.best.exists():
        log.warning("%s is missing: the best from here on will be written there", run.best)
        progress.forget_best()
    elif not progress.best_step and run.best.exists():
        saver.best_before = kept = run.first_free("checkpoints/best-{}.pt")
        log.info("%s does not compare with the losses from here on: kept as %s", run.best, kept)
    trainer.compile()


def run_training(setup: Setup, trainer: Trainer) -> int:
    """Train, measure, and leave every file of the run whole. Returns the exit code."""
    run = setup.run
    before = {} if setup.checkpoint is None else read_json(run.config_json)
    launch = launch_record(setup.argv, setup.config, setup.corpus, setup.checkpoint, before)
    saver = Saver(run, trainer, launch, trainer.progress.step if setup.continues else 0)
    saver.write_config()

    try:
        configure_torch(setup.config)
        begin(setup, trainer, saver)
        stop = train(trainer, saver, setup.tokenizer)
        if stop in COMPLETE:
            saver.publish(stop)
        elif saver.saved_step:
            saver.publish("interrupted")
        if missing := run.missing():
            since = f" from step {saver.saved_step}"
            again = how_to_continue(setup.argv, setup.config, saver.saved_step > 0, since)
            log.error(
                f"At the end, step {trainer.progress.step}, these could not be written: {missing}. {again}"
            )
            return 1
        if stop not in COMPLETE:
            again = how_to_continue(setup.argv, setup.config, saver.saved_step > 0)
            log.info(f"Interrupted by {stop} after step {trainer.progress.step}. {again}")
            return exit_code(stop)
        seen = [str(path) for path in (run.loss_curve, run.samples_txt) if path.exists()]
        log.info("See %s", " and ".join(seen))
        log.info(verdict(trainer.config, trainer.progress, saver.floor, stop))
        log.info(words.next_command(setup.config))
        log.info("Training complete.")
        return 0
    except TrainingFailed as failure:
        saver.rescue()
        step = saver.saved_step
        good = (
            f"the last good checkpoint is {run.last}, of step {step}"
            if step
            else "there is no checkpoint yet"
        )
        log.error("Training failed: %s; %s", failure, good)
    except ConnectionError as error:
        saver.writer.finish()
        since = f" from step {saver.saved_step}"
        again = how_to_continue(setup.argv, setup.config, saver.saved_step > 0, since)
        log.error("After step %d: %s. %s", trainer.progress.step, error, again)
    except (RuntimeError, MemoryError) as error:
        saver.writer.finish()
        if not is_out_of_memory(error):
            raise
        log.error(OUT_OF_MEMORY, error)
    return 1


def go_to_whole_slices(trainer: Trainer) -> None:
    """Go on behind the mixed steps, without training: whole slices take the most memory."""
    trainer.progress.step = max(trainer.progress.step, trainer.config.mixed_steps + 1)


def rehearse(setup: Setup, trainer: Trainer) -> int:
    """Say what a run would do, and measure two of its steps. Returns the exit code; raises OSError; writes nothing."""
    config = setup.config
    configure_torch(config)
    announce(setup, trainer.progress, loss_floor(setup.corpus.tokens, config.seq_len))
    step = trainer.progress.step
    go_to_whole_slices(trainer)
    log.info(words.rehearsing_line(config))
    with waiting("Measuring two steps", total=2, unit="steps") as bar:
        for _ in range(2):  # the first step of a process takes longer
            started = time.perf_counter()
            trainer.ranks.largest(0)
            trainer.update()
            bar.update()
    trainer.ranks.largest(RUN_IS_OVER)
    seconds, memory = time.perf_counter() - started, peak_memory(config.device)
    for line in words.rehearsal(config, step, seconds, memory, setup.run.free_bytes()):
        log.info(line)
    return 0


def open_and_train(setup: Setup, trainer: Trainer, log_file: LogFile) -> int:
    """Bring the run directory to where training starts, then train. Returns the exit code; raises OSError."""
    run, earlier = setup.run, not setup.continues and setup.run.exists()
    if earlier and (run.has_outcome() or setup.config.resume == "never" or not run.is_ours()):
        log.info("Moved the run that was here to %s", run.move_aside())
    run.make()
    with log_file.of(run):
        if setup.damage:
            damaged = run.last.with_name("damaged.pt")
            move(run.last, damaged)
            log.warning(
                "%s: set aside as %s; going on from %s", setup.damage, damaged, setup.resumed_from
            )
        run.restore(setup.checkpoint if setup.checkpoint and setup.continues else {})
        with shown(run, setup.config):
            return run_training(setup, trainer)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done, 1 failed, 2 bad input, 130 or 143 interrupted."""
    logging.raiseExceptions = (
        False  # a closed pipe must not flood the terminal; the log file goes on
    )
    ranks = Ranks()
    try:
        ranks = Ranks.join()
        with terminating(), speaking("train.py", ranks.rank > 0), ExitStack() as held:
            code = run_command(sys.argv[1:] if argv is None else argv, ranks, held)
    except ConnectionError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt as signal_name:
        code = exit_code(str(signal_name))
    except Exception as error:
        if is_out_of_memory(error):
            print(f"train.py: error: {OUT_OF_MEMORY % error}", file=sys.stderr)
        elif ranks.count == 1:
            raise
        else:
            traceback.print_exc()
        code = 1
    ranks.end(code)
    return code


def run_command(argv: list[str], ranks: Ranks, held: ExitStack) -> int:
    """Prepare, train, and say what went wrong. Returns the exit code."""
    problem = answer = ""
    setup, log_file = None, LogFile()
    held.enter_context(logging_to(log_file))
    try:
        setup = prepare(argv, ranks, held, about=__doc__)
        answer = setup.finished or ""
        if not answer:
            trainer = build_trainer(setup, ranks)
            if ranks.rank == 0:
                n_params, fresh = setup.config.n_params, setup.checkpoint is None
                setup.run.check_room(STATE_BYTES * n_params, WEIGHT_BYTES * n_params, fresh)
                if not setup.config.dry_run and setup.run.lock is None:
                    held.enter_context(setup.run.locked())
    except SystemExit as answered:  # after --help
        return int(answered.code or 0)
    except (ValueError, OSError) as error:
        problem = str(error) or type(error).__name__
    problems = problems_of_all(ranks, setup, problem)
    if problems or setup is None:
        for line in problems if ranks.rank == 0 else ():
            print(f"train.py: error: {line}", file=sys.stderr)
        return 2
    if ranks.rank > 0:
        if not answer:
            follow(setup.config, trainer)
        return 0
    try:
        if not answer:
            if setup.config.dry_run:
                return rehearse(setup, trainer)
            return open_and_train(setup, trainer, log_file)
        log.info(answer)
        if setup.config.tensorboard and not setup.config.dry_run:  # turned on when the run was over
            setup.run.make()
            with shown(setup.run, setup.config):
                pass
        return 0
    except KeyboardInterrupt as signal_name:
        if setup.config.dry_run:
            log.error("Broken off; a dry run saves nothing.")
            return exit_code(str(signal_name))
        saved = setup.run.last.exists() or setup.run.prev.exists()
        again = how_to_continue(argv, setup.config, saved, " from the last checkpoint")
        log.error("Broken off without saving. %s", again)
        return exit_code(str(signal_name))
    except OSError as error:
        log.error("%s; what was written before is intact", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
