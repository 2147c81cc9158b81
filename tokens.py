"""Texts of any size and number, and vocabularies of one's own; train.py calls this for all but one small file.

Text is read, cut and encoded in a stream, on all cores, into a file of token ids, which is then memory-mapped: memory
does not grow with the text. The ids are those of the whole text encoded at once, because it is cut only where the
vocabularies' pattern never joins two characters.

References:
- Radford et al. 2019 (GPT-2), src/encoder.py in github.com/openai/gpt-2: the pattern that cuts text into words
- Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", arXiv 1508.07909
- Hugging Face tokenizers (training of vocabularies), tiktoken (GPT-2's)
"""

import codecs
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import unicodedata
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken
from filelock import FileLock, Timeout
from tqdm import tqdm

log = logging.getLogger("train")

DOCUMENT_END = "<|endoftext|>"
MAGIC = "GPT token ids, version 1, after a header of {:08d} bytes with the checksum {:010d}\n"
FIRST_LINE = re.compile(re.sub(r"{:0(\d+)d}", r"(\\d{\1})", MAGIC).encode())
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
CHUNK = 2**18  # bytes read at a time: small enough for many to be under way, large enough for long words to be rare


@dataclass(frozen=True)
class TokenFile:
    """The ids of one or several texts, on disk."""

    tokens: np.memmap  # (N,) uint16 or uint32, read-only
    sha256: str  # of the text; of several texts, of the lines of their hashes
    n_bytes: int  # of the texts


# ---------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------


def find_files(inputs: list[Path], flag: str = "--input_file") -> list[Path]:
    """Files, the .txt files of folders and below, and the matches of globs, in the order given and sorted in each.

    Raises FileNotFoundError for what names no file.
    """
    found: dict[Path, Path] = {}
    for path in inputs:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*.txt") if p.is_file())
            remedy = f"holds no .txt file; name others with a glob, such as '{path.as_posix()}/**/*.md'"
        elif glob.has_magic(str(path)) and not path.exists():
            files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
            remedy = "matches no file"
        else:
            files, remedy = [path] if path.is_file() else [], "does not exist"
        if not files:
            raise FileNotFoundError(f"{flag} {path} {remedy}")
        for file in files:
            found.setdefault(file.resolve(), file)  # one file may have several names
    return list(found.values())


def pieces(path: Path, on_bytes: Callable[[bytes], object] = lambda data: None) -> Iterator[str]:
    """The text of a UTF-8 file in parts whose ids, one after the other, are those of the whole.

    A byte-order mark is dropped, line ends are kept. `on_bytes` is shown all bytes. Raises ValueError when it is not
    UTF-8, with the offset.
    """
    decoder, text, read = codecs.getincrementaldecoder("utf-8-sig")(), "", 0
    with open(path, "rb") as file:
        while True:
            data = file.read(CHUNK)
            on_bytes(data)
            if read == 0 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ValueError(f"{path} is UTF-16: save it as UTF-8")
            pending = len(decoder.getstate()[0])
            try:
                new = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                offset = read - pending + error.start
                raise ValueError(f"{path} is not UTF-8: offset {offset}; save it as UTF-8") from error
            read += len(data)
            known, text = len(text), text + new
            if not data:
                break
            if cut := last_cut(text, known):
                yield text[:cut]
                text = text[cut:]
    if text:
        yield text


def last_cut(text: str, known: int) -> int:
    """The last place at or after `known` at which the text can be cut (see `separate`); 0 when there is none."""
    places = range(len(text) - 1, max(known, 1) - 1, -1)
    return next((i for i in places if separate(text[i - 1], text[i])), 0)


def separate(before: str, after: str) -> bool:
    """Whether the pattern ends a word between these characters, whatever stands around them.

    It joins letters with letters, digits with digits, other signs with other signs, white space with white space and
    a space with what follows; and an apostrophe with letters.
    """
    if after in " \t\r\n":
        return not before.isspace()
    kinds = kind(before), kind(after)
    return "" not in kinds and kinds[0] != kinds[1] and not (before == "'" and kinds[1] == "L")


@lru_cache(maxsize=2**16)
def kind(character: str) -> str:
    """L for letters, N for numbers, else "other"; empty for white space, and where versions of Unicode disagree."""
    kinds = {
        {"L": "L", "N": "N"}.get(database.category(character)[0], "other")
        for database in (unicodedata, unicodedata.ucd_3_2_0)
    }
    unassigned = unicodedata.ucd_3_2_0.category(character) == "Cn"
    return "" if character.isspace() or unassigned or len(kinds) > 1 else kinds.pop()


# ---------------------------------------------------------------------------------------------
# Ids
# ---------------------------------------------------------------------------------------------

LONG_RUN = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{100000,}")


