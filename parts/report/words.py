"""Numbers to words: plan, warnings, step lines, results. Functions of plain values; nothing here writes a file."""

import math
import shlex
import statistics
from datetime import datetime, timedelta
from pathlib import Path

from parts.compute.device import cpu_only_hint
from parts.flags import Config, From, names
from parts.progress import COMPLETE, Progress
from parts.recipe import LAW_TARGET, Text, usual_steps
from parts.report.provenance import changed
from parts.run.checkpoint import STATE_BYTES, WEIGHT_BYTES
from parts.run.directory import gigabytes
from parts.text.corpus import Corpus, smallest_seq_len

STUCK_AFTER = 200  # steps after warm-up by which a healthy run is far below ln V


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float | None, bytes_per_token: float) -> float | None:
    """Nats per token as bits per byte of text, which compare across vocabularies."""
    return None if loss is None else loss / math.log(2) / bytes_per_token


def lengths(tokens: tuple[int, ...]) -> str:
    """Lengths of slices as text: 32 and 128."""
    return " and ".join(map(str, tokens))


def slices_line(config: Config) -> str:
    """How long the slices of a run with mixed steps are."""
    c = config
    line = f"Slices: {lengths(c.slice_lengths(1))} tokens long"
    if c.mixed_steps < c.steps:
        line += f" up to step {c.mixed_steps:,}, then {lengths(c.slice_lengths(c.steps))}"
    return line


def target_rule(config: Config) -> str:
    """What has to be at or below the target for a run to stop."""
    if config.one_low_step_is_enough:
        return "by the classic rule: the first step at or below it, one alone"
    return f"for the mean of {config.target_window} steps, and then for random slices"


def on_random_slices(progress: Progress) -> str:
    """How exact the measured corpus loss is."""
    p = progress
    return f"{p.corpus_loss_slices:,} random slices, standard error {p.corpus_loss_error:.6f}"


def random_slices_words(progress: Progress) -> str:
    """The corpus loss of this step, as far as it could be measured."""
    if not progress.corpus_measured:
        return "the loss on random slices could not be measured"
    return f"the loss on random slices is {progress.corpus_loss:.6f}"


def reached_line(progress: Progress, config: Config) -> str:
    """By which loss the target was reached, and what the other one is."""
    p, window_loss = progress, progress.window_loss(config)
    if p.step_reached(config):
        other = f"{random_slices_words(p)} ({on_random_slices(p)})"
        rule = f"(The classic rule: one step alone; {other}.)"
        return f"Target reached: loss {window_loss:.6f} <= {config.target_loss}. Stopping. {rule}"
    window = "no full window" if window_loss is None else f"window_loss {window_loss:.6f}"
    found = f"({on_random_slices(p)}; {window})"
    return f"Target reached: loss {p.corpus_loss:.6f} <= {config.target_loss}. Stopping. {found}"


def failed_check_line(progress: Progress, config: Config) -> str:
    """That the run goes on although window_loss is at the target."""
    p = progress
    return (
        f"Step {p.step}: window_loss {p.window_loss(config):.6f} is at or below the target "
        f"{config.target_loss}, but the loss on random slices is {p.corpus_loss:.6f} "
        f"({on_random_slices(p)}). Going on."
    )


def missed_line(progress: Progress, config: Config) -> str:
    """That all steps did not suffice."""
    above = f", above the target {config.target_loss}" if progress.corpus_measured else ""
    return f"All {progress.step} steps done; {random_slices_words(progress)}{above}."


