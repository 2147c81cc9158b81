"""Checks all that can be wrong with a user's input, before any file of a run is written."""

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from parts.commandline import read_typed
from parts.compute.device import choose_runtime
from parts.compute.ranks import Ranks
from parts.flags import Config
from parts.predecessor import InitialWeights, check_same_run, load_initial_weights
from parts.progress import COMPLETE
from parts.recipe import Text, decide
from parts.report import words
from parts.run.checkpoint import SavedRun, find_checkpoints, load_newest
from parts.run.directory import RunDir, read_json
from parts.text.corpus import Corpus, load_corpus
from parts.text.files import size_of
from parts.text.vocabulary import TextYieldsFewer, Tokenizer, choose_tokenizer

BYTES_PER_TOKEN = 4  # of a text that is cut by --max_tokens, roughly
OF_ONE_MACHINE = ("threads", "compile", "micro_batch", "device", "cache_dir")  # flags


@dataclass(frozen=True)
class Setup:
    """A run whose input has been checked, and of which nothing has been written yet."""

    argv: list[str]
    config: Config
    corpus: Corpus
    tokenizer: Tokenizer
    run: RunDir
    saved: SavedRun | None  # from which it goes on
    initial: InitialWeights | None  # weights of another run, for a new one

    @property
    def continues(self) -> bool:
        """Whether the checkpoint is the run directory's own, so that its other files belong to it
        as well."""
        return self.saved is not None and self.run.owns(self.saved.path)

    @property
    def best_compares(self) -> bool:
        """Whether the checkpoint's best was measured as the best from here on will be, and lies in
        this directory."""
        if self.saved is None:
            return True
        measure = ["val_fraction", "seq_len"]
        if not self.config.validates:
            measure.append("target_window")
        before = self.saved.config
        same = all(getattr(before, name) == getattr(self.config, name) for name in measure)
        same_text = self.saved.facts["val_sha256"] == self.corpus.val_sha256
        return self.continues and same and same_text

    @property
    def finished(self) -> str | None:
        """Why there is nothing left to do, with the way to go on; None when there is."""
        if self.saved is None or any(self.saved.facts["unwritten"].values()):
            return None  # in the second case there are rows that the disk had refused
        published = read_json(self.run.results_json)
        as_published = published.get("final_step") == self.saved.step
        if published.get("stop_reason") not in COMPLETE or not as_published:
            return None
        reason = self.saved.progress.stop_reason(self.config)
        return reason and words.finished(self.saved.step, reason)

    def shared_facts(self) -> dict:
        """What has to be the same for all processes of a run, by name."""
        corpus = self.corpus
        facts = {
            "the checkpoint's step": 0 if self.saved is None else self.saved.step,
            "the text": [corpus.sha256, len(corpus.tokens), corpus.val_sha256],
            "the vocabulary": corpus.vocabulary,
        }
        flags = self.config.as_dict().items()
        return facts | {f"--{name}": value for name, value in flags if name not in OF_ONE_MACHINE}


def prepare(argv: list[str], ranks: Ranks, held: ExitStack, about: str | None = None) -> Setup:
    """Do everything that can fail for the user's input, and hold the lock of a run that is there.

    Raises ValueError or OSError; writes nothing but token ids, into --cache_dir. `about` heads the
    answer to --help, which raises SystemExit.
    """
    typed = read_typed(argv, about=about)
    first = decide(typed, processes=ranks.count)
    run = RunDir(first.out_dir)
    if ranks.rank == 0:
        run.check_writable()
    if ranks.rank == 0 and run.owner.exists():
        held.enter_context(run.locked())  # or its files could change between here and training
    saved = load_newest(find_checkpoints(first, run))
    if saved is None:
        if run.config_json.exists() and "launches" not in read_json(run.config_json):
            written = f"{run.config_json} was not written by train.py"
            raise ValueError(f"{written}: choose another --out_dir")
        previous = None
    else:
        previous = replace(saved.config, out_dir=run.root)
        if typed.get("init_from", previous.init_from) != previous.init_from:
            raise ValueError(
                f"--init_from {typed['init_from']} is for a new run, and {saved.path} continues "
                "one: leave it out, or choose another --out_dir"
            )
    config, tokenizer, corpus = choose_text(typed, previous, saved, ranks.count)
    initial = None
    if saved is None:
        initial = load_initial_weights(config, corpus.vocabulary)
    else:
        facts = (corpus.vocabulary, corpus.sha256, len(corpus.tokens))
        check_same_run(saved.path, saved.facts, config, *facts)
    return Setup(argv, config, corpus, tokenizer, run, saved, initial)


def choose_text(
    typed: dict[str, Any], previous: Config | None, saved: SavedRun | None, processes: int
) -> tuple[Config, Tokenizer, Corpus]:
    """Flags, tokenizer and corpus. The flags are checked before the text is encoded, which may
    take long.

    Raises OSError or ValueError.
    """
    choose = partial(decide, typed, previous=previous, processes=processes, machine=choose_runtime)
    first = decide(typed, previous=previous)
    n_bytes = size_of(first.input_file)
    if first.max_tokens:
        n_bytes = min(n_bytes, BYTES_PER_TOKEN * first.max_tokens)
    text = Text(n_bytes, n_tokens=n_bytes)
    config = choose(text)
    check_flags(config, previous)
    checkpoint = None if saved is None else saved.facts
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
    check_flags(config, previous)
    return config, tokenizer, corpus


def check_flags(config: Config, previous: Config | None) -> None:
    """Raises ValueError, a line for each, when flags cannot be together."""
    kept = " (flags you leave out keep the values of the existing run)"
    hint = "" if previous is None else kept
    raise_all([problem + hint for problem in config.contradictions()])


def raise_all(problems: list[str]) -> None:
    """Raises ValueError, a line for each problem, if there is any."""
    if problems:
        raise ValueError("\n".join(problems))


def agree(ranks: Ranks, setup: Setup | None, problem: str) -> None:
    """Compare what the processes found: each has a setup, or a problem in one or more lines.

    Raises ValueError on all of them when one has a problem, or when they were not given the same.
    """
    problems = list(filter(None, ranks.gather(problem)))
    own = "{}" if setup is None else json.dumps(setup.shared_facts())
    facts = [json.loads(text) for text in ranks.gather(own)]
    raise_all(list(dict.fromkeys("\n".join(problems).splitlines())))
    differing = [name for name in facts[0] if any(other[name] != facts[0][name] for other in facts)]
    if differing:
        raise ValueError(
            f"the processes do not agree on {', '.join(differing)}: all need the same flags, and "
            "the same files at --out_dir and --input_file"
        )