def encode(text: str, tokenizer: "tiktoken.Encoding | OwnVocabulary") -> np.ndarray:
    """Ids of a piece. GPT-2's pattern fails on very long runs of white space: the word they are is encoded as one."""
    if not hasattr(tokenizer, "encode_to_numpy"):
        return np.array(tokenizer.encode_ordinary(text), dtype=np.uint32)
    parts, done = [], 0
    for run in LONG_RUN.finditer(text) if len(text) > CHUNK else ():
        end = run.end() - (run.end() < len(text))  # the last one belongs to what follows
        parts.append(tokenizer.encode_to_numpy(text[done : run.start()], disallowed_special=()))
        parts.append(np.array(tokenizer._encode_single_piece(text[run.start() : end]), dtype=np.uint32))
        done = end
    parts.append(tokenizer.encode_to_numpy(text[done:], disallowed_special=()))
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def encoded(
    files: list[Path], tokenizer: "tiktoken.Encoding | OwnVocabulary", threads: int, hashes: list
) -> Iterator[np.ndarray]:
    """Ids of the files in pieces, an end-of-document between two files; `hashes` is given a SHA-256 for each.

    Encoding releases Python's lock, so threads share the work; as many pieces as keep them busy are under way.
    """
    total = sum(path.stat().st_size for path in files)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="Encoding", dynamic_ncols=True, disable=None)
    with ThreadPoolExecutor(threads) as pool, bar:
        under_way = deque()
        try:
            for path in files:
                hashes.append(hashlib.sha256())
                if path != files[0]:
                    under_way.append(pool.submit(np.array, [tokenizer.eot_token], np.uint32))
                for piece in pieces(path, lambda data: (hashes[-1].update(data), bar.update(len(data)))):
                    under_way.append(pool.submit(encode, piece, tokenizer))
                    if len(under_way) > 2 * threads:
                        yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------


