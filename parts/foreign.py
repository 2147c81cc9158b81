"""What a file is that is no UTF-8 text, and the way from it to one."""

import codecs
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
    """What to say of a file whose first bytes these are: an archive, a document, UTF-16; None for all else."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        made_by = "which is what '>' writes in Windows PowerShell 5.1"
        return f"{name} is UTF-16, {made_by}: {conversion(name, 'utf-16')}"
    for first, further, kind, way in KINDS:
        if data.startswith(first) and further in data:
            return f"{name} is {kind}, not plain text: {way.format(file=quoted(name))}"
    return None


def likely_encoding(data: bytes, name: str, utf8_before: bool) -> str:
    """What bytes may be that are not UTF-8, and what to do; `utf8_before`: letters beyond ASCII came before, in UTF-8.

    A guess: in the languages of Western Europe few letters are beyond ASCII, elsewhere nearly all.
    """
    if b"\0" in data:
        return "it is no text, or one in UTF-16 without a mark: name a text in UTF-8"
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