def plan(config: Config, corpus: Corpus, floor: float, progress: Progress) -> list[str]:
    """What will happen, to be said before the first step."""
    c, n_tokens = config, len(corpus.tokens)
    planned = progress.tokens + (c.steps - progress.step) * c.tokens_per_step
    part = (
        f"the first {n_tokens:,} of {corpus.text_tokens:,}"
        if n_tokens < corpus.text_tokens
        else f"{n_tokens:,}"
    )
    files = corpus.remark and f" ({corpus.remark})"
    target = f"target {c.target_loss:g}, {target_rule(c)}" if c.target_loss else "no target"
    return [
        f"Run directory: {c.out_dir}",
        f"Model: GPT-2, {c.n_params:,} parameters ({c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, "
        f"{c.block_size} positions, vocabulary {c.vocab_size})",
        f"Corpus: {names(c.input_file)}{files}, {part} tokens ({corpus.bytes_per_token:.3f} bytes each), "
        f"sha256 {corpus.sha256[:16]}",
        *validation_lines(corpus),
        f"Step: batch_size {c.batch_size} x grad_accum {c.grad_accum} x seq_len {c.seq_len} = {c.tokens_per_step:,} "
        f"tokens; a pseudo-epoch of {n_tokens:,} tokens is {n_tokens / c.tokens_per_step:,.1f} steps",
        *([slices_line(c)] if c.mixed_steps else []),
        f"Plan: {c.steps:,} steps = {planned:,} tokens = {planned / n_tokens:,.1f} pseudo-epochs; lr {c.lr:g} after "
        f"{c.warmup_steps} steps of warm-up, {c.min_lr:g} from step {c.decay_steps:,}",
        f"Loss: ln V = {math.log(c.vocab_size):.3f} for a model that knows nothing; floor of this corpus at seq_len "
        f"{c.seq_len}: {floor:.4f}{' (an estimate)' * corpus.floor_is_an_estimate}; {target}",
        *origin_lines(c),
    ]


def validation_lines(corpus: Corpus) -> list[str]:
    """How much text is held out, and how well a compressor predicts it."""
    if corpus.val_tokens is None:
        return []
    files = corpus.val_remark and f" ({corpus.val_remark})"
    line = f"Validation: {len(corpus.val_tokens):,} tokens{files}, never trained on"
    if corpus.yardstick is not None:
        line += "; {} makes {:.3f} bits per byte of them".format(*corpus.yardstick)
    return [line]


def origin_lines(config: Config) -> list[str]:
    """Every value that was neither typed nor constant, a line for each kind of origin, then the device."""
    told: dict[From, list[str]] = {source: [] for source in HEADINGS}
    values = config.as_dict()
    silent = {"device", "out_dir", "prompt"} | ({"eval_every"} if not config.validates else set())
    for name, (source, reason) in config.origins.items():
        value = values[name]
        if source in HEADINGS and name not in silent and value not in (None, ""):
            why = "" if source == From.RUN or not reason else f" ({reason})"
            told[source].append(
                f"{name} {' '.join(value) if isinstance(value, list) else value}{why}"
            )
    reason = config.origins["device"].reason if "device" in config.origins else ""
    device = f"Device: {config.device} ({reason or '--device'})"
    return [
        *(f"{HEADINGS[source]}: {'; '.join(words)}" for source, words in told.items() if words),
        device,
    ]


HEADINGS = {
    From.RUN: "Kept from the run so far",
    From.PRESET: "From the preset",
    From.TEXT: "From the text",
    From.FLAGS: "From other flags",
    From.MACHINE: "From this machine",
    From.MEMORY: "From the memory",
}


def forebodings(config: Config, corpus: Corpus, floor: float) -> list[str]:
    """What the plan cannot reach or will not do well, to be warned of."""
    c, found = config, []
    if 0 < c.target_loss < floor:
        enough = smallest_seq_len(corpus.tokens, c.target_loss, c.block_size)
        way = (
            f"--seq_len {enough} is the smallest that can"
            if enough
            else f"nor at any --seq_len up to {c.block_size}"
        )
        found.append(
            f"--target_loss {c.target_loss:g} is below the floor {floor:.4f}: no model can reach it at --seq_len "
            f"{c.seq_len}; {way}"
        )
    found += unusual_steps(c, corpus, floor)
    if c.min_lr == 0 and c.decay_steps < c.steps:
        found.append(
            f"The learning rate is 0 from step {c.decay_steps:,} on, and nothing is learned any more: raise "
            "--decay_steps or --min_lr"
        )
    if c.device == "cpu" and c.amp == "fp16":
        found.append("--amp fp16 is very slow on a CPU: bf16 or off is faster")
    if c.device == "cpu" and (hint := cpu_only_hint()):
        found.append(hint)
    if c.device == "cpu" and c.n_params > 100e6:
        found.append(
            f"{c.n_params / 1e6:.0f}M parameters take hours to days on a CPU, except on a short text: --dry_run "
            "measures it; --preset write learns to write new text from yours in minutes"
        )
    return found