def load(
    inputs: list[Path],
    tokenizer: "tiktoken.Encoding | OwnVocabulary",
    identity: str,
    folder: Path,
    threads: int,
    flag: str = "--input_file",
) -> TokenFile:
    """The ids of these texts under the tokenizer of that `identity`, from the file in `folder` if it is whole and
    younger than they are, else encoded anew.

    Raises FileNotFoundError, ValueError (not UTF-8, empty) or OSError; then no file is left behind.
    """
    files = find_files(inputs, flag)
    if not any(path.stat().st_size for path in files):
        raise ValueError(f"{flag} {files[0]} is empty: a run needs at least --seq_len + 1 tokens of text")
    names = "\n".join([identity, *(str(path.resolve()) for path in files)])
    stem = re.sub(r"\W+", "-", files[0].stem)[:40]
    path = folder / f"{stem}-{hashlib.sha256(os.fsencode(names)).hexdigest()[:12]}.tokens"
    lock = FileLock(path.with_suffix(".lock"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        log.info("Waiting for another program that writes %s ...", path)
        lock.acquire()
    except OSError as error:
        with suppress(OSError, ValueError):
            return read(path, files, identity)  # a folder that cannot be written may hold what is needed
        raise OSError(f"--cache_dir {folder}: {error.strerror}; choose a folder that can be written") from error
    try:
        if path.exists():
            try:
                return read(path, files, identity)
            except ValueError as reason:
                log.warning("%s: %s; encoding the text anew", path, reason)
        build(path, files, tokenizer, identity, threads)
        return read(path, files, identity)
    finally:
        lock.release()


def sources(files: list[Path]) -> list[list]:
    """What tells whether a file has changed: name, size, time of the last change."""
    return [[path.resolve().as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def build(
    path: Path, files: list[Path], tokenizer: "tiktoken.Encoding | OwnVocabulary", identity: str, threads: int
) -> None:
    """Encode the files into `path`, which appears when it is whole. Raises ValueError or OSError."""
    name = "uint16" if tokenizer.n_vocab <= 2**16 else "uint32"
    dtype, facts = DTYPES[name], {"tokenizer": identity, "dtype": name, "sources": sources(files)}
    n_bytes, free = sum(size for _, size, _ in facts["sources"]), shutil.disk_usage(path.parent).free
    needed = n_bytes * dtype.itemsize // 2  # about three bytes of text a token
    if needed > free:
        raise OSError(
            f"--cache_dir {path.parent}: the token ids need up to {needed / 1e6:,.1f} MB, and that disk has "
            f"{free / 1e6:,.1f} MB: choose another --cache_dir"
        )
    unknown = {"count": 10**15, "crc32": 2**32, "sha256": "0" * 64, "n_bytes": n_bytes}
    space = len(MAGIC.format(0, 0)) + len(json.dumps(facts | unknown)) + 64
    temporary, hashes, count, checksum = path.with_name(path.name + ".tmp"), [], 0, 0
    try:
        with open(temporary, "wb") as file, closing(encoded(files, tokenizer, threads, hashes)) as parts:
            file.seek(space)
            for part in parts:
                data = part.astype(dtype).tobytes()
                count, checksum = count + len(part), zlib.crc32(data, checksum)
                file.write(data)
            digests = [one.hexdigest() for one in hashes]
            whole = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
            facts |= {"count": count, "crc32": checksum, "sha256": whole, "n_bytes": n_bytes}
            header = (json.dumps(facts).ljust(space - len(MAGIC.format(0, 0)) - 1) + "\n").encode()
            file.seek(0)
            file.write(MAGIC.format(space, zlib.crc32(header)).encode() + header)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, files: list[Path], identity: str) -> TokenFile:
    """Map the file. Raises ValueError when it is damaged, of another version, or older than the texts."""
    with open(path, "rb") as file:
        first = FIRST_LINE.fullmatch(file.readline(len(MAGIC.format(0, 0)) + 1))
        if not first:
            raise ValueError("no token file of this version")
        space = int(first[1])
        header = file.read(space - len(first[0]))
    if zlib.crc32(header) != int(first[2]):
        raise ValueError("its header is damaged")
    facts = json.loads(header)
    dtype, count, known = DTYPES[facts["dtype"]], facts["count"], (facts["sources"], facts["tokenizer"])
    if known != (sources(files), identity):
        raise ValueError("the text has changed since")
    if path.stat().st_size != space + count * dtype.itemsize:
        raise ValueError(f"it should hold {count:,} ids and does not")
    checksum = 0
    with open(path, "rb") as file:
        file.seek(space)
        while data := file.read(2**22):
            checksum = zlib.crc32(data, checksum)
    if checksum != facts["crc32"]:
        raise ValueError("its checksum is wrong")
    return TokenFile(np.memmap(path, dtype, "r", space, (count,)), facts["sha256"], facts["n_bytes"])


# ---------------------------------------------------------------------------------------------
# Vocabularies of one's own
# ---------------------------------------------------------------------------------------------


class OwnVocabulary:
    """A byte-level BPE in the form of Hugging Face's tokenizer.json.

    Raises ValueError when it is none, or not byte-level: then text could be cut between ids.
    """

    def __init__(self, content: str, name: str):
        from tokenizers import Tokenizer as HuggingFace
        from tokenizers import pre_tokenizers

        try:
            self.inner, parts = HuggingFace.from_str(content), json.loads(content)
            ids = self.inner.get_vocab()
        except Exception as error:  # the library's own exceptions have no common name
            raise ValueError(f"{name} is no tokenizer.json ({str(error)[:100]})") from error
        pattern, decoder, model = ((parts.get(key) or {}) for key in ("pre_tokenizer", "decoder", "model"))
        requirements = {
            "model: a BPE without dropout": model.get("type") == "BPE" and not model.get("dropout"),
            "normalizer: none": parts.get("normalizer") is None,
            "pre_tokenizer: ByteLevel with GPT-2's pattern and without a prefix space": (
                pattern.get("type") == "ByteLevel" and pattern.get("use_regex", True)
            )
            and not pattern.get("add_prefix_space"),
            "decoder: ByteLevel": decoder.get("type") == "ByteLevel",
            "vocabulary: every byte": set(pre_tokenizers.ByteLevel.alphabet()) <= ids.keys(),
            "vocabulary: ids without gaps": max(ids.values(), default=0) == len(ids) - 1,
            "added_tokens: special ones only": all(token.get("special") for token in parts.get("added_tokens") or []),
        }
        if missing := [text for text, met in requirements.items() if not met]:
            raise ValueError(f"{name} is no byte-level BPE like GPT-2's; required is {'; '.join(missing)}")
        self.inner.encode_special_tokens = True  # special tokens in a text are plain text
        self.inner.post_processor = None  # text is encoded without what this would add
        self.inner.no_padding()
        self.inner.no_truncation()
        self.n_vocab, end = self.inner.get_vocab_size(), self.inner.token_to_id(DOCUMENT_END)
        if end is None:
            raise ValueError(f"{name} has no token {DOCUMENT_END}, which stands between documents")
        self.eot_token: int = end
        self.content = self.inner.to_str()  # in one form, however the file was laid out

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """Their text."""
        return self.inner.decode(tokens, skip_special_tokens=False)


def train_vocabulary(inputs: list[Path], n_vocab: int) -> str:
    """A byte-level BPE of so many tokens, learned from these texts, as the content of a tokenizer.json.

    Raises FileNotFoundError or ValueError, also when the texts yield fewer.
    """
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = HuggingFace(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab, special_tokens=[DOCUMENT_END], initial_alphabet=alphabet, show_progress=False
    )
    files = find_files(inputs)
    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Learning", dynamic_ncols=True, disable=None) as bar:
        texts = (piece for path in files for piece in pieces(path, lambda data: bar.update(len(data))))
        tokenizer.train_from_iterator(texts, trainer)
    if (found := tokenizer.get_vocab_size()) != n_vocab:
        raise ValueError(f"--tokenizer bpe:{n_vocab}: the text yields {found:,} tokens only; use bpe:{found} or less")
    return tokenizer.to_str()
