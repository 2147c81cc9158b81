"""Flags as typed: help in groups, every mistake in one line with its remedy; commands to be typed again."""

import argparse
import io
import os
import re
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass, make_dataclass, replace
from difflib import get_close_matches
from itertools import pairwise, takewhile
from typing import Any, TypeVar

import tyro

from parts.config import PRESETS, Config, Flags, brief, out_of_range
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
ESCAPE = re.compile(r"\\[nt\\]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}")  # but no half of a surrogate pair


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


def read_flags(
    kind: type[T], argv: list[str], script: str, about: str | None, default: T | None = None, silent: bool = False
) -> T:
    """A script's flags, as its dataclass declares them; `about` is its docstring. Bases of the dataclass are groups.

    Raises ValueError, a line for each mistake, and SystemExit after --help.
    """
    argv = [as_utf8(argument) for argument in argv]
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # every kind is a dataclass
    if problems := [unknown(name, names, script) for name in typed(argv) if name not in (*names, "help")]:
        raise ValueError("\n".join(problems))
    for name in (field.name for field in fields(kind) if field.type is bool):  # type: ignore[arg-type]
        if with_value := [argument for argument in argv if "=" in argument and typed([argument]) == [name]]:
            raise ValueError(f"{brief(with_value[0])}: --{name} takes no value, give it alone")
    said, shown = io.StringIO(), io.StringIO() if silent else sys.stdout
    try:
        with redirect_stderr(said), redirect_stdout(shown):
            groups = [base for base in reversed(kind.__mro__[1:]) if is_dataclass(base)]
            wanted: Any = nested(groups, default) if groups else kind
            found = tyro.cli(
                wanted,
                args=argv,
                prog=script,
                use_underscores=True,
                description=(about or "").partition("\n\n")[0],
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff),
            )
    except BrokenPipeError:  # `--help | head` has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(0) from None
    except SystemExit as answered:
        if answered.code:
            complaint = in_our_words(re.sub(r"\x1b\[[\d;]*m", "", said.getvalue()), "input_file" in names, argv)
            raise ValueError(f"{complaint} ({script} --help lists every flag)") from None
        raise
    return kind(**{k: v for group in vars(found).values() for k, v in vars(group).items()}) if groups else found


def nested(groups: list[type], default: object) -> type:
    """A dataclass with one field for each group of flags, set to what `default` has."""
    values = {group: {field.name: getattr(default, field.name) for field in fields(group)} for group in groups}
    members = [(group.__name__.removesuffix("Flags").lower(), group, group(**values[group])) for group in groups]
    return make_dataclass("CommandLine", members, frozen=True)


def typed(argv: list[str]) -> list[str]:
    """The names of the flags on a command line."""
    return [match[1].replace("-", "_") for argument in argv if (match := re.match(r"--([a-zA-Z][\w-]*)", argument))]


def value_of(name: str, argv: list[str]) -> str | None:
    """What a flag is given on a command line, the last time; None where it is not there."""
    found = None
    for argument, following in pairwise([*argv, ""]):
        if typed([argument]) == [name]:
            found = argument.partition("=")[2] if "=" in argument else following
    return found


def flag_words(name: str, values: list[str]) -> list[str]:
    """The words of a command line that give a flag these values, also such as begin with a dash: paths, where there are
    several."""
    first, more = values[:1], [f"./{value}" if value.startswith("-") else value for value in values[1:]]
    return [f"--{name}={first[0]}", *more] if first and first[0].startswith("-") else [f"--{name}", *first, *more]


def to_type(words: list[str]) -> str:
    """A command of train.py as one line for bash, in which every character can be seen. In a prompt those that could
    not be are the prompt's own escapes, for any shell; in other words they are bash's."""
    shown = []
    for before, word in pairwise(["", *words]):
        start = "--prompt=" * word.startswith("--prompt=")
        if (start or before == "--prompt") and hidden(word):
            word = start + encode_escapes(decode_escapes(word.removeprefix(start)))
        shown.append(bash_word(word) if hidden(word) else shlex.quote(word))
    return " ".join(shown)