def unusual_steps(config: Config, corpus: Corpus, floor: float) -> list[str]:
    """That the steps are far from those of the law, where it holds and they were typed."""
    c, usual = config, usual_steps(config, Text(0, len(corpus.tokens)))
    typed = "steps" in c.origins and c.origins["steps"].source in (From.TYPED, From.RUN)
    holds = max(floor, LAW_TARGET / 2) < c.target_loss <= 2 * LAW_TARGET
    if not typed or not holds or usual / 2 <= c.steps <= 2 * usual:
        return []
    planned, expected = (
        count * c.tokens_per_step / len(corpus.tokens) for count in (c.steps, usual)
    )
    return [
        f"{planned:,.3g} passes over this text; about {expected:,.3g} are usual (--steps {usual})"
    ]


def stuck_hint(progress: Progress, config: Config) -> str | None:
    """What may be wrong when the loss is still that of guessing, long after warm-up; None when it is not."""
    losses, ln_vocab = progress.recent_losses, math.log(config.vocab_size)
    if (
        progress.step < config.warmup_steps + STUCK_AFTER
        or not losses
        or statistics.fmean(losses) < ln_vocab - 0.3
    ):
        return None
    return (
        f"The loss still is about ln V = {ln_vocab:.3f}, that of guessing. Usual causes: --lr {config.lr:g} is far too "
        f"low or too high; --init_std {config.init_std:g} does not suit --n_embd {config.n_embd}; the text has no "
        "structure"
    )


def step_row(
    config: Config, progress: Progress, corpus: Corpus, *, val_loss: float | None, **measured: float
) -> dict[str, float | None]:
    """The step's row of the CSV, from what was measured of it: loss, grad_norm, lr and tokens_per_sec."""
    p, window_loss = progress, progress.window_loss(config)
    row: dict[str, float | None] = {"step": p.step, **measured, "elapsed_sec": p.elapsed_sec}
    row |= {"tokens": p.tokens, "window_loss": window_loss}
    row["bits_per_byte"] = bits_per_byte(window_loss, corpus.bytes_per_token)
    if val_loss is not None:
        row |= {"val_loss": val_loss, "val_perplexity": perplexity(val_loss)}
        row["val_bits_per_byte"] = bits_per_byte(val_loss, corpus.val_bytes_per_token)
    return row


def step_line(row: dict[str, float | None], steps: int) -> str:
    """The same as a line of the log."""
    line = f"step {row['step']}/{steps} | loss {row['loss']:.6f} | lr {row['lr']:.2e} | tok/s {row['tokens_per_sec']:.1f}"
    if row["window_loss"] is not None:
        line += f" | window_loss {row['window_loss']:.6f}"
    line += f" | grad_norm {row['grad_norm']:.3f}"
    if "val_loss" in row:
        line += f" | val_loss {row['val_loss']:.6f} | val_perplexity {row['val_perplexity']:.2f}"
        line += f" | val_bits_per_byte {row['val_bits_per_byte']:.4f}"
    return line


def bar_text(loss: float, tokens_per_sec: float, seconds_left: float | None) -> str:
    """What stands beside the bar: the log's own estimate, and none before there is one."""
    eta = "" if seconds_left is None else f", ETA {timedelta(seconds=round(seconds_left))}"
    return f"loss {loss:.4f}, {tokens_per_sec:,.0f} tok/s{eta}"


def clock_after(duration: timedelta) -> str:
    """What this machine's clock shows when something that begins now is over."""
    return f"{datetime.now() + duration:%a %H:%M}"


