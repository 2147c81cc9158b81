"""Words as typed to flags: help in groups, each mistake in one line with its remedy; and back."""

import argparse
import ast
import inspect
import os
import re
import shlex
import typing
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Any, NoReturn, TypeVar

from parts import VERSION
from parts.flags import PRESETS, Config, Flags, brief, out_of_range
from parts.recipe import decide

T = TypeVar("T")
OTHER_NAMES = {  # the flag here: its names in other programs
    "lr": "learning_rate max_lr",
    "steps": "max_steps max_iters iterations epoch epochs num_epochs num_train_epochs",
    "warmup_steps": "warmup warmup_iters",
    "batch_size": "batchsize bs per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "seq_len": "context_length max_seq_len",
    "block_size": "n_ctx n_positions",
    "input_file": "input data",
    "out_dir": "output_dir",
    "preset": "model",
    "amp": "fp16 bf16 dtype",
    "prompt": "prompt_file",
}
REMARKS = {  # where the flag here does not say the same
    "epochs": "one pass over the text is as many steps as the log calls a pseudo-epoch",
    "context_length": "the tokens of a slice; --block_size are the positions that the model has",
    "prompt_file": "sample.py has a --prompt_file",
}
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
ESCAPE = re.compile(r"\\[nt\\]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}")  # no half of a surrogate pair


def decode_escapes(text: str) -> str:
    r"""Turn \n, \t, \\ and \uXXXX into what they stand for: a shell passes them as written."""
    return ESCAPE.sub(lambda match: ESCAPES.get(match[0]) or chr(int(match[0][2:], 16)), text)


def encode_escapes(text: str) -> str:
    """Text that `decode_escapes` reads back, without characters that cannot be seen."""
    for escape in (r"\\", r"\n", r"\t"):
        text = text.replace(ESCAPES[escape], escape)
    # Letters beyond U+FFFF may only be newer than this Python.
    return "".join(c if c.isprintable() or c > "\uffff" else f"\\u{ord(c):04x}" for c in text)


