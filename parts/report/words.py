"""Numbers to words: plan, warnings, lines of the log, results. Functions of plain values."""

import math
import shlex
import statistics
import time
from datetime import datetime, timedelta
from pathlib import Path

from parts import VERSION
from parts.commandline import flag_words, shell_line, value_of
from parts.flags import BY_USER, Config, From, text_names
from parts.progress import COMPLETE, Progress, StopReason, overfits
from parts.recipe import LAW_TARGET, Text, usual_steps
from parts.report.provenance import changed, launch_words
from parts.run.directory import gigabytes
from parts.run.layout import STATE_BYTES, WEIGHT_BYTES, Row
from parts.text.corpus import Corpus, smallest_seq_len

STUCK_AFTER = 200  # steps after warm-up by which a healthy run is far below ln V
SHOWN_OF_SAMPLE = 200  # characters of a sampled text in the log
HEADINGS = {  # of the plan's lines about values that were neither typed nor constant
    From.RUN: "Kept from the run so far",
    From.PRESET: "From the preset",
    From.TEXT: "From the text",
    From.FLAGS: "From other flags",
    From.MACHINE: "From this machine",
    From.MEMORY: "From the memory",
}


def perplexity(loss: float | None) -> float | None:
    """exp(loss), infinite where that is beyond a float."""
    if loss is None:
        return None
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float | None, bytes_per_token: float) -> float | None:
    """Nats per token as bits per byte of text, which compare across vocabularies."""
    return None if loss is None else loss / math.log(2) / bytes_per_token


def plan(config: Config, corpus: Corpus, floor: float, progress: Progress) -> list[str]:
    """Lines that say what will happen."""
    c, n_tokens = config, len(corpus.tokens)
    planned = progress.tokens + (c.steps - progress.step) * c.tokens_per_step
    is_part = n_tokens < corpus.text_tokens
    part = f"the first {n_tokens:,} of {corpus.text_tokens:,}" if is_part else f"{n_tokens:,}"
    files = f" ({corpus.remark})" if corpus.remark else ""
    lines = [
        f"Run directory: {c.out_dir}",
        f"Model: GPT-2, {c.n_params:,} parameters ({c.n_layer} layers, {c.n_head} heads, width "
        f"{c.n_embd}, {c.block_size} positions, vocabulary {c.vocab_size})",
        f"Corpus: {text_names(c.input_file)}{files}, {part} tokens "
        f"({corpus.bytes_per_token:.3f} bytes each), sha256 {corpus.sha256[:16]}",
    ]
    if corpus.val_tokens is not None:
        files = f" ({corpus.val_remark})" if corpus.val_remark else ""
        line = f"Validation: {len(corpus.val_tokens):,} tokens{files}, never trained on"
        if corpus.yardstick is not None:
            compressor, bits = corpus.yardstick
            line += f"; {compressor} makes {bits:.3f} bits per byte of them"
        lines.append(line)
    lines.append(
        f"Step: batch_size {c.batch_size} x grad_accum {c.grad_accum} x seq_len {c.seq_len} = "
        f"{c.tokens_per_step:,} tokens; a pseudo-epoch of {n_tokens:,} tokens is "
        f"{n_tokens / c.tokens_per_step:,.1f} steps"
    )
    if c.mixed_steps:
        short, whole = c.slice_lengths(1)
        later = f" up to step {c.mixed_steps:,}, then {whole}" if c.mixed_steps < c.steps else ""
        lines.append(f"Slices: {short} and {whole} tokens long{later}")
    rule = f"for the mean of {c.target_window} steps, and then for random slices"
    if c.one_low_step_is_enough:
        rule = "by the classic rule: the first step at or below it, one alone"
    target = f"target {c.target_loss:g}, {rule}" if c.target_loss else "no target"
    estimate = " (an estimate)" if corpus.floor_is_an_estimate else ""
    return [
        *lines,
        f"Plan: {c.steps:,} steps = {planned:,} tokens = {planned / n_tokens:,.1f} pseudo-epochs; "
        f"lr {c.lr:g} after {c.warmup_steps} steps of warm-up, {c.min_lr:g} from step "
        f"{c.decay_steps:,}",
        f"Loss: ln V = {math.log(c.vocab_size):.3f} for a model that knows nothing; floor of this "
        f"corpus at seq_len {c.seq_len}: {floor:.4f}{estimate}; {target}",
        *origin_lines(c),
    ]