def eta_line(config: Config, seconds_left: float) -> str:
    """How long the run still takes at most, and until when."""
    remaining = timedelta(seconds=round(seconds_left))
    causes = [cause for cause, set_ in (("the target is reached", config.target_loss),
                                        ("the validation loss improves no more", config.patience)) if set_]  # fmt: skip
    sooner = f", sooner if {' or '.join(causes)}" if causes else ""
    return f"ETA {remaining} ({clock_after(remaining)}) to step {config.steps}{sooner}"


def sample_line(step: int, prompt: str, output: str) -> str:
    """The beginning of a sampled text, on one line."""
    words = " ".join(output.split())
    rest = (
        " ..." if len(words) > 200 else " (and white space)" * (words == " ".join(prompt.split()))
    )
    return f"Sample at step {step}: {words[:200]}{rest}"


def best_line(loss: float, step: int, config: Config, path: Path) -> str:
    """That the best weights are on disk, and by which loss they are the best."""
    whole = config.validates or step >= config.target_window
    metric = f"{config.best_metric} at step {step}" if whole else f"mean of the {step} steps"
    return f"New best loss {loss:.6f} -> saved: {path} ({metric})"


def next_command(config: Config) -> str:
    """What to do with a trained model."""
    return f"Next: {shlex.join(['python', 'sample.py', '--checkpoint', config.out_dir.as_posix()])}"


def rehearsing_line(config: Config) -> str:
    """That a dry run measures, and how long that may take."""
    long = ""
    if config.device == "cpu" and config.n_params > 20e6:
        long = f"; with {config.n_params / 1e6:.0f}M parameters a CPU may take minutes for them"
    return f"Measuring two steps{long} ..."


def rehearsal(config: Config, step: int, sec: float, memory: int | None, free: float) -> list[str]:
    """What a dry run found: seconds of a step, bytes of memory and disk; the run is at `step`."""
    c, where = config, "of the card's memory" if config.device.startswith("cuda") else "of memory"
    state, weights = STATE_BYTES * c.n_params, WEIGHT_BYTES * c.n_params
    left = max(0, c.steps - step)
    most = timedelta(seconds=round(left * sec))
    steps = f"the {left:,} steps that are left of {c.steps:,}" if step else f"{left:,} steps"
    lines = [
        f"Time: {sec:.2f} s for a step, uncompiled; {most} for {steps} at most: begun now, "
        f"they end by {clock_after(most)}"
    ]
    if memory is not None:
        lines.append(
            f"Memory: {gigabytes(memory)} {where}, and {gigabytes(state + weights)} for the copies of saves"
        )
    lines.append(
        f"Disk: {gigabytes(3 * state + weights)} at most in {c.out_dir} (last, prev and one being written, "
        f"{gigabytes(state)} each, best {gigabytes(weights)}); {gigabytes(free)} are free"
    )
    return [*lines, "Dry run: no file of a run was written."]


def overfits(config: Config, progress: Progress) -> bool:
    """Whether the validation loss has risen since its lowest while the training loss went on falling."""
    p = progress
    return p.val_loss > 1.01 * p.best_loss and (p.window_loss(config) or math.inf) < p.best_loss


def ending(progress: Progress, config: Config, corpus: Corpus, stop_reason: str) -> list[str]:
    """What there is to say about a run that came to its end."""
    p, lines = progress, []
    if stop_reason == "target":
        lines.append(reached_line(p, config))
    elif stop_reason == "patience":
        lines.append(f"No lower validation loss in {config.patience} measurements. Stopping.")
    elif config.target_loss:
        lines.append(missed_line(p, config))
    else:
        lines.append(f"All {p.step} steps done.")
    if config.validates and p.best_step:
        bits = bits_per_byte(p.best_loss, corpus.val_bytes_per_token)
        lowest = f"best.pt has the weights of step {p.best_step}, with the lowest validation loss: {p.best_loss:.6f}"
        now = f"; it is {p.val_loss:.6f} now: from there on the model overfits, learning its text by heart"
        lines.append(f"{lowest}, {bits:.4f} bits per byte{now * overfits(config, p)}")
    return [*lines, corpus_loss_line(p, corpus)] if p.corpus_measured else lines


