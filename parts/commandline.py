"""Flags as typed: help in groups, every mistake in one line with its remedy; commands to type again."""

import argparse
import ast
import inspect
import os
import re
import shlex
from dataclasses import MISSING, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from parts.flags import PRESETS, ByDefault, Config, Flags, brief, out_of_range
from parts.recipe import TINY_SHAKESPEARE, Text, decide

T = TypeVar("T")
OTHER_NAMES = {  # of other programs: the flag here
    "learning_rate": "lr",
    "max_lr": "lr",
    "max_steps": "steps",
    "max_iters": "steps",
    "iterations": "steps",
    "epochs": "steps",
    "num_epochs": "steps",
    "num_train_epochs": "steps",
    "warmup": "warmup_steps",
    "warmup_iters": "warmup_steps",
    "batchsize": "batch_size",
    "bs": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "context_length": "seq_len",
    "max_seq_len": "seq_len",
    "n_ctx": "block_size",
    "n_positions": "block_size",
    "input": "input_file",
    "data": "input_file",
    "output_dir": "out_dir",
    "model": "preset",
    "fp16": "amp",
    "bf16": "amp",
    "dtype": "amp",
    "prompt_file": "prompt",
}
EPOCHS = "one pass over the text is as many steps as the log calls a pseudo-epoch"
REMARKS = {  # where the flag here does not say the same
    "epochs": EPOCHS,
    "num_epochs": EPOCHS,
    "num_train_epochs": EPOCHS,
    "context_length": "the tokens of a slice; --block_size are the positions that the model has",
    "prompt_file": "sample.py has a --prompt_file",
}
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
ESCAPE = re.compile(
    r"\\[nt\\]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}"
)  # but no half of a surrogate pair


def decode_escapes(text: str) -> str:
    r"""Turn \n, \t, \\ and \uXXXX, as JSON has them, into what they stand for: a shell passes them as written."""
    return ESCAPE.sub(lambda match: ESCAPES.get(match[0]) or chr(int(match[0][2:], 16)), text)


def encode_escapes(text: str) -> str:
    """Text that `decode_escapes` reads back, with nothing hidden in it."""
    short = {character: escape for escape, character in ESCAPES.items()}
    return "".join(short.get(c) or (f"\\u{ord(c):04x}" if hidden(c) else c) for c in text)


def hidden(text: str) -> bool:
    """Whether it has characters that cannot be seen, such as line ends, control characters and marks that reorder text.
    Those beyond U+FFFF do not count: letters newer than this Python are among them."""
    return any(not c.isprintable() and c <= "\uffff" for c in text)