def as_utf8(argument: str) -> str:
    """An argument whose bytes are UTF-8, however the system reads them. Raises ValueError."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{argument!a} is not UTF-8") from error


def read_flags(kind: type[T], argv: list[str], script: str, about: str | None) -> T:
    """The flags of a script, which its dataclass declares; `about` is the script's docstring.

    Raises ValueError, one line for each mistake, and SystemExit after --help.
    """
    given = parse(kind, argv, script, about)
    for name, text in help_of(kind).items():
        if name not in given and not hasattr(kind, name):  # it has no default
            raise ValueError(f"--{name} is missing: {text}")
    return kind(**given)


def parse(
    kind: type, argv: list[str], script: str, about: str | None, defaults: object = None
) -> dict[str, Any]:
    """The values of the flags that are typed, by name. `defaults` has what the help shows.

    Raises as `read_flags` does.
    """
    parser = Parser(kind, script, (about or "").partition("\n\n")[0], defaults or kind)
    found, rest = parser.parse_known_args([with_underscores(as_utf8(word)) for word in argv])
    flags = [word[2:].partition("=")[0] for word in rest if word.startswith("--")]
    names = [flag.name for flag in fields(kind)]
    if flags:
        raise ValueError("\n".join(unknown(flag, names, script) for flag in flags))
    if rest:
        hint = "; a text is named with --input_file" if "input_file" in names else ""
        parser.error(f"{brief(rest[0])} belongs to no flag{hint}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(found).items()}


class Parser(argparse.ArgumentParser):
    """The flags that a dataclass declares. Its bases, if it has any, are the groups of the help."""

    def __init__(self, kind: type, script: str, about: str, defaults: object):
        super().__init__(script, "%(prog)s [options]", about, allow_abbrev=False)
        self.argument_default = argparse.SUPPRESS  # what is not typed is left out
        self.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
        types = typing.get_type_hints(kind, include_extras=True)
        explained = help_of(kind)
        for group in [base for base in reversed(kind.__mro__[1:]) if is_dataclass(base)] or [kind]:
            section = self.add_argument_group(group.__name__.removesuffix("Flags"), group.__doc__)
            for flag in fields(group):
                words = explained.get(flag.name, "")
                if default := default_words(types[flag.name], getattr(defaults, flag.name, None)):
                    words += f" (default: {default})"
                form = form_of(types[flag.name])
                section.add_argument(f"--{flag.name}", help=words.replace("%", "%%"), **form)

    def error(self, message: str) -> NoReturn:
        """Raises ValueError instead of writing to stderr."""
        message = message.removeprefix("argument ")
        raise ValueError(f"{message} ({self.prog} --help lists every flag)")


def form_of(annotation: Any) -> dict[str, Any]:
    """What argparse has to know about a flag of this type."""
    if typing.get_origin(annotation) is typing.Literal:
        return {"choices": typing.get_args(annotation)}
    if typing.get_origin(annotation) is tuple:
        return {"type": Path, "nargs": "*", "metavar": "PATH"}
    if annotation is bool:
        return {"action": "store_true"}
    if isinstance(annotation, type):
        return {"type": annotation, "metavar": annotation.__name__.upper()}
    return form_of(typing.get_args(annotation)[0])  # of Annotated[X, ...] and of X | None: X


def default_words(annotation: Any, value: object) -> str:
    """What the help says about a default; nothing where there is none."""
    for note in getattr(annotation, "__metadata__", ()):
        if isinstance(note, str):
            return note
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None or value is False else str(value)


def help_of(kind: type) -> dict[str, str]:
    """The help of each flag: the string below its field, on one line."""
    found = {}
    for base in reversed(kind.__mro__[:-1]):
        declared: Any = ast.parse(dedent(inspect.getsource(base))).body[0]
        for flag, text in pairwise(declared.body):
            if isinstance(flag, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(flag.target)] = " ".join(ast.literal_eval(text.value).split())
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
    """The words that give a flag these values."""
    if len(values) == 1 and values[0].startswith("-"):
        return [f"--{name}={values[0]}"]
    return [f"--{name}", *values]


def shell_line(words: list[str]) -> str:
    """A command on one line for a shell. A prompt's invisible characters are its own escapes."""
    line = []
    for before, word in pairwise(["", *words]):
        if before == "--prompt" or word.startswith("--prompt="):
            word = encode_escapes(decode_escapes(word))
        line.append(word)
    return shlex.join(line)


def unknown(name: str, names: list[str], script: str) -> str:
    """What to say about a flag that does not exist."""
    for here, others in OTHER_NAMES.items():
        if here in names and name in others.split():
            remark = REMARKS.get("epochs" if "epoch" in name else name)
            return f"--{name} is called --{here} here" + (f"; {remark}" if remark else "")
    nearest = get_close_matches(name, names, 1)
    guess = f"did you mean --{nearest[0]}? " if nearest else ""
    return f"there is no flag --{name}: {guess}{script} --help lists every flag"


def read_typed(argv: list[str], about: str | None = None) -> dict[str, Any]:
    """The flags of train.py that were typed, each in its range.

    Raises ValueError with one line per problem, and SystemExit after --help.
    """
    preset = value_of("preset", argv)
    defaults = decide({"preset": preset} if preset in PRESETS else {})
    typed = parse(Flags, argv, "train.py", about, defaults)
    if problems := out_of_range(replace(Flags(), **typed)):
        raise ValueError("\n".join(problems))
    return typed


def parse_config(argv: list[str], processes: int = 1) -> Config:
    """The flags of a new run, without what the machine chooses. Raises as `read_typed` does."""
    config = decide(read_typed(argv), processes=processes)
    if problems := config.contradictions():
        raise ValueError("\n".join(problems))
    return config