def origin_lines(config: Config) -> list[str]:
    """Every value that was neither typed nor constant, a line for each origin; then the device."""
    values = config.as_dict()
    silent = {"device", "out_dir", "prompt"}
    if not config.validates:
        silent.add("eval_every")
    told: dict[From, list[str]] = {source: [] for source in HEADINGS}
    for name, (source, reason) in config.origins.items():
        value = values[name]
        if source not in HEADINGS or name in silent or value in (None, ""):
            continue
        value = " ".join(value) if isinstance(value, list) else value
        why = f" ({reason})" if reason and source != From.RUN else ""
        told[source].append(f"{name} {value}{why}")
    lines = [f"{HEADINGS[source]}: {'; '.join(words)}" for source, words in told.items() if words]
    return [*lines, f"Device: {config.device} ({config.origins['device'].reason or '--device'})"]


def plan_warnings(
    config: Config, corpus: Corpus, floor: float, cpu_hint: str | None = None
) -> list[str]:
    """What the plan cannot reach or will not do well; `cpu_hint` is why a GPU is not used."""
    c, found = config, []
    if 0 < c.target_loss < floor:
        enough = smallest_seq_len(corpus.tokens, c.target_loss, c.block_size)
        way = f"nor at any --seq_len up to {c.block_size}"
        if enough:
            way = f"--seq_len {enough} is the smallest that can"
        found.append(
            f"--target_loss {c.target_loss:g} is below the floor {floor:.4f}: no model can reach "
            f"it at --seq_len {c.seq_len}; {way}"
        )
    usual = usual_steps(c, Text(0, len(corpus.tokens)))
    is_typed = c.origins["steps"].source in BY_USER
    holds = max(floor, LAW_TARGET / 2) < c.target_loss <= 2 * LAW_TARGET
    if is_typed and holds and not usual / 2 <= c.steps <= 2 * usual:
        per_pass = len(corpus.tokens) / c.tokens_per_step
        found.append(
            f"{c.steps / per_pass:,.3g} passes over this text; about {usual / per_pass:,.3g} are "
            f"usual (--steps {usual})"
        )
    if c.min_lr == 0 and (c.decay_steps < c.steps or c.steps == 1):
        found.append(
            f"The learning rate is 0 from step {c.decay_steps:,} on, and nothing is learned any "
            "more: raise --decay_steps or --min_lr"
        )
    if c.device == "cpu" and c.amp == "fp16":
        found.append("--amp fp16 is very slow on a CPU: bf16 or off is faster")
    if c.device == "cpu" and cpu_hint:
        found.append(cpu_hint)
    if c.device == "cpu" and c.n_params > 100e6:
        found.append(
            f"{c.n_params / 1e6:.0f}M parameters take hours to days on a CPU, except on a short "
            "text: --dry_run measures it; --preset write learns to write new text from yours in "
            "minutes"
        )
    return found


def changes(saved: dict, config: Config) -> str:
    """The flags that differ from a checkpoint's, with both values; empty when none does."""
    now = config.as_dict()
    differing = changed(saved, config).items()
    return ", ".join(f"--{name} {before!r} -> {now[name]!r}" for name, before in differing)


def finished(step: int, stop_reason: str) -> str:
    """That a run is over, and the way to go on."""
    how = {
        StopReason.TARGET: f"the target was reached at step {step}. Lower --target_loss",
        StopReason.PATIENCE: f"no lower validation loss up to step {step}. Raise --patience",
        StopReason.STEPS: f"all steps up to {step} are done. Raise --steps (and --decay_steps, "
        "if it was typed)",
    }[StopReason(stop_reason)]
    return (
        f"Already finished: {how} to go on, or choose another --out_dir (or --resume never) for a "
        "new run."
    )


def rehearsing_line(config: Config) -> str:
    """That a dry run measures, and how long that may take."""
    long = ""
    if config.device == "cpu" and config.n_params > 20e6:
        long = f"; with {config.n_params / 1e6:.0f}M parameters a CPU may take minutes for them"
    return f"Measuring two steps{long} ..."


