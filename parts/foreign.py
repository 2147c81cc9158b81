"""What a file is that is no UTF-8 text, and the way from it to one."""

import codecs
import unicodedata
from contextlib import suppress
from pathlib import Path

SAVE = "save it as plain text (UTF-8) in the program it comes from"
PANDOC = SAVE + ", or run pandoc --wrap=none -t plain -o utf8.txt {file}"
UNPACK = "unpack it and name the text in it"
ZIP = b"PK\x03\x04"
KINDS = (  # the first bytes; further ones near them; what has both; the way to its text
    (ZIP, b"word/document", "a Word document (.docx)", PANDOC),
    (ZIP, b"mimetypeapplication/vnd.oasis.opendocument", "an OpenDocument file (.odt)", PANDOC),
    (ZIP, b"mimetypeapplication/epub+zip", "an EPUB book", PANDOC),
    (ZIP, b"", "a zip archive, or a document inside one", f"{UNPACK}, or {SAVE}"),
    (b"PK\x05\x06", b"", "an empty zip archive", "name a text"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b"", "a document of Word or Office up to 2003 (.doc)", SAVE),
    (b"%PDF-", b"", "a PDF", "run pdftotext -enc UTF-8 {file} utf8.txt (of Poppler), or " + SAVE),
    (rb"{\rtf", b"", "a document in Rich Text Format (.rtf)", PANDOC),
    (b"\x1f\x8b", b"", "a gzip archive", UNPACK),
    (b"\xfd7zXZ\0", b"", "an xz archive", UNPACK),
    (b"BZh", b"1AY&SY", "a bzip2 archive", UNPACK),
    (b"\x28\xb5\x2f\xfd", b"", "a Zstandard archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", b"", "a 7-Zip archive", UNPACK),
)


def other_kind(data: bytes, name: str) -> str | None:
    """What to say of a file whose first bytes these are: an archive, a document, UTF-16 or UTF-32 with its mark; None
    for all else."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # the first of them begins as UTF-16's mark does
        return f"{name} is UTF-32: {conversion(name, 'utf-32')}"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        made_by = "which is what '>' writes in Windows PowerShell 5.1"
        return f"{name} is UTF-16, {made_by}: {conversion(name, 'utf-16')}"
    for first, further, kind, way in KINDS:
        if data.startswith(first) and further in data:
            return f"{name} is {kind}, not plain text: {way.format(file=quoted(name))}"
    return None


def what_holds_nul(data: bytes, before: int, name: str) -> str:
    """What to say of a file with a NUL byte, which no text has: where it is, what the file probably is, and what to do.

    `data`, with the NUL in it, is what follows the first `before` bytes.
    """
    nul = f"{name} has a NUL byte at offset {before + data.index(0)}, which no text has"
    if before == 0 and data[257:262] == b"ustar":
        return f"{nul}: it is a tar archive: {UNPACK}"
    rest = data.replace(b"\0", b"").decode("utf-8", errors="replace")
    if data.count(0) * 4 < len(data) and is_plain(rest) and rest.count("\ufffd") * 4 <= len(rest):
        return f"{nul}; what stands around it is text, so that place is damaged: mend it"
    if encoding := without_mark(data):
        return f"{nul}; probably it is {encoding.upper()} without a mark: {conversion(name, encoding)}"
    return f"{nul}; it is binary, or a damaged text: name a text in UTF-8"


def without_mark(data: bytes) -> str | None:
    """UTF-16 or UTF-32, if the bytes are plain text in it; of the two byte orders the one in which a NUL is the higher
    byte of its character, as it is in whatever ASCII there is."""
    order = "le" if data[1::2].count(0) > data[::2].count(0) else "be"
    for encoding in (f"utf-32{order}", f"utf-16{order}"):
        with suppress(UnicodeDecodeError):
            if is_plain(codecs.getincrementaldecoder(encoding)().decode(data)):
                return encoding
    return None


def is_plain(text: str) -> bool:
    """Whether at least 99 of 100 characters are letters, signs and white space that there are."""
    strange = sum(unicodedata.category(c) in ("Cc", "Cn", "Co") and c not in "\t\n\r\f" for c in text)
    return 0 < len(text) >= strange * 100


def likely_encoding(data: bytes, name: str, utf8_before: bool) -> str:
    """What bytes may be that are not UTF-8, and what to do; `utf8_before`: letters beyond ASCII came before, in UTF-8.

    A guess: in the languages of Western Europe few letters are beyond ASCII, elsewhere nearly all.
    """
    if utf8_before:
        return "what stands before is UTF-8, so that place is damaged, or joined from another file: mend it"
    if sum(byte > 127 for byte in data) * 3 > len(data):
        known = "windows-1251 (Cyrillic), gb18030 (Chinese) or shift_jis (Japanese)"
        return f"find out its encoding, such as {known}, then {conversion(name, 'ENCODING')}"
    return f"probably it is Windows-1252, as in Western Europe: {conversion(name, 'windows-1252')}"


def conversion(name: str, encoding: str) -> str:
    """How to make a copy in UTF-8. In PowerShell, `Convert-Path` comes before the code page is asked for: version 7, up
    to 7.3.0, knows code pages from the first module on that it loads (PowerShell pull request 18605)."""
    file = quoted(name)
    return (
        f"make a UTF-8 copy and use that. Linux, macOS: iconv -f {encoding} -t utf-8 {file} > utf8.txt; PowerShell: "
        f"[IO.File]::ReadAllText((Convert-Path {file}), [Text.Encoding]::GetEncoding('{encoding}')) | "
        "Set-Content -NoNewline -Encoding utf8 utf8.txt"
    )


def quoted(name: str) -> str:
    """A file for a command line of any shell; FILE for what has no name, such as standard input."""
    return f'"{name}"' if Path(name).exists() else "FILE"
