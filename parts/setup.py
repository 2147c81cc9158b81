"""All that a user's input can spoil, checked before anything of a run is written."""

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from parts.commandline import read_typed
from parts.compute.device import choose_runtime
from parts.compute.ranks import Ranks
from parts.flags import Config
from parts.predecessor import Start, check_same_run, load_start
from parts.progress import COMPLETE, Progress
from parts.recipe import Text, decide
from parts.report import words
from parts.run.checkpoint import find_checkpoints, load_newest
from parts.run.directory import RunDir, read_json
from parts.text.corpus import Corpus, load_corpus
from parts.text.vocabulary import TextYieldsFewer, Tokenizer, choose_tokenizer, size_of

BYTES_PER_TOKEN = 4  # of a text that is cut by --max_tokens, roughly


@dataclass(frozen=True)
class Setup:
    """A run whose input has been checked, and of which nothing has been written yet."""

    argv: list[str]
    config: Config
    corpus: Corpus
    tokenizer: Tokenizer
    run: RunDir
    resumed_from: Path | None
    checkpoint: dict | None  # what that file holds
    start: Start | None  # weights of another run, for a new one
    damage: str | None  # what is wrong with the newer checkpoint that should have been it

    @property
    def continues(self) -> bool:
        """Whether the checkpoint is the run directory's own, so that its other files belong to it as well."""
        return self.resumed_from is not None and self.run.owns(self.resumed_from)

    @property
    def best_compares(self) -> bool:
        """Whether the checkpoint's best was measured as the best from here on will be, and lies in this directory."""
        if self.checkpoint is None:
            return True
        saved, config = self.checkpoint["config"], self.config
        measure = ["val_fraction", "seq_len"]
        if not config.validates:
            measure.append("target_window")
        same = all(saved.get(name) == getattr(config, name) for name in measure)
        return self.continues and same and self.checkpoint["val_sha256"] == self.corpus.val_sha256

    @property
    def finished(self) -> str | None:
        """Why there is nothing left to do, with the way to go on; None when there is."""
        if self.checkpoint is None or any(self.checkpoint.get("unwritten", {}).values()):
            return None  # in the second case there are rows that the disk had refused
        step, published = self.checkpoint["step"], read_json(self.run.results_json)
        if published.get("stop_reason") not in COMPLETE or published.get("final_step") != step:
            return None
        progress, before = self.checkpoint["progress"], self.checkpoint["config"]
        if (
            "corpus_step" not in progress and published["stop_reason"] == "target"
        ):  # by the rule of older programs
            return (
                words.finished(step, "target")
                if self.config.target_loss >= before["target_loss"]
                else None
            )
        reason = Progress(**progress).stop_reason(self.config)
        return reason and words.finished(step, reason)

    def agreement(self) -> dict:
        """What has to be the same for all processes of a run: not the flags that each machine may choose for itself."""
        corpus, own = self.corpus, ("threads", "compile", "micro_batch", "device", "cache_dir")
        facts = {
            "the checkpoint's step": 0 if self.checkpoint is None else self.checkpoint["step"],
            "the text": [corpus.sha256, len(corpus.tokens), corpus.val_sha256],
            "the vocabulary": corpus.vocabulary,
        }
        return facts | {
            f"--{name}": value for name, value in self.config.as_dict().items() if name not in own
        }


def prepare(argv: list[str], ranks: Ranks, held: ExitStack, about: str | None = None) -> Setup:
    """Do everything that the user's input can spoil, and hold the lock of a run that is there already.

    Raises ValueError or OSError; writes nothing but token ids, into --cache_dir. `about` heads the answer to --help.
    """
    typed = read_typed(argv, about=about)
    first = decide(typed, processes=ranks.count)
    raise_all(first.problems_of_out_dir())
    run = RunDir(first.out_dir)
    if ranks.rank == 0:
        run.check_writable()
    if ranks.rank == 0 and run.owner.exists():
        held.enter_context(run.locked())  # or its files could change between here and training
    path, checkpoint, damage = load_newest(find_checkpoints(first, run))
    if (
        checkpoint is None
        and run.config_json.exists()
        and "launches" not in read_json(run.config_json)
    ):
        raise ValueError(f"{run.config_json} was not written by train.py: choose another --out_dir")
    previous = None if checkpoint is None else flags_of(checkpoint, run)
    if previous is not None and typed.get("init_from", previous.init_from) != previous.init_from:
        raise ValueError(
            f"--init_from {typed['init_from']} is for a new run, and {path} continues one: leave it out, or choose "
            "another --out_dir"
        )
    config, tokenizer, corpus = choose_text(typed, previous, checkpoint, ranks.count)
    if path is not None and checkpoint is not None:
        check_same_run(
            path, checkpoint, config, corpus.vocabulary, corpus.sha256, len(corpus.tokens)
        )
    start = load_start(config, corpus.vocabulary) if checkpoint is None else None
    return Setup(argv, config, corpus, tokenizer, run, path, checkpoint, start, damage)


def flags_of(checkpoint: dict, run: RunDir) -> Config:
    """The flags of the run that a checkpoint continues, in this directory."""
    return replace(
        Config.from_dict(checkpoint["config"], checkpoint.get("origins")), out_dir=run.root
    )


def choose_text(
    typed: dict[str, Any], previous: Config | None, checkpoint: dict | None, processes: int
) -> tuple[Config, Tokenizer, Corpus]:
    """Flags, tokenizer and corpus. The flags are checked before the text is encoded, which may take long.

    Raises OSError or ValueError.
    """
    choose = partial(decide, typed, previous=previous, processes=processes, machine=choose_runtime)
    first = decide(typed, previous=previous)
    n_bytes = size_of(first.input_file)
    if first.max_tokens:
        n_bytes = min(n_bytes, BYTES_PER_TOKEN * first.max_tokens)
    text = Text(n_bytes, n_tokens=n_bytes)
    config = choose(text)
    check(config, previous)
    try:
        tokenizer = choose_tokenizer(config, checkpoint)
    except TextYieldsFewer as fewer:
        if "tokenizer" in typed:
            raise
        text = replace(text, n_vocab=fewer.n_vocab)
        config = choose(text)
        tokenizer = choose_tokenizer(config, checkpoint)
    corpus = load_corpus(config, tokenizer)
    text = replace(text, n_tokens=len(corpus.tokens))
    config = choose(text, vocab_size=tokenizer.n_vocab)
    check(config, previous)
    return config, tokenizer, corpus


def check(config: Config, previous: Config | None) -> None:
    """Raises ValueError, a line for each, when flags cannot be together."""
    kept = "" if previous is None else " (flags you leave out keep the values of the existing run)"
    raise_all([problem + kept for problem in config.contradictions()])


def raise_all(problems: list[str]) -> None:
    """Raises ValueError, a line for each problem, if there is any."""
    if problems:
        raise ValueError("\n".join(problems))


def problems_of_all(ranks: Ranks, setup: Setup | None, problem: str) -> list[str]:
    """The problems of all processes, a line each, this one's among them; or that they were not given the same."""
    problems = ranks.gather(problem)
    facts = [
        json.loads(text)
        for text in ranks.gather("{}" if setup is None else json.dumps(setup.agreement()))
    ]
    if not any(problems) and (
        differing := [
            name for name in facts[0] if any(other[name] != facts[0][name] for other in facts)
        ]
    ):
        return [
            f"the processes do not agree on {', '.join(differing)}: all need the same flags, and the same files at "
            "--out_dir and --input_file"
        ]
    return list(dict.fromkeys("\n".join(filter(None, problems)).splitlines()))
