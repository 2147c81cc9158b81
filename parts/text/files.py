"""The texts that a user names: which files they are, and what stands in them, as UTF-8."""

import codecs
import fnmatch
import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from parts.flags import DEMO_CORPUS
from parts.run.directory import RunDir

CHUNK = 2**18  # bytes read at a time: many are under way at once, and few words are longer
Hashed = list[tuple[str, Path]]  # files, each with the SHA-256 of its bytes
LeftOut = dict[str, set[Path]]  # by reason
CACHED = re.compile(r".*-[0-9a-f]{12}\.(tokens|json|lock)")  # names in --cache_dir
EMPTY = hashlib.sha256().hexdigest()


def is_glob(path: Path) -> bool:
    """Whether it is a pattern, which PowerShell and cmd leave to us, and no name of something."""
    return glob.has_magic(str(path)) and not path.exists()


def find_files(
    inputs: Sequence[Path], flag: str = "--input_file", left_out: LeftOut | None = None
) -> list[Path]:
    """Files as named, the .txt files of folders and below, and the matches of globs: in the order
    given, sorted in each, each file once. What folders and globs leave out goes into `left_out`.
    Raises FileNotFoundError for what names no file."""
    found: dict[Path, Path] = {}
    left_out = {} if left_out is None else left_out
    for path in inputs:
        if path.is_dir():
            files = files_below(path, [], left_out)
            problem = "holds no .txt file, nor do the folders in it; name others with a glob, "
            problem += f"such as '{path.as_posix()}/**/*.md'"
        elif is_glob(path):
            root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
            files = files_below(root, path.relative_to(root).parts, left_out)
            problem = "matches no file"
        else:
            files = [path] if path.is_file() else []
            hint = " (--preset demo needs none)" if flag == "--input_file" else ""
            problem = f"does not exist: name a UTF-8 text{hint}"
        if not files:
            raise FileNotFoundError("; ".join([f"{flag} {path} {problem}", *in_words(left_out)]))
        for file in files:
            found.setdefault(file.resolve(), file)  # one file may have several names
    return list(found.values())


def files_below(root: Path, pattern: Sequence[str], left_out: LeftOut) -> list[Path]:
    """The files in a folder and below, sorted, that fit the parts of a glob; without any, the .txt
    files. Links to folders are followed; hidden files and those of train.py are left out."""
    run = RunDir(root)
    written = [*run.files, run.owner] if run.is_ours() else []
    takes_hidden = any(part.startswith(".") for part in pattern)
    one_depth = bool(pattern) and "**" not in pattern

    def is_ours(path: Path) -> bool:
        known = path in written or CACHED.fullmatch(path.name) is not None
        return known or (path.is_dir() and RunDir(path).is_ours())

    def is_taken(path: Path) -> bool:
        reason = ""
        if path.name.startswith(".") and not takes_hidden:
            reason = "hidden"
        elif is_ours(path):
            reason = "written by train.py"
        elif not path.exists():
            reason = "broken links"
        elif not pattern and path.is_file() and path.suffix.lower() != ".txt":
            reason = "not .txt"
        if reason:
            left_out.setdefault(reason, set()).add(path)
        return not reason

    def unreadable(error: OSError) -> None:
        left_out.setdefault("unreadable", set()).add(Path(error.filename))

    files: list[Path] = []
    seen = set()
    for name, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
        folder, real = Path(name), os.path.realpath(name)
        parts = folder.relative_to(root).parts
        if real in seen or (parts and not is_taken(folder)):
            folders.clear()
            continue
        seen.add(real)
        fitting = [folder / one for one in names if fits([*parts, one], pattern or ["**"])]
        files += filter(is_taken, fitting)
        folders.sort()
        if one_depth and len(parts) + 1 == len(pattern):
            folders.clear()
    return sorted(files)


def fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path fits a glob, both given in parts."""
    if not parts or not pattern:
        return not parts and set(pattern) <= {"**"}
    if pattern[0] == "**":
        return fits(parts, pattern[1:]) or fits(parts[1:], pattern)
    return fnmatch.fnmatch(parts[0], pattern[0]) and fits(parts[1:], pattern[1:])


def in_words(left_out: LeftOut) -> list[str]:
    """How many files were left out for each reason, with examples; nothing where none was."""
    parts = [f"{why} {len(paths):,} ({a_few(sorted(paths))})" for why, paths in left_out.items()]
    return ["left out: " + ", ".join(parts)] if parts else []


def same_texts(texts: Hashed, others: Hashed) -> str:
    """The pairs of two different files with the same bytes, in words; empty files do not count."""
    first = dict(reversed(texts))
    first.pop(EMPTY, None)
    pairs = [(first.get(sha256), file) for sha256, file in others]
    return a_few([f"{one} = {file}" for one, file in pairs if one and one is not file])


def a_few(things: Sequence[object]) -> str:
    """The first three in words, and that there are more."""
    return ", ".join([*map(str, things[:3]), *["..."] * (len(things) > 3)])


def size_of(inputs: Sequence[Path]) -> int:
    """Bytes of texts; many where there are none: that is told where they are read."""
    if DEMO_CORPUS in inputs:
        return len(demo_text().encode())
    try:
        return sum(path.stat().st_size for path in find_files(inputs)) or 10**12
    except OSError:
        return 10**12


def demo_text() -> str:
    """English that ships inside every Python, plain prose first."""
    from pydoc_data.topics import topics

    first = ["objects", "naming"]
    return "\n".join(topics[name] for name in [*first, *sorted(topics.keys() - set(first))])


def read_text(path: Path, flag: str) -> str:
    """The text of one UTF-8 file. Raises OSError, or ValueError when it is empty or not UTF-8."""
    if path.is_dir() or not path.exists():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{flag} {path} {problem}: name a UTF-8 text")
    with open(path, "rb") as file:
        text = "".join(read_pieces(file, str(path)))
    if not text:
        raise ValueError(f"{flag} {path} is empty: name a UTF-8 text")
    return text


OnBytes = Callable[[bytes], object]


def pieces_of(path: Path, bar: tqdm, on_bytes: OnBytes = lambda data: None) -> Iterator[str]:
    """`read_pieces` of a file, whose bytes a bar counts."""
    with open(path, "rb") as file:
        yield from read_pieces(CallbackIOWrapper(bar.update, file), str(path), on_bytes)


def read_pieces(file: BinaryIO, name: str, on_bytes: OnBytes = lambda data: None) -> Iterator[str]:
    """The text of a UTF-8 file in pieces whose ids, one after the other, are those of the whole.
    A byte-order mark is dropped, line ends are kept; `on_bytes` is shown all bytes. Raises
    ValueError, with the name, for what is no UTF-8 text."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    n_read = 0
    held: list[str] = []  # read, and not to be cut
    data = None
    while data != b"":
        data = file.read(CHUNK)
        on_bytes(data)
        check_is_text(data, n_read, name)
        n_read += len(data)
        try:
            new = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            offset = n_read - len(error.object) + error.start
            byte = error.object[error.start]
            remedy = conversion(name, "windows-1252")
            raise ValueError(
                f"{name} is not UTF-8: byte 0x{byte:02x} at offset {offset}; if all of it is in "
                f"another encoding, such as windows-1252 (Western Europe), {remedy}"
            ) from error
        first, last = places_to_cut(new)
        if last:
            yield "".join([*held, new[:first]])
            yield new[first:last]
            held = []
        held.append(new[last:])
    yield "".join(held)


def places_to_cut(text: str) -> tuple[int, int]:
    """The first and the last place where the pattern for words joins nothing, whatever stands
    around the text; 0 for none. That is before a white space which a word follows. So a run of
    white space ends its piece: when something follows a very long one, tiktoken fails."""
    first = re.search(r"[ \t\r\n]\S", text)
    last = re.match(r".*(?=[ \t\r\n]\S)", text, re.DOTALL)
    return (first.start(), last.end()) if first and last else (0, 0)


def check_is_text(data: bytes, n_before: int, name: str) -> None:
    """Raises ValueError, with the way to a text, for bytes that no text has, where `n_before` bytes
    of the file came before them: a PDF, a zip archive, UTF-16, or a NUL."""
    save = "save it as plain text (UTF-8) in the program it comes from"
    problem = ""
    if b"\0" in data:
        problem = f"has a NUL byte at offset {n_before + data.index(0)}, which no text has"
        problem += ": it is binary, damaged, or UTF-16 without a mark; name a text in UTF-8"
    if n_before == 0 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        made_by = "which is what '>' writes in Windows PowerShell 5.1"
        problem = f"is UTF-16, {made_by}: {conversion(name, 'utf-16')}"
    if n_before == 0 and data.startswith(b"PK\x03\x04"):
        problem = f"is a zip archive, or a document such as Word's: unpack it, or {save}"
    if n_before == 0 and data.startswith(b"%PDF-"):
        problem = f"is a PDF: run pdftotext -enc UTF-8 {quoted(name)} utf8.txt, or {save}"
    if problem:
        raise ValueError(f"{name} {problem}")


def conversion(name: str, encoding: str) -> str:
    """How to make a copy in UTF-8."""
    file = quoted(name)
    iconv = f"iconv -f {encoding} -t utf-8 {file} > utf8.txt"
    # `Convert-Path` comes first: PowerShell 7.0 to 7.3.0 know code pages only once they have loaded
    # a module (PowerShell pull request 18605).
    code_page = f"[Text.Encoding]::GetEncoding('{encoding}')"
    read = f"[IO.File]::ReadAllText((Convert-Path {file}), {code_page})"
    write = "Set-Content -NoNewline -Encoding utf8 utf8.txt"
    return f"make a UTF-8 copy and use that. Linux, macOS: {iconv}; PowerShell: {read} | {write}"


def quoted(name: str) -> str:
    """A file for a command line of any shell; FILE for what has no name, such as standard input."""
    return f'"{name}"' if Path(name).exists() else "FILE"
