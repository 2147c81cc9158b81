"""Train a GPT-2 from scratch on one text file until a target training loss is reached.

    python train.py --preset demo                        # no GPU, no file: a minute on a laptop
    python train.py --input_file data/input.txt          # GPT-2 124M, one GPU
    python train.py --preset small                       # 45M parameters

Run the same command again and it continues where it stopped. Read from top to bottom, this file
follows the data: slices, model, optimizer and schedule, text and loss, Trainer (which learns),
Saver (which writes), the loop, main. What it stands on lies in parts/, each file with a promise of
its own in its first line.

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
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path

from parts.startup import packages_of

with packages_of("train.py", __name__):
    import numpy as np
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

    from parts.commandline import decode_escapes
    from parts.compute.compiling import check_compiled, loss_and_gradient_norms
    from parts.compute.device import (
        autocast,
        configure_torch,
        cpu_only_hint,
        environment,
        excerpt,
        for_sampling,
        is_out_of_memory,
        largest_divisor,
        peak_memory,
        release_memory,
    )
    from parts.compute.kernels import HeadLoss, KVCache, causal_attention, linear
    from parts.compute.muon import Muon
    from parts.compute.ranks import Ranks
    from parts.compute.sampling import choose
    from parts.compute.signals import (
        SIGNALS,
        Interrupted,
        Interruption,
        exit_code,
        look_for_signals,
        name_of,
        terminating,
    )
    from parts.flags import Config, From, Origin, decided
    from parts.predecessor import InitialWeights
    from parts.progress import COMPLETE, Progress, StopReason
    from parts.report import words
    from parts.report.provenance import launch_record
    from parts.report.steplog import StepLog, step_log
    from parts.report.tensorboard import writing_events
    from parts.report.words import how_to_continue, verdict
    from parts.run.background import Snapshot, Task, Writer
    from parts.run.checkpoint import (
        CHECKPOINT_FORMAT,
        SavedRun,
        restore_optimizers,
        write_checkpoint,
    )
    from parts.run.directory import (
        LogFile,
        RunDir,
        first_free,
        gigabytes,
        has_content,
        move,
        read_json,
        write_whole,
    )
    from parts.run.layout import AT_CTRL_C, STATE_BYTES, WEIGHT_BYTES
    from parts.run.screen import logging_to, speaking, waiting
    from parts.setup import Setup, agree, prepare
    from parts.text.corpus import Corpus, loss_floor
    from parts.text.vocabulary import Tokenizer, encode_prompt, whole_characters

log = logging.getLogger("train")


# ---------------------------------------------------------------------------------------------
# Slices
# ---------------------------------------------------------------------------------------------

# Philox streams: (seed, pass) orders the slices of a pass; these stand above every pass and step.
DROPOUT_STREAM = 2**61
SAMPLES_STREAM = 2**62
EVALUATION_STREAM = 2**63


def random_words(seed: int, stream: int, count: int) -> np.ndarray:
    """`count` uint64 words that depend on `(seed, stream)` alone.

    The stream is in Philox's key, since streams in its counter overlap; the words are raw, since
    NumPy may change its distributions.
    """
    return np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw(count)


def slice_starts(seed: int, stream: int, count: int, n_starts: int) -> np.ndarray:
    """`count` starts, int64, uniform over 0 … n_starts - 1 (bias below n_starts / 2**64)."""
    return (random_words(seed, stream, count) % np.uint64(n_starts)).astype(np.int64)


def take_slices(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> torch.Tensor:
    """Slices of T + 1 tokens, (len(starts), T + 1) int64: inputs [:, :-1], targets [:, 1:]."""
    return torch.from_numpy(tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))


def whole_and_quarters(slices: torch.Tensor, first: int) -> list[torch.Tensor]:
    """Every fourth slice whole, (about B / 4, T + 1), and the quarters of the others, (about 3 * B,
    T / 4 + 1): the same inputs and targets, without the text before them.

    The slices (B, T + 1) are number `first`, first + 1, … of their step. Empty parts are left out.
    """
    length = slices.shape[1] // 4
    is_whole = torch.arange(first, first + len(slices)) % 4 == 0
    quarters = slices[~is_whole].unfold(1, length + 1, length).flatten(0, 1)
    return [part for part in (slices[is_whole], quarters) if len(part)]


def micro_batches(slices: torch.Tensor, n_tokens: int) -> tuple[torch.Tensor, ...]:
    """Split the slices into the fewest equal parts of at most `n_tokens` tokens each."""
    seq_len = slices.shape[1] - 1
    return slices.split(largest_divisor(len(slices), max(1, n_tokens // seq_len)))


@lru_cache(maxsize=2)  # a step may end one pass and begin another
def pass_starts(seed: int, number: int, n_starts: int, seq_len: int) -> np.ndarray:
    """Starts, int64, of the slices of one pass, in random order.

    They are every seq_len-th of a ring of all starts, from a random one on: so each start is
    equally likely. A pass leaves out fewer than seq_len tokens, at the two ends of the text.
    """
    words = random_words(seed, number, 1 + math.ceil(n_starts / seq_len))
    origin = int(words[0] % np.uint64(n_starts))
    return (origin + np.argsort(words[1:], kind="stable") * seq_len) % n_starts


def covering_starts(seed: int, first: int, count: int, n_starts: int, seq_len: int) -> np.ndarray:
    """Starts of the run's slices number `first`, … `first + count - 1`, pass after pass."""
    per_pass = math.ceil(n_starts / seq_len)
    numbers = np.arange(first, first + count)
    parts = []
    for number in range(first // per_pass, (first + count - 1) // per_pass + 1):
        of_pass = numbers[numbers // per_pass == number] % per_pass
        parts.append(pass_starts(seed, number, n_starts, seq_len)[of_pass])
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """x W' + b, (…, in_features) -> (…, out_features)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class CausalSelfAttention(nn.Module):
    """Multi-head attention; a token sees itself and those before it: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, head_dim)
        if cache is None:
            y = causal_attention(q, k, v, self.dropout if self.training else 0.0)
        else:
            y = cache.attention(q, k, v)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


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

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. The output head is `wte` itself (tied): no second copy can drift or be saved."""

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
        scaled so that their sum keeps its variance (GPT-2 paper, section 2.3)."""
        generator = torch.Generator().manual_seed(config.seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                scale = (2 * config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=config.init_std * scale, generator=generator)

    def features(self, tokens: torch.Tensor, caches: list[KVCache] | None = None) -> torch.Tensor:
        """(B, T) int64 token ids to (B, T, C) normalised hidden states; T is at most block_size.

        With a cache for each block, the tokens stand behind those that it holds, and see them.
        """
        first = caches[0].length if caches else 0
        end = first + tokens.shape[1]
        assert self.block_size >= end, f"{end} tokens exceed block_size {self.block_size}"
        x = self.wte(tokens) + self.wpe(torch.arange(first, end, device=tokens.device))
        x = F.dropout(x, self.dropout, self.training)
        for layer, block in enumerate(self.h):
            x = block(x, caches[layer] if caches else None)
        return self.ln_f(x)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Hidden states (…, C) to scores of the next token (…, V)."""
        return linear(features, self.wte.weight)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, V) for token ids (B, T); with targets (B, T), their mean loss in nats."""
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
    """AdamW, and with --optimizer muon Muon for the matrices of the blocks.

    Each parameter is in one group. Biases and LayerNorms do not decay.
    """
    decay = config.weight_decay
    matrices = [p for p in model.h.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    others = [model.wte.weight, model.wpe.weight]
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if config.optimizer == "muon":
        dtype = torch.bfloat16 if config.amp == "bf16" else torch.float32
        optimizers["muon"] = Muon(matrices, lr=config.lr, weight_decay=decay, dtype=dtype)
    else:
        others += matrices
    groups = [{"params": others, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = torch.device(config.device).type in ("cuda", "cpu", "mps")
    betas = (config.beta1, config.beta2)
    optimizers["adamw"] = torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=fused)
    return optimizers


def learning_rate(step: int, config: Config) -> float:
    """Rate of optimizer step 1, 2, …: linear warm-up, down to min_lr at decay_steps, then flat."""
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


def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, **options) -> list[list]:
    """Each prompt with the tokens that `continuations` adds to it; `end` is left out."""
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
    `context` is the longest slice the model was trained on: positions beyond it are untrained, so
    each token depends on the `context` tokens before it. The rest is as in `choose`, with a
    generator for each prompt.
    """
    device = model.wte.weight.device
    tokens = torch.tensor(prompts, device=device)  # (B, T)
    caches = [KVCache(context) for _ in model.h]
    chosen = [end] * len(prompts)
    ended = [False] * len(prompts)
    with evaluating(model):
        for _ in range(max_new_tokens):
            look_for_signals()
            logits = model.logits(last_features(model, tokens, context, caches))  # (B, V)
            logits = logits.float().cpu().nan_to_num()
            for row, generator in enumerate(generators):
                if not ended[row]:
                    chosen[row] = choose(logits[row], temperature, top_k, top_p, generator)
            tokens = torch.cat([tokens, torch.tensor(chosen, device=device)[:, None]], 1)
            yield list(chosen)
            ended = [token == end for token in chosen]
            if all(ended):
                return


def last_features(
    model: GPT, tokens: torch.Tensor, context: int, caches: list[KVCache]
) -> torch.Tensor:
    """Hidden states (B, C) of the last of the tokens (B, T), which sees `context` - 1 before it.

    Up to the context, what the caches hold is not computed again. Beyond it every token stands at
    a new position each time, so all are.
    """
    if tokens.shape[1] <= context:
        return model.features(tokens[:, caches[0].length :], caches)[:, -1]
    return model.features(tokens[:, -context:])[:, -1]


def corpus_losses(
    model: GPT, tokens: np.ndarray, config: Config, step: int, first: int, end: int
) -> torch.Tensor:
    """Losses, float64 (end - first,), nats per token, of random slices number `first` to `end` - 1.
    They are drawn for this step alone: at each step others are measured."""
    starts = slice_starts(config.seed, EVALUATION_STREAM + step, end, len(tokens) - config.seq_len)
    return slice_losses(model, take_slices(tokens, starts[first:], config.seq_len), config)


def mean_and_error(losses: torch.Tensor) -> tuple[float, float]:
    """The mean of independent losses, and its standard error; 0, unknown, of a single one."""
    error = losses.std() / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    return losses.mean().item(), float(error)


def validation_loss(model: GPT, tokens: np.ndarray, config: Config) -> tuple[float, float]:
    """Mean loss, nats per token, and its standard error, over the same slices every time.

    They are evenly spread, `VAL_TOKENS` at most.
    """
    n_slices = max(1, min(VAL_TOKENS, len(tokens) - 1) // config.seq_len)
    starts = np.linspace(0, len(tokens) - 1 - config.seq_len, n_slices).astype(np.int64)
    return mean_and_error(slice_losses(model, take_slices(tokens, starts, config.seq_len), config))


def slice_losses(model: GPT, slices: torch.Tensor, config: Config) -> torch.Tensor:
    """Mean loss of each slice (n, T + 1), float64 (n,), nats per token."""
    losses = []
    told = waiting("Measuring the loss", len(slices), "slices")
    with told as bar, evaluating(model), autocast(config):
        for chunk in slices.split(config.micro_batch):
            look_for_signals()
            chunk = chunk.to(config.device)
            features = model.features(chunk[:, :-1]).flatten(0, 1).split(HeadLoss.BLOCK)
            targets = chunk[:, 1:].flatten().split(HeadLoss.BLOCK)
            blocks = [
                F.cross_entropy(model.logits(f).float(), t, reduction="none")
                for f, t in zip(features, targets, strict=True)
            ]
            losses.append(torch.cat(blocks).view(len(chunk), -1).mean(1).cpu())
            bar.update(len(chunk))
    return torch.cat(losses).double()


# ---------------------------------------------------------------------------------------------
# Trainer
# ---------------------------------------------------------------------------------------------

FIRST_LOOK = 16  # slices of the first look at the corpus loss; each further look has twice as many
LOOK = 128  # slices without which no check is passed, if there are as many
EXACT = 0.015  # a standard error of at most this part of the target is exact enough
MAX_SKIPPED_IN_A_ROW = 20  # fp16 skips a few steps while it looks for its scale; 20 mean it is lost

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # inputs, targets -> mean loss


class TrainingFailed(RuntimeError):
    """The run cannot go on; the last good checkpoint is intact."""


class Trainer:
    """Model, optimizer, gradient scale and progress of one run: it learns, and knows no file."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        saved: SavedRun | None = None,
        ranks: Ranks | None = None,
    ):
        self.config = config
        self.corpus = corpus
        self.ranks = ranks or Ranks()
        self.device = torch.device(config.device)
        self.model = GPT(config).to(self.device)
        self.forward: Forward = self.model
        self.optimizers = build_optimizers(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.copying = torch.cuda.Stream() if self.device.type == "cuda" else None
        self.progress = Progress()
        if saved is not None:
            self._resume(saved)

    def _resume(self, saved: SavedRun) -> None:
        self.progress = saved.progress
        model, optimizer = saved.take_tensors()
        self.model.load_state_dict(model)
        del model  # before the optimizers hold as much again
        untouched = self.progress.skipped_steps >= self.progress.step
        restore_optimizers(self.optimizers, optimizer, untouched)
        if self.scaler.is_enabled() and saved.facts["scaler"]:
            self.scaler.load_state_dict(saved.facts["scaler"])
        self.progress.resumed(saved.config, self.config)

    def start_from(self, start: InitialWeights) -> None:
        """Begin with the weights of another run; positions that it did not have stay new."""
        known = start.model["wpe.weight"].to(self.device)
        new = self.model.wpe.weight.detach()[len(known) :]
        self.model.load_state_dict(start.model | {"wpe.weight": torch.cat([known, new])})
        self.progress.began_from(start.trained_context)

    def state(self) -> dict:
        """What a checkpoint needs to resume, and the flags and facts that tell whether it may."""
        optimizers = self.optimizers.items()
        return {
            **self.description(),
            "step": self.progress.step,
            "model": self.model.state_dict(),
            # The flags say the rest.
            "optimizer": {name: optimizer.state_dict()["state"] for name, optimizer in optimizers},
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
        }

    def description(self) -> dict:
        """What every checkpoint says about itself."""
        c, corpus = self.config, self.corpus
        vocabulary = {"name": c.tokenizer, "n_vocab": c.vocab_size, "content": corpus.vocabulary}
        return {
            "format": CHECKPOINT_FORMAT,
            "config": c.as_dict(),
            "origins": c.origins_as_dict(),
            "tokenizer": vocabulary,
            "trained_context": self.progress.trained_context,
            "corpus_sha256": corpus.sha256,
            "corpus_tokens": len(corpus.tokens),
            "val_sha256": corpus.val_sha256,
        }

    def compile(self) -> None:
        """Compile the forward pass if the config says so, for each length of slices to come.

        A compiler that fails, or computes something else, is reported; the run goes on without.
        """
        if self.config.compile == "off":
            return
        started = time.perf_counter()
        log.info(words.compiling_line(self.config))
        try:
            with waiting("Compiling", shown=self.ranks.rank == 0):
                self.forward = self._compiled_model()
            log.info("Compiled in %.0f s", time.perf_counter() - started)
        except Exception as error:  # Inductor, Triton and C++ compilers fail in many ways
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {excerpt(error)}"
            log.warning("torch.compile failed, going on without: %s", reason)
            failed = Origin(From.MACHINE, "torch.compile failed, see the log")
            self.config = decided(self.config, "compile", "off", failed)
        finally:
            self.model.zero_grad(set_to_none=True)

    def _compiled_model(self) -> Forward:
        """The model compiled, and compared with itself on slices of each length to come."""
        compiled: Forward = torch.compile(self.model, dynamic=False)
        first = self.progress.step + 1
        after_mixed = max(first, min(self.config.mixed_steps + 1, self.config.steps))
        for step in sorted({first, after_mixed}):
            found = self._first_gradients(step, compiled)
            try:
                expected = self._first_gradients(step, self.model, pieces=4)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):  # uncompiled it takes more memory
                    raise
            else:
                names = [name for name, _ in self.model.named_parameters()]
                check_compiled(found, expected, names, self.config)
            self.model.zero_grad(set_to_none=True)
            release_memory(self.device)
        return compiled

    def _first_gradients(self, step: int, forward: Forward, pieces: int = 1) -> list[float]:
        """Loss and gradient norms of a step's first micro-batches, one of each length of slices."""
        fits = self.config.micro_batch
        n_tokens = fits * self.config.seq_len
        slices = [micro_batches(part, n_tokens)[0] for part in self.slices(step)]
        if pieces > 1:
            loss = self.add_gradients(step, slices, forward, max(1, fits // pieces))
            return loss_and_gradient_norms(self.model, loss)
        loss, self.config = self.accumulate(step, slices, forward)
        norms = loss_and_gradient_norms(self.model, loss)
        if fits == self.config.micro_batch:
            return norms
        return self._first_gradients(step, forward)  # memory ran out: again with what fits

    def slices(self, step: int) -> list[torch.Tensor]:
        """This process's share of one step's slices, (share, T + 1), on the device; of a mixed
        step in two parts."""
        c = self.config
        tokens = self.corpus.tokens
        n_starts = len(tokens) - c.seq_len
        if c.slices == "shuffled":
            earlier = (step - 1) * c.global_batch
            starts = covering_starts(c.seed, earlier, c.global_batch, n_starts, c.seq_len)
        else:
            starts = slice_starts(c.seed, step, c.global_batch, n_starts)
        first = self.ranks.rank * c.share
        slices = take_slices(tokens, starts[first : first + c.share], c.seq_len)
        parts = whole_and_quarters(slices, first) if step <= c.mixed_steps else [slices]
        if self.device.type == "cuda":
            return [part.pin_memory().to(self.device, non_blocking=True) for part in parts]
        return [part.to(self.device) for part in parts]

    def accumulate(
        self, step: int, slices: list[torch.Tensor], forward: Forward
    ) -> tuple[torch.Tensor, Config]:
        """Add gradients as `add_gradients` does. Returns its loss, and the config from here on.

        When memory runs out, the micro-batch shrinks to the next smaller divisor of the global
        batch: the same slices, and to rounding the same gradients.
        """
        config = self.config
        while True:
            try:
                return self.add_gradients(step, slices, forward, config.micro_batch), config
            except (RuntimeError, MemoryError) as error:
                if config.micro_batch == 1 or not is_out_of_memory(error):
                    raise
            # Here and not in the handler, whose traceback keeps the failed pass's tensors alive.
            self.model.zero_grad(set_to_none=True)
            tried = config.micro_batch
            smaller = largest_divisor(config.share, tried - 1)
            log.warning(
                f"Out of memory with {tried} slices in a micro-batch; from step {step} on with "
                f"{smaller}: the same slices and, but for rounding and dropout, the same results"
            )
            reason = Origin(From.MEMORY, f"{tried} took more than there is")
            config = decided(config, "micro_batch", smaller, reason)
            release_memory(self.device)

    def add_gradients(
        self, step: int, slices: list[torch.Tensor], forward: Forward, at_once: int
    ) -> torch.Tensor:
        """Add the gradients of the mean loss over all tokens of these slices, of which so many
        whole ones fit into memory.

        Returned is the mean loss of the whole slices, a scalar on the device: 0 without any.
        """
        if self.config.dropout:
            seeds = random_words(self.config.seed, DROPOUT_STREAM + step, self.ranks.count)
            torch.manual_seed(int(seeds[self.ranks.rank]))
        n_tokens = sum(part[:, 1:].numel() for part in slices)
        n_whole = sum(part[:, 1:].numel() for part in slices if self._are_whole(part))
        mean = torch.zeros((), device=self.device)
        parts = [micro_batches(part, at_once * self.config.seq_len) for part in slices]
        for micro_batch in chain.from_iterable(parts):
            inputs = micro_batch[:, :-1]
            targets = micro_batch[:, 1:]
            with autocast(self.config):
                loss = forward(inputs, targets)
            share = loss / (n_tokens / targets.numel())  # learned from is the mean over all tokens
            self.scaler.scale(share).backward()
            if self._are_whole(micro_batch):
                mean += loss.detach() / (n_whole / targets.numel())
        return mean

    def _are_whole(self, slices: torch.Tensor) -> bool:
        return slices.shape[1] == self.config.seq_len + 1

    def update(self) -> tuple[float, float, float]:
        """One optimizer update. Returns loss (before it), gradient norm (before clipping), rate.

        The loss is that of the step's whole slices, in a mixed step too: so all steps compare. A
        step whose loss or gradient is not finite leaves all weights and all of the optimizer
        alone; too many in a row raise TrainingFailed.
        """
        step = self.progress.step + 1
        slices = self.slices(step)
        loss, self.config = self.accumulate(step, slices, self.forward)
        config = self.config
        # So that the mean over the ranks is that of all whole slices: a rank may have none.
        n_whole = sum(len(part) for part in slices if self._are_whole(part))
        loss = loss * (n_whole * self.ranks.count / config.whole_slices(step))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.ranks.average([loss, *gradients])
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad or math.inf)
        loss, grad_norm = torch.stack([loss, norm]).tolist()  # the one host read

        lr = learning_rate(step, config)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if self.copying is not None:
            # A snapshot of the weights may be under way.
            torch.cuda.current_stream().wait_stream(self.copying)
        if finite:
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        self.progress.made_step(config, loss, grad_norm, lr, finite)
        skipped = self.progress.skipped_in_a_row
        if skipped >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingFailed(
                f"loss or gradient was not finite in {skipped} steps in a row, the last being step "
                f"{step}: go on with a lower --lr, or with --amp off"
            )
        return loss, grad_norm, lr

    @contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """Around work that training does not depend on: where it fails, that is a warning."""
        try:
            yield
        except Exception as error:  # backends fail in many ways
            reason = f"{type(error).__name__}: {excerpt(error)}"
            step = self.progress.step
            log.warning("%s failed at step %d, the run goes on without: %s", what, step, reason)

    def validate(self) -> float | None:
        """Measure the validation loss of the present weights; None when that fails."""
        tokens = self.corpus.val_tokens
        assert tokens is not None, "there is no validation split"
        loss = None
        with self.telling("The validation"):
            loss, error = validation_loss(self.model, tokens, self.config)
            self.progress.validated(loss, error)
        if loss is not None and not math.isfinite(loss):
            step = self.progress.step
            remedy = "go on with a lower --lr"
            raise TrainingFailed(f"the validation loss of step {step} is not finite: {remedy}")
        return loss

    def found_best(self, loss: float) -> None:
        """The present weights are the best so far, by this loss, and are kept."""
        self.progress.found_best(loss)

    def forget_best(self) -> None:
        """The best so far does not compare with what comes."""
        self.progress.forget_best()

    def sample(self, tokenizer: Tokenizer) -> tuple[str, list[str]]:
        """The prompt, and num_prompts texts that continue it."""
        c, p = self.config, self.progress
        beginning = whole_characters(tokenizer, self.corpus.tokens[:16].tolist())
        prompt = decode_escapes(c.prompt) or "".join(beginning)
        start = encode_prompt(prompt, tokenizer)
        seeds = random_words(c.seed, SAMPLES_STREAM + p.step, c.num_prompts)
        with autocast(for_sampling(c, len(start) + c.max_new_tokens <= p.trained_context)):
            outputs = generate(
                self.model,
                [start] * c.num_prompts,
                c.max_new_tokens,
                context=p.trained_context,
                temperature=c.temperature,
                top_k=c.top_k,
                generators=[torch.Generator().manual_seed(int(seed)) for seed in seeds],
                end=tokenizer.eot_token,
            )
        p.sampled()
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
            p.failed_check(self.config)
            if p.corpus_measured:
                log.info(words.failed_check_line(p, self.config))

    def measure_corpus_loss(self, at_end: bool = False) -> None:
        """Measure the mean loss over random slices drawn for this step alone, into the progress.

        There are a tenth as many as were trained, but 64 to 4,096; fewer when the loss clearly is
        above the target, or from 128 on exact enough. At the end there are at least a tenth, but
        64 to 1,024.
        """
        c, p = self.config, self.progress
        tenth = max(64, p.tokens // c.seq_len // 10)
        usual = min(1024, tenth)
        is_checked = c.target_loss and not c.one_low_step_is_enough
        most = min(4096, tenth) if is_checked else usual
        log.info(words.measuring_line(most, c, p))
        n_slices = usual if at_end else min(FIRST_LOOK, most)
        losses = torch.zeros(0, dtype=torch.float64)
        while True:
            first = len(losses)
            more = corpus_losses(self.model, self.corpus.tokens, c, p.step, first, n_slices)
            losses = torch.cat([losses, more])
            mean, error = mean_and_error(losses)
            errors = 2 if n_slices >= LOOK else 3  # few slices tell little of their spread
            is_above = mean - errors * error > c.target_loss
            is_exact = n_slices >= LOOK and error <= EXACT * c.target_loss
            if n_slices == most or is_above or is_exact:
                break
            n_slices = min(2 * n_slices, most)
        p.measured_corpus(mean, error, n_slices)

    def told(self, elapsed_sec: float) -> None:
        """Note that the latest step is measured and logged, `elapsed_sec` seconds into the run."""
        self.progress.told(elapsed_sec)


# ---------------------------------------------------------------------------------------------
# BestWeights and Saver
# ---------------------------------------------------------------------------------------------

REDRAW_SEC = 60  # between two plots of a run that goes on


class BestWeights:
    """The weights of the best step, from when they are found until best.pt holds them."""

    def __init__(self, run: RunDir, stream: "torch.cuda.Stream | None"):
        self.run = run
        self.found: dict | None = None  # what best.pt is to hold, while it is not on disk
        self.set_aside: Path | None = None  # where the best.pt of an earlier start is to be moved
        self.snapshots = (Snapshot(stream), Snapshot(stream))
        self._latest = self._written = self.snapshots[0]

    def keep(self, step: int, loss: float, weights: dict) -> bool:
        """Copy the weights. False without memory for it: write them before they change."""
        self._latest = next(one for one in self.snapshots if one is not self._written)
        self.found = {"step": step, "loss": loss, "model": self._latest.take(weights)}
        return self._latest.is_copy

    def hand_over(self) -> dict | None:
        """What `write` is to write; what is found from here on goes into another copy."""
        self._written = self._latest
        return self.found

    def write(self, found: dict, description: dict) -> None:
        """Write best.pt, possibly on a thread of its own. Raises OSError."""
        self._written.wait()
        previous = self.set_aside
        if previous is not None and previous.exists():
            previous = None
        write_checkpoint(self.run.best, description | found, previous)

    def written(self, found: dict, config: Config) -> None:
        """Say that best.pt holds these."""
        log.info(words.best_line(found["loss"], found["step"], config, self.run.best))
        if self.found is found:
            self.found = None


class Saver:
    """What is written when: samples at once; checkpoints, results and plot in the background.

    `launch` is what config.json says of this start, `saved_step` that of the checkpoint on disk, 0
    without one.
    """

    def __init__(self, run: RunDir, trainer: Trainer, launch: dict, saved_step: int):
        self.run = run
        self.trainer = trainer
        self.launch = launch
        self.saved_step = saved_step
        self.floor = loss_floor(trainer.corpus.tokens, trainer.config.seq_len)
        self.writer = Writer(run)
        self.snapshot = Snapshot(trainer.copying)
        self.best = BestWeights(run, trainer.copying)
        self.start_step = trainer.progress.step  # before the first one of this start
        self.begun_step = trainer.progress.step  # of the latest checkpoint, on disk or not
        # So that there is a plot within the first minute.
        self.redrawn = time.monotonic() - REDRAW_SEC / 2

    def config_json(self) -> dict:
        """What config.json is to say now."""
        config = self.trainer.config
        flags = {"config": config.as_dict(), "origins": config.origins_as_dict()}
        return self.launch | flags

    def write_config(self, values: dict) -> None:
        """Write config.json, and the vocabulary if it is not GPT-2's. Raises OSError."""
        self.run.check_owner()
        vocabulary = self.trainer.corpus.vocabulary
        if vocabulary:
            write_whole(self.run.tokenizer_json, vocabulary.encode())
        self.run.write_json(self.run.config_json, values)

    def sample(self, tokenizer: Tokenizer, remark: str = "") -> None:
        """Append texts of the model as it is now to samples.txt."""
        trainer = self.trainer
        if trainer.config.num_prompts:
            with trainer.telling("The sample"):
                with waiting("Sampling"):
                    prompt, outputs = trainer.sample(tokenizer)
                step = trainer.progress.step
                self.run.append_samples(step, prompt, outputs, remark)
                log.info(words.sample_line(step, prompt, outputs[0]))

    def validate(self) -> float | None:
        """Measure the validation loss, None if that fails, and keep the weights if it is lowest."""
        val_loss = self.trainer.validate()
        if val_loss is not None and val_loss < self.trainer.progress.best_loss:
            self.keep_best(val_loss)
        return val_loss

    def consider_window_loss(self, at_end: bool = False) -> None:
        """Keep the weights if window_loss is the lowest so far."""
        loss = self.trainer.progress.possible_best(self.trainer.config, at_end)
        if loss is not None:
            self.keep_best(loss)

    def keep_best(self, loss: float) -> None:
        """Keep the weights as the best: a copy for the next save, or without memory best.pt now."""
        trainer = self.trainer
        is_copy = self.best.keep(trainer.progress.step, loss, trainer.model.state_dict())
        if is_copy or self._write_best():
            trainer.found_best(loss)

    def _write_best(self) -> bool:
        """Write what is found to best.pt, now; otherwise forget it: these weights will change."""
        self.writer.finish()
        found = self.best.hand_over()
        if found is not None:
            with self.run.attempt("best.pt"):
                self.best.write(found, self.trainer.description())
                self.best.written(found, self.trainer.config)
        was_written = self.best.found is None
        self.best.found = None
        return was_written

    def save_if_due(self) -> bool:
        """Begin a checkpoint every save_every steps, as soon as nothing else is written."""
        p = self.trainer.progress
        every = self.trainer.config.save_every
        is_due = p.step // every > self.begun_step // every
        if not is_due or p.skipped_in_a_row or self.writer.busy:
            return False
        self.save()
        return True

    def save(self) -> None:
        """Begin to write a checkpoint, then results and plot; an earlier save is waited for.

        Raises FileExistsError when the directory belongs to another run.
        """
        self.writer.finish()  # its buffers are about to be overwritten
        self.run.check_owner()
        self.begun_step = self.trainer.progress.step
        size = gigabytes(STATE_BYTES * self.trainer.config.n_params)
        name = f"{self.run.last} of {size}"
        try:
            task = self._checkpoint(name)
        except OSError as error:
            self.run.note(name, error)
            return
        self.writer.start([task, *self._outcome(StopReason.RUNNING, redraw=self._plot_is_old())])
        if not self.snapshot.is_copy:
            self.writer.finish()

    def save_news(self) -> None:
        """Save unless the latest step and the best are on disk already. Raises as `save` does."""
        self.writer.finish()
        if self.trainer.progress.step != self.saved_step or self.best.found is not None:
            self.save()
            self.writer.finish()

    def refresh(self) -> None:
        """Write results and plot for whoever looks now, when old and nothing else is written."""
        has_steps = self.trainer.progress.step > self.start_step
        if has_steps and self._plot_is_old() and not self.writer.busy:
            self.writer.start(self._outcome(StopReason.RUNNING))

    def _plot_is_old(self) -> bool:
        return time.monotonic() - self.redrawn >= REDRAW_SEC

    def _checkpoint(self, name: str) -> Task:
        """A snapshot of everything resume needs, to be written as last.pt, after a best that is
        not on disk yet: last.pt never speaks of a best that is not there. Raises OSError."""
        self.run.make()
        trainer = self.trainer
        step = trainer.progress.step
        best = self.best.hand_over()
        description = trainer.description()
        state = self.snapshot.take(trainer.state() | self.run.mark())
        previous = None if step == self.saved_step else self.run.prev  # that of an earlier step

        def write() -> None:
            self.run.sync()
            if best is not None:
                self.best.write(best, description)
            self.snapshot.wait()
            write_checkpoint(self.run.last, state, previous)

        def done() -> None:
            if best is not None:
                self.best.written(best, trainer.config)
            log.info("Saved checkpoint: %s", self.run.last)
            self.saved_step = step

        return Task(name, write, done)

    def _outcome(self, stop: str, redraw: bool = True) -> list[Task]:
        """config.json, results.json and the plot, as things stand now."""
        trainer = self.trainer
        config = self.config_json()
        results = words.results(trainer.config, trainer.progress, trainer.corpus, self.floor, stop)

        def write() -> None:
            self.write_config(config)
            self.run.write_json(self.run.results_json, results)

        tasks = [Task("config.json and results.json", write)]
        if redraw:
            self.redrawn = time.monotonic()
            tasks.append(Task("the plot", self._draw_plot))
        return tasks

    def _draw_plot(self) -> None:
        """Refresh loss_curve.png. Raises OSError whatever the reason: it costs the run no more."""
        try:
            from update_readme import draw_loss_curve

            self.run.check_owner()
            draw_loss_curve(self.run.root)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    def publish(self, stop: str) -> None:
        """Write how the run stands, and wait until it is written."""
        self.writer.start(self._outcome(stop))
        self.writer.finish()

    def rescue(self, stop: str) -> None:
        """After a failure: write the best if best.pt does not hold it yet, and the results."""
        self._write_best()
        self.publish(stop)


# ---------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------


STOPS = (None, *SIGNALS, *COMPLETE)  # where processes differ, the last of their reasons counts


def agreed_stop(trainer: Trainer, interruption: Interruption) -> str | None:
    """Why all processes stop now: a StopReason, or the name of a signal; None while they go on.

    The first process knows when the run is over; a signal may come to any.
    """
    own = interruption.signal_name
    if trainer.ranks.rank == 0:
        own = trainer.progress.stop_reason(trainer.config) or own
    return STOPS[trainer.ranks.largest(STOPS.index(own))]


def train(trainer: Trainer, saver: Saver, tokenizer: Tokenizer) -> str:
    """Run steps until one of the `COMPLETE` reasons, which is returned, or a signal, whose name is.

    A signal breaks off a measurement or a sample; the next start does it again.
    """
    config, p = trainer.config, trainer.progress
    with Interruption() as interruption, step_log(config, p, trainer.corpus, saver.run) as steps:
        while True:
            with suppress(Interrupted):
                tell_and_save(trainer, saver, tokenizer, steps)
            stop = agreed_stop(trainer, interruption)
            if stop is not None:
                break
            saver.writer.collect()
            trainer.update()

        saver.save_news()
        if stop in COMPLETE:
            try:
                stop = conclude(trainer, saver, tokenizer, stop)
            except Interrupted as interrupted:
                stop = interrupted.signal_name
        saver.writer.finish()
        has_news = p.step > saver.start_step and p.step != p.sampled_step
        if stop == "SIGINT" and has_news and config.num_prompts:
            log.info("Sampling once more; Ctrl-C leaves it out ...")
            Interruption.current = None
            with suppress(KeyboardInterrupt):
                saver.sample(tokenizer, AT_CTRL_C)
    return stop


def tell_and_save(trainer: Trainer, saver: Saver, tokenizer: Tokenizer, steps: StepLog) -> None:
    """Tell of the step just done, then save and sample where it is time. Raises Interrupted."""
    config, p = trainer.config, trainer.progress
    if p.untold:
        tell(trainer, saver, steps)
    if p.stop_reason(config):
        return
    if saver.save_if_due():
        steps.eta()
    if sample_is_due(p, config):
        saver.sample(tokenizer)
    saver.refresh()


def tell(trainer: Trainer, saver: Saver, steps: StepLog) -> None:
    """Measure and log what there is to tell of a step. Raises Interrupted: it is untold then."""
    config, p = trainer.config, trainer.progress
    val_loss = None
    trainer.check_target()
    stops = p.stop_reason(config) is not None
    if config.validates and (stops or p.step % config.eval_every == 0):
        # First, so that a kill during the last measurements costs no step.
        if stops and p.step != saver.saved_step:
            saver.save()
        val_loss = saver.validate()
    elif not config.validates and (stops or p.step % config.target_window == 0):
        saver.consider_window_loss(at_end=stops)
    trainer.told(steps.elapsed_sec())
    steps.step(val_loss)


def sample_is_due(p: Progress, config: Config) -> bool:
    """Whether to sample after this step: every sample_every steps, and once after half as many."""
    is_due = p.step % config.sample_every == 0 or p.step == config.sample_every // 2
    return is_due and p.step != p.sampled_step


def conclude(trainer: Trainer, saver: Saver, tokenizer: Tokenizer, stop: str) -> str:
    """Measure, tell and sample at the end of a run that is saved already, then save it again.

    Returns why it stopped. Raises Interrupted.
    """
    config, p = trainer.config, trainer.progress
    if not p.corpus_reached(config):
        with trainer.telling("The corpus loss"):
            trainer.measure_corpus_loss(at_end=True)
        stop = p.stop_reason(config) or stop
    if config.validates and p.val_step != p.step:
        saver.validate()
        saver.save_news()
    for line in words.ending(p, config, trainer.corpus, stop):
        log.info(line)
    if p.step != p.sampled_step:
        saver.sample(tokenizer)
    saver.save()
    return stop


def follow(config: Config, trainer: Trainer) -> None:
    """What every process but the first does: its share of each step, until the first has enough.

    It returns as usual even if the run fails: if this process ended with an error, torchrun would
    kill the first one before it has saved. Raises OSError.
    """
    configure_torch(config)
    if not config.dry_run:
        trainer.compile()
    with Interruption(silent=True) as interruption, suppress(TrainingFailed):  # the first says so
        while agreed_stop(trainer, interruption) is None:
            trainer.update()


# ---------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------

OUT_OF_MEMORY = "Out of memory: choose a smaller --seq_len or --preset. (%s)"


def build_trainer(setup: Setup, ranks: Ranks) -> Trainer:
    """The trainer, at the step of the checkpoint. In a dry run all its slices are whole: these take
    the most time and memory.

    Raises ValueError when the checkpoint does not fit.
    """
    config = replace(setup.config, mixed_steps=0) if setup.config.dry_run else setup.config
    try:
        trainer = Trainer(config, setup.corpus, setup.saved, ranks)
    except (RuntimeError, MemoryError, ValueError, TypeError, KeyError, AttributeError) as error:
        if is_out_of_memory(error) or setup.saved is None:
            raise
        first_line = str(error).partition("\n")[0]
        reason = f"{type(error).__name__}: {first_line}"
        raise ValueError(f"{setup.saved.path} does not fit this model ({reason})") from error
    if setup.initial is not None:
        trainer.start_from(setup.initial)
    if not setup.best_compares:
        trainer.forget_best()
    return trainer


def announce(setup: Setup, progress: Progress, floor: float) -> None:
    """Say what will happen, and what of it cannot go well."""
    for line in words.plan(setup.config, setup.corpus, floor, progress):
        log.info(line)
    for line in words.plan_warnings(setup.config, setup.corpus, floor, cpu_only_hint()):
        log.warning(line)


def begin(setup: Setup, trainer: Trainer, saver: Saver) -> None:
    """Say what will happen, and compile."""
    run, progress = setup.run, trainer.progress
    announce(setup, progress, saver.floor)
    if setup.saved is not None:
        announce_resume(setup.saved, setup.config)
    if setup.initial is not None:
        log.info("Starting from the weights of %s%s", setup.initial.path, setup.initial.remark)
    if progress.best_step and not run.best.exists():
        log.warning("%s is missing: the best from here on will be written there", run.best)
        trainer.forget_best()
    elif not progress.best_step and run.best.exists():
        kept = first_free(run.best)
        saver.best.set_aside = kept
        not_compared = "does not compare with the losses from here on"
        log.info("%s %s: it will be kept as %s", run.best, not_compared, kept)
    trainer.compile()


def announce_resume(saved: SavedRun, config: Config) -> None:
    """Say where the run goes on, and what is different from here on."""
    log.info("Resuming from step %d (%s)", saved.step, saved.path)
    changes = words.changes(saved.facts["config"], config)
    if changes:
        log.info("Changed from here on: %s", changes)
    before = learning_rate(saved.step, saved.config)
    lr = learning_rate(saved.step + 1, config)
    if lr > 1.1 * before and saved.step > config.warmup_steps:
        log.warning("The learning rate rises here, from %.2e to %.2e", before, lr)


def run_training(setup: Setup, trainer: Trainer) -> int:
    """Train, measure, and leave every file of the run whole. Returns the exit code."""
    run = setup.run
    facts = None if setup.saved is None else setup.saved.facts
    before = read_json(run.config_json)
    machine = environment(setup.config.device)
    launch = launch_record(setup.argv, setup.config, setup.corpus, facts, before, machine)
    saver = Saver(run, trainer, launch, trainer.progress.step if setup.continues else 0)
    saver.write_config(saver.config_json())
    try:
        configure_torch(setup.config)
        begin(setup, trainer, saver)
        stop = train(trainer, saver, setup.tokenizer)
        return end_training(setup, trainer, saver, stop)
    except TrainingFailed as failure:
        saver.rescue(StopReason.FAILED)
        good = "there is no checkpoint yet"
        if saver.saved_step:
            good = f"the last good checkpoint, of step {saver.saved_step}, is in {run.last.parent}"
        log.error("Training failed: %s; %s", failure, good)
    except ConnectionError as error:
        saver.rescue(StopReason.INTERRUPTED)
        again = way_on(setup, saver, f" from step {saver.saved_step}")
        log.error("After step %d: %s. %s", trainer.progress.step, error, again)
    except (RuntimeError, MemoryError) as error:
        saver.rescue(StopReason.FAILED)
        if not is_out_of_memory(error):
            raise
        log.error(OUT_OF_MEMORY, error)
    return 1


def way_on(setup: Setup, saver: Saver, since: str = "") -> str:
    """The command that goes on with the run."""
    return how_to_continue(setup.argv, setup.config, saver.saved_step > 0, since)


def end_training(setup: Setup, trainer: Trainer, saver: Saver, stop: str) -> int:
    """Publish the results, and say what came of the run. Returns the exit code."""
    run, config, progress = setup.run, trainer.config, trainer.progress
    if stop in COMPLETE:
        saver.publish(stop)
    elif saver.saved_step:
        saver.publish(StopReason.INTERRUPTED)
    missing = run.missing()
    if missing:
        again = way_on(setup, saver, f" from step {saver.saved_step}")
        at_end = f"At the end, step {progress.step}"
        log.error(f"{at_end}, these could not be written: {missing}. {again}")
        return 1
    if stop not in COMPLETE:
        log.info(f"Interrupted by {stop} after step {progress.step}. {way_on(setup, saver)}")
        return exit_code(stop)
    files = [str(path) for path in (run.loss_curve, run.samples_txt) if has_content(path)]
    log.info("See %s", " and ".join(files) or run.train_log)
    log.info(verdict(config, progress, saver.floor, stop))
    log.info(words.next_command(setup.config))
    log.info("Training complete.")
    return 0


def rehearse(setup: Setup, trainer: Trainer) -> int:
    """Say what a run would do, and measure two steps; write nothing. Returns the exit code."""
    config = setup.config
    configure_torch(config)
    announce(setup, trainer.progress, loss_floor(setup.corpus.tokens, config.seq_len))
    step = trainer.progress.step
    log.info(words.rehearsing_line(config))
    with waiting("Measuring two steps", total=2, unit="steps") as bar:
        for _ in range(2):  # the first step of a process takes longer
            started = time.perf_counter()
            trainer.ranks.largest(STOPS.index(None))  # the others take part
            trainer.update()
            bar.update()
    seconds = time.perf_counter() - started
    trainer.ranks.largest(STOPS.index(StopReason.STEPS))  # they end
    memory = peak_memory(config.device)
    for line in words.rehearsal(config, step, seconds, memory, setup.run.free_bytes()):
        log.info(line)
    return 0


def open_and_train(setup: Setup, trainer: Trainer, log_file: LogFile) -> int:
    """Bring the run directory to where training starts, and train. Returns the exit code.

    Raises OSError.
    """
    run, saved = setup.run, setup.saved
    in_the_way = run.has_outcome() or setup.config.resume == "never" or not run.is_ours()
    if not setup.continues and run.exists() and in_the_way:
        log.info("Moved the run that was here to %s", run.move_aside())
    run.make()
    with log_file.of(run):
        if saved is not None and saved.damage:
            damaged = run.last.with_name("damaged.pt")
            move(run.last, damaged)
            log.warning("%s: set aside as %s; going on from %s", saved.damage, damaged, saved.path)
        run.restore(saved.facts if saved is not None and setup.continues else {})
        with writing_events(run, setup.config):
            return run_training(setup, trainer)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 failed, 2 bad input, 130 or 143 interrupted."""
    logging.raiseExceptions = False  # a closed pipe must not flood the terminal; the log goes on
    ranks = Ranks()
    try:
        ranks = Ranks.join()
        with terminating(), speaking("train.py", ranks.rank > 0), ExitStack() as held:
            code = run_command(sys.argv[1:] if argv is None else argv, ranks, held)
    except ConnectionError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt as broken_off:
        code = exit_code(name_of(broken_off))
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
    """Prepare, then train, rehearse, or say that nothing is left to do. Returns the exit code."""
    log_file = LogFile()
    held.enter_context(logging_to(log_file))
    try:
        setup, trainer = ready(argv, ranks, held)
    except SystemExit as answered:  # after --help
        return int(answered.code or 0)
    except ValueError as error:
        if ranks.rank == 0:
            for line in str(error).splitlines():
                print(f"train.py: error: {line}", file=sys.stderr)
        return 2
    if ranks.rank > 0:
        if trainer is not None:
            follow(setup.config, trainer)
        return 0
    try:
        if trainer is None:
            return say_finished(setup)
        if setup.config.dry_run:
            return rehearse(setup, trainer)
        return open_and_train(setup, trainer, log_file)
    except KeyboardInterrupt as broken_off:
        if setup.config.dry_run:
            log.error("Broken off; a dry run saves nothing.")
        else:
            is_saved = setup.run.last.exists() or setup.run.prev.exists()
            since = " from the last checkpoint"
            again = how_to_continue(argv, setup.config, is_saved, since)
            log.error("Broken off; what was saved before is whole. %s", again)
        return exit_code(name_of(broken_off))
    except OSError as error:
        log.error("%s; what was written before is intact", error)
        return 1


def ready(argv: list[str], ranks: Ranks, held: ExitStack) -> tuple[Setup, Trainer | None]:
    """The setup, and the trainer for it: None as trainer when the run is finished already.

    Raises ValueError, a line for each problem of any process; SystemExit after --help.
    """
    setup = trainer = None
    problem = ""
    try:
        setup = prepare(argv, ranks, held, about=__doc__)
        if not setup.finished:
            trainer = build_trainer(setup, ranks)
            if ranks.rank == 0:
                n_params = setup.config.n_params
                sizes = (STATE_BYTES * n_params, WEIGHT_BYTES * n_params)
                setup.run.check_room(*sizes, fresh=setup.saved is None)
                if not setup.config.dry_run and setup.run.lock is None:
                    held.enter_context(setup.run.locked())
    except (ValueError, OSError) as error:
        problem = str(error) or type(error).__name__
    agree(ranks, setup, problem)
    assert setup is not None, "it is, without a problem"
    return setup, trainer


def say_finished(setup: Setup) -> int:
    """Say that nothing is left to do. Returns the exit code."""
    log.info(setup.finished)
    if setup.config.tensorboard and not setup.config.dry_run:  # turned on when the run was over
        setup.run.make()
        with writing_events(setup.run, setup.config):
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