def compiling_line(config: Config) -> str:
    """That it compiles, and how long that may take."""
    long = "one to four minutes" if config.device == "cpu" else "half a minute to two minutes"
    return f"Compiling; that may take {long} ..."


def measuring_line(n_slices: int, config: Config, progress: Progress) -> str:
    """That the corpus loss is measured, and how long that may take: a pass without gradients takes
    about a third of a training step's time for its tokens."""
    trained_sec = progress.elapsed_sec / max(1, progress.tokens)
    seconds = round(n_slices * config.seq_len * trained_sec / 3)
    long = f", about {timedelta(seconds=seconds)}" if seconds >= 10 else ""
    return f"Measuring the corpus loss on at most {n_slices:,} random slices{long} ..."


def corpus_loss_line(progress: Progress, corpus: Corpus) -> str:
    """The corpus loss in words."""
    p = progress
    mean, standard_error, n_slices = p.corpus_loss, p.corpus_loss_error, p.corpus_loss_slices
    part = "" if corpus.val_tokens is None else " of the training part, with the last weights"
    return (
        f"Corpus loss {mean:.6f} +- {standard_error:.6f} (mean and standard error of {n_slices} random slices{part}), "
        f"perplexity {perplexity(mean):.4f}, {bits_per_byte(mean, corpus.bytes_per_token):.4f} bits per byte"
    )


def results(
    config: Config, progress: Progress, corpus: Corpus, floor: float, stop_reason: str
) -> dict:
    """What results.json says. The corpus loss is there at the end: checks are less exact."""
    c, p = config, progress
    over = stop_reason in COMPLETE and p.corpus_measured
    mean = p.corpus_loss if over else None
    return {
        "stop_reason": stop_reason,
        "target_loss": c.target_loss,
        "target_window": c.target_window,
        "best_metric": c.best_metric,
        "best_loss": p.best_loss,
        "best_step": p.best_step,
        "best_loss_standard_error": p.best_error or None,
        "best_bits_per_byte": bits_per_byte(
            p.best_loss, corpus.val_bytes_per_token if c.validates else corpus.bytes_per_token
        ),
        "final_loss": p.loss,
        "final_step": p.step,
        "window_loss": p.window_loss(c),
        "corpus_loss": mean,
        "corpus_loss_standard_error": p.corpus_loss_error if over else None,
        "corpus_loss_slices": p.corpus_loss_slices if over else None,
        "perplexity": None if mean is None else perplexity(mean),
        "bits_per_byte": bits_per_byte(mean, corpus.bytes_per_token),
        "val_loss": p.val_loss if p.val_step else None,
        "val_perplexity": perplexity(p.val_loss) if p.val_step else None,
        "val_bits_per_byte": bits_per_byte(p.val_loss, corpus.val_bytes_per_token)
        if p.val_step
        else None,
        "tokens": p.tokens,
        "pseudo_epochs": p.tokens / len(corpus.tokens),
        "elapsed_sec": round(p.elapsed_sec, 2),
        "skipped_steps": p.skipped_steps,
        "loss_floor": floor,
        "loss_floor_is_an_estimate": corpus.floor_is_an_estimate,
        "ln_vocab": math.log(c.vocab_size),
        "parameters": c.n_params,
    }


def changes(saved: dict, config: Config) -> str:
    """The same in words; empty when none differs."""
    flags = config.as_dict()
    return ", ".join(
        f"--{name} {before!r} -> {flags[name]!r}" for name, before in changed(saved, config).items()
    )


def finished(step: int, stop_reason: str) -> str:
    """That a run is over, and the way to go on."""
    how = {
        "target": f"the target was reached at step {step}. Lower --target_loss",
        "patience": f"no lower validation loss up to step {step}. Raise --patience",
        "steps": f"all steps up to {step} are done. Raise --steps (and --decay_steps, if it was typed)",
    }[stop_reason]
    return f"Already finished: {how} to go on, or choose another --out_dir (or --resume never) for a new run."