def rehearsal(config: Config, step: int, sec: float, memory: int | None, free: float) -> list[str]:
    """What a dry run found: seconds of a step, bytes of memory and disk; the run is at `step`."""
    c = config
    state, weights = STATE_BYTES * c.n_params, WEIGHT_BYTES * c.n_params
    left = max(0, c.steps - step)
    most = timedelta(seconds=round(left * sec))
    steps = f"the {left:,} steps that are left of {c.steps:,}" if step else f"{left:,} steps"
    lines = [
        f"Time: {sec:.2f} s for a step, uncompiled; {most} for {steps} at most: begun now, "
        f"they end by {clock_after(most)}"
    ]
    if memory is not None:
        where = "of the card's memory" if c.device.startswith("cuda") else "of memory"
        copies = gigabytes(state + 2 * weights)
        if c.device.startswith("cuda"):  # PyTorch rounds each buffer up to a power of two bytes
            copies += f" to {gigabytes(2 * (state + 2 * weights))} of the computer's"
        lines.append(f"Memory: {gigabytes(memory)} {where}, and {copies} for the copies of saves")
    lines.append(
        f"Disk: {gigabytes(3 * state + weights)} at most in {c.out_dir} (last, prev and one being "
        f"written, {gigabytes(state)} each, best {gigabytes(weights)}); {gigabytes(free)} are free"
    )
    return [*lines, "Dry run: no file of a run was written."]


def stuck_hint(progress: Progress, config: Config) -> str | None:
    """What may be wrong when the loss still is that of guessing long after warm-up, else None."""
    losses, ln_vocab = progress.recent_losses, math.log(config.vocab_size)
    is_early = progress.step < config.warmup_steps + STUCK_AFTER
    if is_early or not losses or statistics.fmean(losses) < ln_vocab - 0.3:
        return None
    return (
        f"The loss still is about ln V = {ln_vocab:.3f}, that of guessing. Usual causes: --lr "
        f"{config.lr:g} is far too low or too high; --init_std {config.init_std:g} does not suit "
        f"--n_embd {config.n_embd}; the text has no structure"
    )


def step_row(
    config: Config,
    progress: Progress,
    corpus: Corpus,
    tokens_per_sec: float,
    val_loss: float | None,
) -> Row:
    """The step's row of the CSV."""
    window_loss = progress.window_loss(config)
    return {
        "step": progress.step,
        "loss": progress.loss,
        "lr": progress.lr,
        "tokens_per_sec": tokens_per_sec,
        "elapsed_sec": progress.elapsed_sec,
        "tokens": progress.tokens,
        "grad_norm": progress.grad_norm,
        "window_loss": window_loss,
        "bits_per_byte": bits_per_byte(window_loss, corpus.bytes_per_token),
        "val_loss": val_loss,
        "val_perplexity": perplexity(val_loss),
        "val_bits_per_byte": bits_per_byte(val_loss, corpus.val_bytes_per_token),
    }


def bar_text(loss: float, tokens_per_sec: float, seconds_left: float | None) -> str:
    """What stands beside the bar: the log's own estimate, and none before there is one."""
    eta = "" if seconds_left is None else f", ETA {timedelta(seconds=round(seconds_left))}"
    return f"loss {loss:.4f}, {tokens_per_sec:,.0f} tok/s{eta}"


def clock_after(duration: timedelta) -> str:
    """What this machine's clock shows when something that begins now is over."""
    then = datetime.fromtimestamp(time.time() + duration.total_seconds())
    return f"{then:%a %H:%M}"


def eta_line(config: Config, seconds_left: float) -> str:
    """How long the run still takes at most, and until when."""
    remaining = timedelta(seconds=round(seconds_left))
    causes = []
    if config.target_loss:
        causes.append("the target is reached")
    if config.patience:
        causes.append("the validation loss improves no more")
    sooner = f", sooner if {' or '.join(causes)}" if causes else ""
    return f"ETA {remaining} ({clock_after(remaining)}) to step {config.steps}{sooner}"


