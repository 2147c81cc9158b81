"""The marked sections of a README: found, filled, and nothing outside them moved.

A section stands between two lines, `<!--AUTO:NAME:START-->` and `<!--AUTO:NAME:END-->`. In fenced
code, such lines are ordinary text. The idea is that of nedbat/cog.
"""

import html
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from parts.commandline import encode_escapes
from parts.run.directory import is_protected, replacing

NAMES = ("PLOT", "SUMMARY", "LOGS", "METRICS", "SAMPLES", "REPRO", "COMPARE")  # of all sections
MARKER = re.compile(r"<!--AUTO:([A-Z]+):(START|END)-->")
LOOKS_LIKE_MARKER = re.compile(r"<!--\s*AUTO\s*:", re.IGNORECASE)
FENCE = re.compile(r"\s*(?:[-*+]\s|\d+[.)]\s)?\s*(`{3,}|~{3,})[^`]*$")  # in a list item, too
INVISIBLE = re.compile(  # and what reorders text
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)


def preformatted(text: str) -> str:
    """An HTML block that shows the text letter for letter, and that nothing in it can end."""
    shown = INVISIBLE.sub("\ufffd", text).strip("\n")
    return f"<pre>\n{html.escape(shown, quote=False)}\n</pre>"


def shortened(lines: list[str], most: int) -> list[str]:
    """At most so many lines, and at most 400 characters of each; what is left out is said."""
    cut = [line if len(line) <= 400 else line[:400] + " [...]" for line in lines[:most]]
    return cut if len(lines) <= most else [*cut, f"[... {len(lines) - most} more lines]"]


def escaped(text: str) -> str:
    """Visible text for Markdown: a backslash before each sign that Markdown, a table or HTML could
    take for its own, such as an underscore that is not within a word."""
    return re.sub(r"[!#$&*<>@[\\\]^`{|}~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def in_markdown(text: str) -> str:
    """The text on one line of Markdown, letter for letter; a line end and the like as U+FFFD."""
    return escaped("".join(c if c.isprintable() else "\ufffd" for c in text))


def cell(text: object) -> str:
    """The text for a table, not too long."""
    return escaped(encode_escapes(str(text))[:200])


def markdown_table(header: list[str], rows: list[list[str]], align: str = "---:") -> str:
    """A pipe table of cells without line ends and bare pipes; `align` is for all but the first."""
    rule = ["---", *[align] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def find_sections(lines: list[str], readme: Path) -> dict[str, tuple[int, int]]:
    """Name of each section to the indices of its two marker lines.

    Raises ValueError, with file and line, for a missing, doubled, crossed or unknown marker.
    """
    found: dict[str, tuple[int, int]] = {}
    name, start, fence = "", -1, ""  # of the section or the fenced code that the line stands in
    for index, line in enumerate(lines):
        text = line.strip("\ufeff \t\r\n")
        marker = MARKER.fullmatch(text)
        if fence:
            is_end = text.startswith(fence) and not text.strip(fence[0])
            fence = "" if is_end else fence
            continue
        if not name and (opening := FENCE.match(line)):
            fence = opening[1]
            continue
        problem, here = "", f"inside {name}, which started in line {start + 1}"
        if not marker:
            if LOOKS_LIKE_MARKER.match(text) and not name:
                problem = "a marker must be exactly <!--AUTO:NAME:START--> or END, on its own line"
        elif marker[1] not in NAMES:
            problem = f"unknown section {marker[1]}; there are {', '.join(NAMES)}"
        elif marker[2] == "END" and marker[1] != name:
            problem = f"{marker[1]} ends {here if name else 'without a start'}"
        elif marker[2] == "END":
            found[name] = (start, index)
            name = ""
        elif name:
            problem = f"{marker[1]} starts {here}"
        elif marker[1] in found:
            first = found[marker[1]][0] + 1
            problem = f"a second section {marker[1]}; the first is in line {first}"
        else:
            name, start = marker[1], index
        if problem:
            raise ValueError(f"{readme.as_posix()}:{index + 1}: {problem}")
    if name:
        raise ValueError(
            f"{readme.as_posix()}:{start + 1}: {name} starts here and never ends: add "
            f"<!--AUTO:{name}:END-->"
        )
    return found


def filled(text: str, contents: Mapping[str, Callable[[], str]], readme: Path) -> str:
    """The README's text with those of these sections rewritten that it has; the rest to the byte.

    Raises ValueError as `find_sections` does, and when it has none of them.
    """
    lines = re.split(r"(?<=\n)", text)
    newline = "\r\n" if "\r\n" in text else "\n"
    found = find_sections(lines, readme)
    if not found.keys() & contents.keys():
        name = "COMPARE" if "COMPARE" in contents else "SUMMARY"
        raise ValueError(
            f"{readme.as_posix()}: no sections to fill; put <!--AUTO:{name}:START--> and "
            f"<!--AUTO:{name}:END--> on two lines"
        )
    for name, (start, end) in sorted(found.items(), key=lambda item: item[1], reverse=True):
        if name in contents:
            content = contents[name]().split("\n")
            lines[start + 1 : end] = [line + newline for line in content]
    return "".join(lines)


def new_readme(title: str, names: Iterable[str]) -> str:
    """The text of a README with these sections, all empty."""
    sections = [
        f"## {name.capitalize()}\n\n<!--AUTO:{name}:START-->\n<!--AUTO:{name}:END-->\n"
        for name in names
    ]
    return "\n".join([f"# {escaped(encode_escapes(title))}\n", *sections])


def read_readme(readme: Path) -> str:
    """The README's text with its line ends. Raises FileExistsError or ValueError for no text."""
    if not readme.is_file():
        raise FileExistsError(f"--readme {readme} is a folder: name a Markdown file")
    try:
        return readme.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{readme.as_posix()} is not UTF-8: offset {error.start}") from error


def check_writable(readme: Path) -> None:
    """Raises OSError for a README that may not be written, by its own mode or its folder's.

    `write_text` replaces the file, which its own mode would not stop; but so a user protects it.
    """
    real = readme.resolve()
    problem = ""
    if not real.parent.is_dir():
        problem = f"there is no folder {real.parent}: make it"
    elif is_protected(real):
        problem = "it is write-protected: make it writable"
    elif not os.access(real.parent, os.W_OK):
        problem = f"the folder {real.parent} is not writable: make it so"
    if problem:
        raise OSError(f"--readme {readme}: {problem}, or name another file")


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole; the permissions of one that is there are kept."""
    path = path.resolve()
    with replacing(path, shared=True) as file:
        file.write(text.encode())
        if path.exists():
            shutil.copymode(path, file.name)
