"""What came of a run, and the command that goes on with it. Functions of plain values."""

from parts.commandline import flag_words, to_type
from parts.flags import Config, From, Origin
from parts.progress import Progress
from parts.report.provenance import launch_words
from parts.report.words import overfits


def how_to_continue(argv: list[str], config: Config, saved: bool, since: str = "") -> str:
    """The command that goes on with a run, on one line; of one without a checkpoint, the command that was typed."""
    if saved:
        words = launch_words(continuing(config), config)
        return f"To continue{since}: {to_type(words)}"
    return f"To start again: {to_type(launch_words(without_never(argv), config))}"


def continuing(config: Config) -> list[str]:
    """The flags that a run needs to go on: its directory, and what holds for one start only."""
    return [
        *flag_words("out_dir", [config.out_dir.as_posix()]),
        *(["--tensorboard"] if config.tensorboard else []),
    ]


def without_never(argv: list[str]) -> list[str]:
    """A command line without --resume never, which would begin anew once more."""
    kept = [word for word in argv if word != "--resume=never"]
    for place in reversed(range(len(kept) - 1)):
        if kept[place : place + 2] == ["--resume", "never"]:
            del kept[place : place + 2]
    return kept


def with_more_steps(config: Config, progress: Progress) -> str:
    """What to try next: half as many steps more, and a learning rate above its end in them."""
    steps = progress.step + max(1, progress.step // 2)
    words = [*continuing(config), "--steps", str(steps)]
    origin = config.origins.get("decay_steps", Origin(From.RUN))
    if origin.source in (From.TYPED, From.RUN):  # else the decay stretches with the steps
        words += ["--decay_steps", str(steps)]
    return f"half as many steps more may help: {to_type(launch_words(words, config))}"


def of_target(config: Config, progress: Progress, floor: float, stop_reason: str) -> str:
    """Whether the target was reached, or by how much it was missed."""
    c, p = config, progress
    if stop_reason == "target":
        return f"the target was reached at step {p.step:,}"
    if not p.corpus_measured:
        return "whether the target was reached is unknown: the loss on random slices could not be measured"
    if c.target_loss < floor:
        return f"the target was missed, and no model can reach it: the floor is {floor:.4f}"
    return f"the target was missed by {p.corpus_loss - c.target_loss:.4f}"


def of_validation(config: Config, progress: Progress, stop_reason: str) -> str:
    """How the validation loss came to its end."""
    p = progress
    if not p.best_step:
        return "the validation loss could not be measured"
    if overfits(config, p):
        return f"the model overfits since step {p.best_step:,}, whose weights are in best.pt"
    if stop_reason == "patience":
        return f"the validation loss fell no further after step {p.best_step:,}"
    if still_falling(config, p):
        return "the validation loss was still falling at the end"
    return f"the validation loss was lowest at step {p.best_step:,}"


def still_falling(config: Config, progress: Progress) -> bool:
    """Whether the last of several validation losses was the lowest."""
    p = progress
    return config.validates and p.best_step == p.val_step > config.eval_every


def verdict(config: Config, progress: Progress, floor: float, stop_reason: str) -> str:
    """What came of a run that is over, in a sentence; where more steps may help, with the command."""
    c, p, said = config, progress, []
    if c.target_loss:
        said.append(of_target(c, p, floor, stop_reason))
    if c.validates:
        said.append(of_validation(c, p, stop_reason))
    missed = c.target_loss >= floor and c.target_loss > 0
    if stop_reason == "steps" and (missed or still_falling(c, p)):
        said.append(with_more_steps(c, p))
    if not said:
        said.append(
            f"all {p.step:,} steps are done, with neither a target nor a validation split to judge them by"
        )
    return f"Verdict: {'; '.join(said)}"