def sample_line(step: int, prompt: str, output: str) -> str:
    """The beginning of a sampled text, on one line."""
    words = " ".join(output.split())
    rest = ""
    if len(words) > SHOWN_OF_SAMPLE:
        rest = " ..."
    elif words == " ".join(prompt.split()):
        rest = " (then white space only)"
    return f"Sample at step {step}: {words[:SHOWN_OF_SAMPLE]}{rest}"


def best_line(loss: float, step: int, config: Config, path: Path) -> str:
    """That the best weights are on disk, and by which loss they are the best."""
    is_whole = config.validates or step >= config.target_window
    what = f"{config.best_metric} at step {step}" if is_whole else f"mean of the {step} steps"
    return f"New best loss {loss:.6f} -> saved: {path} ({what})"


def compiling_line(config: Config) -> str:
    """That it compiles, and how long that may take."""
    long = "one to four minutes" if config.device == "cpu" else "half a minute to two minutes"
    return f"Compiling; that may take {long} ..."


def measuring_line(n_slices: int, config: Config, progress: Progress) -> str:
    """That the corpus loss is measured, and how long that may take.

    A pass without gradients takes about a third of a training step's time for its tokens.
    """
    trained_sec = progress.elapsed_sec / max(1, progress.tokens)
    seconds = round(n_slices * config.seq_len * trained_sec / 3)
    long = f", about {timedelta(seconds=seconds)}" if seconds >= 10 else ""
    return f"Measuring the corpus loss on at most {n_slices:,} random slices{long} ..."


def failed_check_line(progress: Progress, config: Config) -> str:
    """That the run goes on although window_loss is at the target."""
    p = progress
    return (
        f"Step {p.step}: window_loss {p.window_loss(config):.6f} is at or below the target "
        f"{config.target_loss}, but the loss on {p.corpus_loss_slices:,} random slices is "
        f"{p.corpus_loss:.6f} (standard error {p.corpus_loss_error:.6f}). Going on."
    )


def ending(progress: Progress, config: Config, corpus: Corpus, stop_reason: str) -> list[str]:
    """What there is to say about a run that came to its end."""
    p, c = progress, config
    if stop_reason == StopReason.TARGET:
        is_classic = p.step_reached(c)
        loss = p.window_loss(c) if is_classic else p.corpus_loss
        rule = "the classic rule: one step alone" if is_classic else "the mean of random slices"
        lines = [f"Target reached: loss {loss:.6f} <= {c.target_loss}. Stopping. ({rule})"]
    elif stop_reason == StopReason.PATIENCE:
        lines = [f"No lower validation loss in {c.patience} measurements. Stopping."]
    else:
        lines = [f"All {p.step} steps done."]
    if c.validates and p.best_step:
        bits = bits_per_byte(p.best_loss, corpus.val_bytes_per_token)
        lines.append(
            f"best.pt has the weights of step {p.best_step}, with the lowest validation loss: "
            f"{p.best_loss:.6f}, {bits:.4f} bits per byte"
        )
    if p.corpus_measured:
        part = "" if corpus.val_tokens is None else " of the training part, with the last weights"
        bits = bits_per_byte(p.corpus_loss, corpus.bytes_per_token)
        lines.append(
            f"Corpus loss {p.corpus_loss:.6f} +- {p.corpus_loss_error:.6f} (mean and standard "
            f"error of {p.corpus_loss_slices} random slices{part}), perplexity "
            f"{perplexity(p.corpus_loss):.4f}, {bits:.4f} bits per byte"
        )
    return lines


