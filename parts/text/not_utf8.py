"""What a file is that is no UTF-8 text, and the way to one."""

import codecs
from pathlib import Path

SAVE = "save it as plain text (UTF-8) in the program it comes from"


def not_a_text(data: bytes, before: int, name: str) -> str | None:
    """What to say of these bytes of a file, which follow its first `before`: a PDF, a zip archive,
    UTF-16 with its mark, or a NUL, which no text has. None for all else."""
    if before == 0 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        made_by = "which is what '>' writes in Windows PowerShell 5.1"
        return f"{name} is UTF-16, {made_by}: {conversion(name, 'utf-16')}"
    if before == 0 and data.startswith(b"PK\x03\x04"):
        kind = "a zip archive, or a document of Word or another program"
        return f"{name} is {kind}: unpack it, or {SAVE}"
    if before == 0 and data.startswith(b"%PDF-"):
        return f"{name} is a PDF: run pdftotext -enc UTF-8 {quoted(name)} utf8.txt, or {SAVE}"
    if b"\0" in data:
        where = f"{name} has a NUL byte at offset {before + data.index(0)}, which no text has"
        return f"{where}: it is binary, damaged, or UTF-16 without a mark; name a text in UTF-8"
    return None


def not_utf8(byte: int, offset: int, name: str) -> str:
    """What to say of a file with a byte that UTF-8 cannot have there."""
    return (
        f"{name} is not UTF-8: byte 0x{byte:02x} at offset {offset}; if all of it is in another "
        f"encoding, such as windows-1252 (Western Europe), {conversion(name, 'windows-1252')}"
    )


def conversion(name: str, encoding: str) -> str:
    """How to make a copy in UTF-8. In PowerShell, `Convert-Path` comes before the code page is
    asked for: version 7, up to 7.3.0, knows code pages from the first module on that it loads
    (PowerShell pull request 18605)."""
    file = quoted(name)
    return (
        f"make a UTF-8 copy and use that. Linux, macOS: iconv -f {encoding} -t utf-8 {file} > utf8.txt; "
        f"PowerShell: [IO.File]::ReadAllText((Convert-Path {file}), "
        f"[Text.Encoding]::GetEncoding('{encoding}')) | Set-Content -NoNewline -Encoding utf8 utf8.txt"
    )


def quoted(name: str) -> str:
    """A file for a command line of any shell; FILE for what has no name, such as standard input."""
    return f'"{name}"' if Path(name).exists() else "FILE"