def bash_word(word: str) -> str:
    """A word as bash's $'...', its bytes in hexadecimal where they are more than plain ASCII."""
    return "$'" + re.sub(r"[^ -~]|['\\]", lambda c: "".join(f"\\x{byte:02x}" for byte in c[0].encode()), word) + "'"


def unknown(name: str, names: list[str], script: str) -> str:
    """What to say of a flag that there is not."""
    here = OTHER_NAMES.get(name)
    if here in names:
        return "; ".join(filter(None, [f"--{name} is called --{here} here", REMARKS.get(name)]))
    nearest = get_close_matches(name, names, 1)
    guess = f"did you mean --{nearest[0]}? " if nearest else ""
    return f"there is no flag --{name}: {guess}{script} --help lists every flag"


def in_our_words(said: str, has_texts: bool, argv: list[str]) -> str:
    """tyro's complaint, from its box, as one line. Values are taken from `argv`: its box breaks long ones."""
    rest = iter(line.strip("│ ") for line in said.splitlines())
    next((line for line in rest if re.search("[-─]{3}", line)), None)  # what is above is a title
    text = " ".join(takewhile(lambda line: line and not re.match("[-─]{3}", line), rest)) or " ".join(said.split())
    if match := re.fullmatch(r"invalid choice '(.*)' for argument '(--\w+)'\. Expected one of \((.*?),?\)\.", text):
        choices = re.findall(r"'(.*?)'", match[3])
        nearest = get_close_matches(match[1], choices, 1)
        guess = f": did you mean {nearest[0]}?" if nearest else ""
        return f"{match[2]} {brief(match[1])} is none of {', '.join(choices)}{guess}"
    if match := re.match(r"Error parsing --(\w+): .*?(INT|FLOAT|int\(\)|float|integer)", text):
        value, kind = value_of(match[1], argv) or "", "whole " * match[2].lower().startswith("int")
        too_long = value.lstrip("+-").isdecimal()  # Python reads no integer of more than 4,300 digits
        return f"--{match[1]} {brief(value)} is {'far outside its range' if too_long else f'not a {kind}number'}"
    if match := re.match(r"Missing value for argument '(--\w+)'", text):
        return f"{match[1]} needs a value"
    if match := re.fullmatch(r"Missing from \S+: (--\w+) [][PATH. ]+ (.*) \(required\)", text):
        return f"{match[1]} is missing: {match[2]}"
    if match := re.fullmatch(r"Unrecognized options:[ ,]*(.*)", text):
        return f"{brief(match[1])} belongs to no flag" + "; a text is named with --input_file" * has_texts
    return text


def read_typed(argv: list[str], silent: bool = False, about: str | None = None) -> dict[str, Any]:
    """The flags of train.py that were typed, each in its range.

    Raises ValueError with one line per problem, and SystemExit as `read_flags` does.
    """
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--preset", nargs="?", default=Flags.preset)
    preset = first_look.parse_known_args(argv)[0].preset
    defaults = Flags()
    if preset in PRESETS:
        config = decide({"preset": preset})
        defaults = Flags(**{f.name: getattr(config, f.name) for f in fields(Flags)})
    flags = read_flags(Flags, argv, "train.py", about, defaults, silent)
    found = {name: getattr(flags, name) for name in typed(argv)}
    if problems := out_of_range(replace(Flags(), **found)):
        raise ValueError("\n".join(problems))
    return found


def parse_config(argv: list[str], text: Text = TINY_SHAKESPEARE, processes: int = 1) -> Config:
    """The flags of a new run on such a text, without what the machine chooses. Raises as `read_typed` does."""
    config = decide(read_typed(argv), text, processes=processes)
    if problems := config.contradictions():
        raise ValueError("\n".join(problems))
    return config
