"""The marked sections of a README: found, filled, and nothing outside them moved.

A section stands between two lines, `<!--AUTO:NAME:START-->` and `<!--AUTO:NAME:END-->`. Inside fenced code, such lines
are ordinary text. The idea is that of nedbat/cog.
"""

import html
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from parts.run.directory import replacing

NAMES = (
    "PLOT",
    "SUMMARY",
    "LOGS",
    "METRICS",
    "SAMPLES",
    "REPRO",
    "COMPARE",
)  # of the sections that there are
MARKER = re.compile(r"<!--AUTO:([A-Z]+):(START|END)-->")
LOOKS_LIKE_MARKER = re.compile(r"<!--\s*AUTO\s*:", re.IGNORECASE)
FENCE = re.compile(
    r"(?: {0,3}|\s*(?:[-*+]|\d+[.)])\s+)(`{3,}(?=[^`]*$)|~{3,})"
)  # in a list item, too
FENCE_END = re.compile(r"\s*(`{3,}|~{3,})\s*")
INLINE_CODE = re.compile(r"(`+)[^`]+\1")
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)  # and reordering


def preformatted(text: str) -> str:
    """The text as an HTML block that shows it letter for letter and that nothing in it can end."""
    visible = INVISIBLE.sub("\ufffd", text).strip("\n")
    return f"<pre>\n{html.escape(visible, quote=False)}\n</pre>"


def shortened(lines: list[str], most: int) -> list[str]:
    """At most so many lines, and at most 400 characters of each; what is left out is said."""
    cut = [line if len(line) <= 400 else line[:400] + " [...]" for line in lines[:most]]
    return cut if len(lines) <= most else [*cut, f"[... {len(lines) - most} more lines]"]


def visible(text: object) -> str:
    """Text of unknown origin on one line, no two texts alike: what cannot be seen, and the backslash, as Python writes
    them in a string."""
    return "".join(
        character
        if character.isprintable() and character != "\\"
        else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def escaped(text: str) -> str:
    """Visible text for Markdown, which shows it as it is: a backslash before each sign that Markdown or HTML could take
    for its own, the pipe of a table and an underscore that is not within a word among them."""
    return re.sub(r"[!#$&*<>@[\\\]^`{|}~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def in_markdown(text: str) -> str:
    """Text of unknown origin on one line of Markdown, shown letter for letter; a line end and the like as U+FFFD."""
    return escaped("".join(c if c.isprintable() else "\ufffd" for c in text))


def cell(text: object) -> str:
    """Text of unknown origin for a table, not too long."""
    return escaped(visible(text)[:200])


def markdown_table(header: list[str], rows: list[list[str]], align: str = "---:") -> str:
    """A pipe table; the cells must be free of line ends, and their pipes escaped. `align` is that of all columns but
    the first."""
    rule = ["---", *[align] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def find_sections(lines: list[str], readme: Path) -> dict[str, tuple[int, int]]:
    """Name of each section to the indices of its two marker lines.

    Raises ValueError, with file and line, for a marker that is missing, doubled, crossed, unknown or
    not alone on its line.
    """
    found: dict[str, tuple[int, int]] = {}
    name, start, fence = "", -1, ""  # of the section or the fenced code that the line stands in
    for index, line in enumerate(lines):
        where = f"{readme.as_posix()}:{index + 1}"
        if not name and fence:
            closing = FENCE_END.fullmatch(line)
            if closing and closing[1].startswith(fence):
                fence = ""
            continue
        if not name and (opening := FENCE.match(line)):
            fence = opening[1]
            continue
        marker = MARKER.fullmatch(line.strip("\ufeff \t\r\n"))
        if not marker:
            if not name and LOOKS_LIKE_MARKER.search(INLINE_CODE.sub("", line)):
                raise ValueError(
                    f"{where}: a marker must be exactly <!--AUTO:NAME:START--> or END, alone on its line"
                )
        elif marker[1] not in NAMES:
            raise ValueError(f"{where}: unknown section {marker[1]}; there are {', '.join(NAMES)}")
        elif marker[2] == "START":
            if name:
                raise ValueError(
                    f"{where}: {marker[1]} starts inside {name}, which started in line {start + 1}"
                )
            if marker[1] in found:
                raise ValueError(
                    f"{where}: a second section {marker[1]}; the first is in line {found[marker[1]][0] + 1}"
                )
            name, start = marker[1], index
        elif marker[1] != name:
            inside = (
                f"inside {name}, which started in line {start + 1}" if name else "without a start"
            )
            raise ValueError(f"{where}: {marker[1]} ends {inside}")
        else:
            found[name], name = (start, index), ""
    if name:
        raise ValueError(
            f"{readme.as_posix()}:{start + 1}: {name} starts here and never ends: add <!--AUTO:{name}:END-->"
        )
    return found


def filled(text: str, contents: Mapping[str, Callable[[], str]], readme: Path) -> str:
    """The README's text with each of these sections rewritten that it has; everything else to the byte as it was.

    Raises ValueError as `find_sections` does, and when it has none of them.
    """
    lines = re.split(r"(?<=\n)", text)
    newline = "\r\n" if "\r\n" in text else "\n"
    pieces, done = [], 0
    found = {
        name: place for name, place in find_sections(lines, readme).items() if name in contents
    }
    if not found:
        name = "COMPARE" if "COMPARE" in contents else "SUMMARY"
        raise ValueError(
            f"{readme.as_posix()}: no sections to fill; put <!--AUTO:{name}:START--> and <!--AUTO:{name}:END--> on two "
            "lines"
        )
    for name, (start, end) in sorted(found.items(), key=lambda item: item[1]):
        pieces += lines[done : start + 1]
        pieces += [line + newline for line in contents[name]().split("\n")]
        done = end
    return "".join(pieces + lines[done:])


def new_readme(title: str, names: Iterable[str]) -> str:
    """The text of a README with these sections, all empty."""
    sections = (
        f"## {n.capitalize()}\n\n<!--AUTO:{n}:START-->\n<!--AUTO:{n}:END-->\n" for n in names
    )
    return "\n".join([f"# {escaped(visible(title))}\n", *sections])


def read_readme(readme: Path) -> str:
    """The README's text with its line ends. Raises FileExistsError, or ValueError when it is not UTF-8."""
    if not readme.is_file():
        raise FileExistsError(f"--readme {readme} is a folder: name a Markdown file")
    try:
        return readme.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{readme.as_posix()} is not UTF-8: offset {error.start}") from error


def check_writable(readme: Path) -> None:
    """Raises PermissionError for a README that may not be written, by its own mode or its folder's. The first would not
    stop `write_text`, which replaces the file; but so a user protects one, root as well."""
    real = readme.resolve()
    if not real.parent.is_dir():
        raise FileNotFoundError(
            f"--readme {readme}: there is no folder {real.parent}: make it, or name another file"
        )
    if real.exists() and not (real.stat().st_mode & 0o222 and os.access(real, os.W_OK)):
        raise PermissionError(
            f"--readme {readme} is write-protected: make it writable, or name another file"
        )
    if not os.access(real.parent, os.W_OK):
        raise PermissionError(
            f"--readme {readme}: the folder {real.parent} is not writable: make it so, or name a file elsewhere"
        )


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole; the permissions of one that is there are kept."""
    path = path.resolve()
    with replacing(path, shared=True) as file:
        file.write(text.encode())
        if path.exists():
            shutil.copymode(path, file.name)