def as_utf8(argument: str) -> str:
    """An argument whose bytes are UTF-8, whatever the system took them for. Raises ValueError for other bytes."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{argument!a} is not UTF-8") from error


def read_flags(kind: type[T], argv: list[str], script: str, about: str | None) -> T:
    """The flags of a script, which its dataclass declares; `about` is the script's docstring.

    Raises ValueError, one line for each mistake, and SystemExit after --help.
    """
    given = parse(kind, argv, script, about)
    for field in fields(kind):  # type: ignore[arg-type]  # every kind is a dataclass
        if field.default is MISSING and field.name not in given:
            raise ValueError(f"--{field.name} is missing: {help_of(kind).get(field.name, '')}")  # type: ignore[arg-type]
    return kind(**given)


def parse(
    kind: type, argv: list[str], script: str, about: str | None, defaults: object = None
) -> dict[str, Any]:
    """The values of the flags that are typed, by name. `defaults` has what the help shows.

    Raises as `read_flags` does.
    """
    parser = Parser(kind, script, (about or "").partition("\n\n")[0], defaults or kind)
    try:
        found, rest = parser.parse_known_args([with_underscores(as_utf8(word)) for word in argv])
    except BrokenPipeError:  # `--help | head` has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(0) from None
    names = [field.name for field in fields(kind)]
    flags = [word[2:].partition("=")[0] for word in rest if word.startswith("--")]
    if flags:
        raise ValueError("\n".join(unknown(flag, names, script) for flag in flags))
    if rest:
        hint = "; a text is named with --input_file" if "input_file" in names else ""
        parser.error(f"{brief(rest[0])} belongs to no flag{hint}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(found).items()}


class Parser(argparse.ArgumentParser):
    """The flags that a dataclass declares. Its bases, if it has any, are the groups of the help."""

    def __init__(self, kind: type, script: str, about: str, defaults: object):
        super().__init__(
            script,
            "%(prog)s [options]",
            about,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        types = get_type_hints(kind, include_extras=True)
        explained = help_of(kind)
        for group in [base for base in reversed(kind.__mro__[1:]) if is_dataclass(base)] or [kind]:
            section = self.add_argument_group(group.__name__.removesuffix("Flags"), group.__doc__)
            for field in fields(group):
                words = explained.get(field.name, "")
                if default := default_words(types[field.name], getattr(defaults, field.name, None)):
                    words += f" (default: {default})"
                form = form_of(types[field.name])
                section.add_argument(f"--{field.name}", help=words.replace("%", "%%"), **form)

    def error(self, message: str) -> NoReturn:
        """Raises ValueError instead of writing to stderr."""
        message = message.removeprefix("argument ")
        raise ValueError(f"{message} ({self.prog} --help lists every flag)")


def form_of(annotation: Any) -> dict[str, Any]:
    """What argparse has to know about a flag of this type."""
    plain = bare(annotation)
    if plain is bool:
        return {"action": "store_true"}
    if get_origin(plain) is Literal:
        return {"choices": get_args(plain)}
    if get_origin(plain) is tuple:
        return {"type": Path, "nargs": "*", "metavar": "PATH"}
    return {"type": plain, "metavar": plain.__name__.upper()}


def bare(annotation: Any) -> Any:
    """A type without its range and without None."""
    if get_origin(annotation) is Annotated:
        return bare(get_args(annotation)[0])
    if get_origin(annotation) in (UnionType, Union):
        return bare(get_args(annotation)[0])
    return annotation


def default_words(annotation: Any, value: object) -> str:
    """What the help says about a default; nothing where there is none."""
    for note in getattr(annotation, "__metadata__", ()):
        if isinstance(note, ByDefault):
            return note.words
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None or value is False else str(value)


@cache
def help_of(kind: type) -> dict[str, str]:
    """The help of each flag: the string below its field, on one line."""
    found = {}
    for base in reversed(kind.__mro__[:-1]):
        body = ast.parse(dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(ast.literal_eval(text.value).split())  # type: ignore[union-attr]
    return found


def with_underscores(word: str) -> str:
    """A word in which a flag is spelled with underscores."""
    return re.sub(r"^--[a-zA-Z][\w-]*", lambda flag: "--" + flag[0][2:].replace("-", "_"), word)


def value_of(name: str, words: list[str]) -> str | None:
    """What a flag is given on a command line, the last time; None where it is not there."""
    found = None
    for word, following in pairwise([*words, ""]):
        flag, equals, value = word.partition("=")
        if flag == f"--{name}":
            found = value if equals else following
    return found


def flag_words(name: str, values: list[str]) -> list[str]:
    """The words that give a flag these values. Several values are paths; one may begin with a dash."""
    if len(values) == 1 and values[0].startswith("-"):
        return [f"--{name}={values[0]}"]
    return [f"--{name}", *(f"./{value}" if value.startswith("-") else value for value in values)]


def to_type(words: list[str]) -> str:
    """A command on one line for a shell. A prompt's invisible characters are its own escapes."""
    shown = []
    for before, word in pairwise(["", *words]):
        if before == "--prompt" or word.startswith("--prompt="):
            word = encode_escapes(decode_escapes(word))
        shown.append(word)
    return shlex.join(shown)


def unknown(name: str, names: list[str], script: str) -> str:
    """What to say about a flag that does not exist."""
    here = OTHER_NAMES.get(name)
    if here in names:
        remark = REMARKS.get(name)
        return f"--{name} is called --{here} here" + (f"; {remark}" if remark else "")
    nearest = get_close_matches(name, names, 1)
    guess = f"did you mean --{nearest[0]}? " if nearest else ""
    return f"there is no flag --{name}: {guess}{script} --help lists every flag"


def read_typed(argv: list[str], about: str | None = None) -> dict[str, Any]:
    """The flags of train.py that were typed, each in its range.

    Raises ValueError with one line per problem, and SystemExit after --help.
    """
    preset = value_of("preset", argv)
    shown = decide({"preset": preset}) if preset in PRESETS else decide({})
    typed = parse(Flags, argv, "train.py", about, shown)
    if problems := out_of_range(replace(Flags(), **typed)):
        raise ValueError("\n".join(problems))
    return typed


def parse_config(argv: list[str], text: Text = TINY_SHAKESPEARE, processes: int = 1) -> Config:
    """The flags of a new run on such a text, without what the machine chooses. Raises as `read_typed` does."""
    config = decide(read_typed(argv), text, processes=processes)
    if problems := config.contradictions():
        raise ValueError("\n".join(problems))
    return config