def verdict(config: Config, progress: Progress, floor: float, stop_reason: str) -> str:
    """What came of a run that is over; where more steps may help, with the command."""
    c, p, said = config, progress, []
    is_still_falling = c.validates and p.best_step == p.val_step > c.eval_every
    if c.target_loss and stop_reason == StopReason.TARGET:
        said.append(f"the target was reached at step {p.step:,}")
    elif c.target_loss and not p.corpus_measured:
        unknown = "the loss on random slices could not be measured"
        said.append(f"whether the target was reached is unknown: {unknown}")
    elif 0 < c.target_loss < floor:
        said.append(f"the target was missed, and no model can reach it: the floor is {floor:.4f}")
    elif c.target_loss:
        said.append(f"the target was missed by {p.corpus_loss - c.target_loss:.4f}")
    if c.validates and not p.best_step:
        said.append("the validation loss could not be measured")
    elif c.validates and overfits(p.val_loss, p.best_loss, p.window_loss(c) or math.inf):
        said.append(f"the model overfits since step {p.best_step:,}, whose weights are in best.pt")
    elif c.validates and stop_reason == StopReason.PATIENCE:
        said.append(f"the validation loss fell no further after step {p.best_step:,}")
    elif is_still_falling:
        said.append("the validation loss was still falling at the end")
    elif c.validates:
        said.append(f"the validation loss was lowest at step {p.best_step:,}")
    is_missed = 0 < c.target_loss >= floor
    if stop_reason == StopReason.STEPS and (is_missed or is_still_falling):
        steps = p.step + max(1, p.step // 2)
        words = [*flags_to_continue(c), "--steps", str(steps)]
        if c.origins["decay_steps"].source in BY_USER:  # else it follows the steps
            words += ["--decay_steps", str(steps)]
        command = shell_line(launch_words(words, c))
        said.append(f"half as many steps more may help: {command}")
    nothing = f"all {p.step:,} steps are done, with neither a target nor a validation split"
    return f"Verdict: {'; '.join(said) or nothing}"


def how_to_continue(argv: list[str], config: Config, saved: bool, since: str = "") -> str:
    """The command that goes on with a run; without a checkpoint, the command that was typed."""
    if saved:
        words = launch_words(flags_to_continue(config), config)
        return f"To continue{since}: {shell_line(words)}"
    if value_of("resume", argv) == "never":  # which would begin anew once more; the last counts
        argv = [*argv, "--resume", "auto"]
    return f"To start again: {shell_line(launch_words(argv, config))}"


def flags_to_continue(config: Config) -> list[str]:
    """The flags that a run needs to go on: its directory, and what holds for one start only."""
    words = flag_words("out_dir", [config.out_dir.as_posix()])
    return [*words, "--tensorboard"] if config.tensorboard else words


def next_command(config: Config) -> str:
    """What to do with a trained model."""
    return f"Next: {shlex.join(['python', 'sample.py', '--checkpoint', config.out_dir.as_posix()])}"


def results(
    config: Config, progress: Progress, corpus: Corpus, floor: float, stop_reason: str
) -> dict:
    """What results.json says. The corpus loss is there at the end only: checks are less exact."""
    c, p = config, progress
    is_over = stop_reason in COMPLETE and p.corpus_measured
    mean = p.corpus_loss if is_over else None
    val_loss = p.val_loss if p.val_step else None
    best_bytes = corpus.val_bytes_per_token if c.validates else corpus.bytes_per_token
    return {
        "stop_reason": stop_reason,
        "target_loss": c.target_loss,
        "target_window": c.target_window,
        "best_metric": c.best_metric,
        "best_loss": p.best_loss,
        "best_step": p.best_step,
        "best_loss_standard_error": p.best_error or None,
        "best_bits_per_byte": bits_per_byte(p.best_loss, best_bytes),
        "final_loss": p.loss,
        "final_step": p.step,
        "window_loss": p.window_loss(c),
        "corpus_loss": mean,
        "corpus_loss_standard_error": p.corpus_loss_error if is_over else None,
        "corpus_loss_slices": p.corpus_loss_slices if is_over else None,
        "perplexity": perplexity(mean),
        "bits_per_byte": bits_per_byte(mean, corpus.bytes_per_token),
        "val_loss": val_loss,
        "val_perplexity": perplexity(val_loss),
        "val_bits_per_byte": bits_per_byte(val_loss, corpus.val_bytes_per_token),
        "tokens": p.tokens,
        "pseudo_epochs": p.tokens / len(corpus.tokens),
        "elapsed_sec": round(p.elapsed_sec, 2),
        "skipped_steps": p.skipped_steps,
        "loss_floor": floor,
        "loss_floor_is_an_estimate": corpus.floor_is_an_estimate,
        "ln_vocab": math.log(c.vocab_size),
        "parameters": c.n_params,
        "version": VERSION,
    }
