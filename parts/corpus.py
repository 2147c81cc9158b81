"""The token ids of a run, in memory or in a file on disk, and the floor of the loss on them.

A text that is not one small file is read, cut and encoded in a stream, on all cores, into a file of token ids, which is
then memory-mapped: memory does not grow with the text. The ids are those of the whole text encoded at once, because it
is cut only where the vocabularies' pattern never joins two characters.
"""

import hashlib
import importlib
import json
import logging
import math
import os
import re
import shutil
import zlib
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from parts.config import DEMO_CORPUS, Config, names
from parts.files import replacing
from parts.text import Tokenizer, encode, find_files, identity, pieces, read_text

log = logging.getLogger("train")


SMALL_TEXT = 2**24  # bytes of a file that is read and tokenised in memory, within a second or two
EXACT_FLOOR = 2**22  # tokens of a corpus whose floor is computed from all of it
GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Corpus:
    """A tokenised text."""

    tokens: np.ndarray  # (N,) uint16 or uint32, read-only, perhaps on disk
    sha256: str  # of the text's bytes
    text_tokens: int  # of the whole text, of which max_tokens may have left only the first
    bytes_per_token: float = math.nan
    vocabulary: str = ""  # content of the tokenizer.json, unless it is GPT-2's
    val_tokens: np.ndarray | None = None  # (M,), held out
    val_bytes_per_token: float = math.nan
    val_sha256: str = ""  # of --val_file
    n_files: int | None = None  # of the text; None where it is one file, named as such
    yardstick: tuple[str, float] | None = None  # a compressor, and the bits per byte it makes of the held-out text

    @property
    def floor_is_an_estimate(self) -> bool:
        """Whether `loss_floor` looks at a part of the tokens only."""
        return len(self.tokens) > EXACT_FLOOR


def load_corpus(config: Config, tokenizer: Tokenizer) -> Corpus:
    """Read and tokenise the text; special-token text such as <|endoftext|> is plain text here.

    Raises OSError or ValueError (see `read_text`), also when the text is shorter than a slice.
    """
    whole, sha256, text_bytes, n_files = read_tokens(config.input_file, config, tokenizer, "--input_file")
    tokens = whole[: config.max_tokens] if config.max_tokens else whole
    val_tokens, val_bytes_per_token, val_sha256 = None, math.nan, ""
    if config.val_file:
        val_tokens, val_sha256, val_bytes, _ = read_tokens(config.val_file, config, tokenizer, "--val_file")
        val_bytes_per_token = val_bytes / max(1, len(val_tokens))
    elif config.val_fraction:
        n_train = len(tokens) - max(1, round(len(tokens) * config.val_fraction))
        tokens, val_tokens = tokens[:n_train], tokens[n_train:]
        val_bytes_per_token = bytes_per_token(val_tokens, tokenizer)
    n_bytes = bytes_per_token(tokens, tokenizer) * len(whole) if len(tokens) < len(whole) else text_bytes
    splits = {names(config.input_file): tokens, "the validation split": val_tokens}
    for name, part in splits.items():
        if part is not None and len(part) < config.seq_len + 1:
            raise ValueError(
                f"{name} has {len(part):,} tokens, but a slice needs --seq_len + 1 = {config.seq_len + 1:,}: use a "
                "longer text, a larger part of it (--max_tokens, --val_fraction), or a smaller --seq_len"
            )
    tokens.flags.writeable = False
    vocabulary = getattr(tokenizer, "content", "")
    validation = val_tokens, val_bytes_per_token, val_sha256
    best = None if val_tokens is None else compressed(tokens, val_tokens, tokenizer)
    return Corpus(tokens, sha256, len(whole), n_bytes / len(whole), vocabulary, *validation, n_files, best)


COMPRESSORS = ("lzma", "bz2")  # modules that a Python may have been built without
BEFORE, HELD_OUT = 2**20, 2**18  # tokens of the text that a compressor sees, and of the text it is measured on


def compressed(tokens: np.ndarray, val_tokens: np.ndarray, tokenizer: Tokenizer) -> tuple[str, float] | None:
    """The best of Python's compressors, and the bits per byte that the held-out text adds behind the other."""
    known, new = text_of(tokens[-BEFORE:], tokenizer), text_of(val_tokens[:HELD_OUT], tokenizer)
    added = {}
    for name in COMPRESSORS:
        with suppress(ImportError):
            pack = importlib.import_module(name).compress
            added[name] = len(pack(known + new)) - len(pack(known))
    if not added:
        return None
    best = min(added, key=lambda name: added[name])
    return best, 8 * added[best] / max(1, len(new))


def text_of(tokens: np.ndarray, tokenizer: Tokenizer) -> bytes:
    """UTF-8 of these tokens, without the marks between documents."""
    return tokenizer.decode([token for token in tokens.tolist() if token != tokenizer.eot_token]).encode()


def bytes_per_token(tokens: np.ndarray, tokenizer: Tokenizer) -> float:
    """Bytes of text for each of the first million tokens; what stands between documents is no text."""
    start = tokens[: 10**6]
    return len(text_of(start, tokenizer)) / max(1, len(start))


def read_tokens(
    inputs: tuple[Path, ...], config: Config, tokenizer: Tokenizer, flag: str
) -> tuple[np.ndarray, str, int, int | None]:
    """Token ids of a text, its SHA-256, its bytes and its files: in memory for one small file, else by way of a file.

    The files are counted where folders, globs or several names stand for them, else None.
    """
    path = inputs[0]
    named = path == DEMO_CORPUS or path.is_file() or not GLOB.search(str(path))
    one_file = len(inputs) == 1 and named and not path.is_dir()
    if one_file and not (path.is_file() and path.stat().st_size > SMALL_TEXT):
        text, sha256 = read_text(path, flag)
        if config.tokenizer == "gpt2" and not re.search(r"\s{100000}", text):
            return np.array(tokenizer.encode_ordinary(text), dtype=np.uint16), sha256, len(text.encode()), None
    if DEMO_CORPUS in inputs:
        raise ValueError(f"{flag} {DEMO_CORPUS} goes without other texts")
    threads = config.threads or os.cpu_count() or 1
    found = load(inputs, tokenizer, identity(tokenizer), config.cache_dir, threads, flag)
    return found.tokens, found.sha256, found.n_bytes, None if one_file else found.n_files


def loss_floor(tokens: np.ndarray, seq_len: int) -> float:
    """Lowest mean loss any model can reach on random slices of this corpus, nats per token.

    Even a perfect memoriser has to guess where in the corpus a slice begins. By the chain rule the
    conditional entropies of tokens 1 … T given those before them sum to H(whole slice) - H(first
    token), over the sampler's own starts. Equal slices are found by doubling, as in suffix sorting
    (Karp, Miller & Rosenberg 1972). Of a corpus beyond `EXACT_FLOOR` the middle is looked at, as if
    slices came back in the whole as often as they do there: an estimate.
    """
    middle = max(0, len(tokens) - EXACT_FLOOR) // 2
    part = tokens[middle : middle + EXACT_FLOOR]
    n_starts = len(part) - seq_len
    grams = np.unique(part, return_inverse=True)[1].astype(np.int64)  # equal ids: equal grams
    first, width = grams[:n_starts], 1
    while width < seq_len + 1:
        shift = min(width, seq_len + 1 - width)
        pairs = grams[:-shift] * (grams.max() + 1) + grams[shift:]
        grams = np.unique(pairs, return_inverse=True)[1]
        width += shift
    more_starts = math.log((len(tokens) - seq_len) / n_starts)  # 0 where the part is the whole
    return (_entropy(grams) + more_starts - _entropy(first)) / seq_len


def _entropy(ids: np.ndarray) -> float:
    counts = np.bincount(ids)
    p = counts[counts > 0] / len(ids)
    return float(-(p * np.log(p)).sum())


def smallest_seq_len(tokens: np.ndarray, target_loss: float, longest: int) -> int | None:
    """The shortest slice whose floor is at or below the target; None when it is longer than `longest`.

    The floor falls with the length, but for the edges of a tiny corpus, which is searched throughout.
    """
    low, high = 1, min(longest, len(tokens) - 1)
    if len(tokens) < 5000:
        return next((T for T in range(low, high + 1) if loss_floor(tokens, T) <= target_loss), None)
    if loss_floor(tokens, high) > target_loss:
        return None
    while low < high:
        middle = (low + high) // 2
        if loss_floor(tokens, middle) <= target_loss:
            high = middle
        else:
            low = middle + 1
    return low


MAGIC = "GPT token ids, version 1, after a header of {:08d} bytes with the checksum {:010d}\n"
FIRST_LINE = re.compile(re.sub(r"{:0(\d+)d}", r"(\\d{\1})", MAGIC).encode())
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True)
class TokenFile:
    """The ids of one or several texts, on disk."""

    tokens: np.memmap  # (N,) uint16 or uint32, read-only
    sha256: str  # of the text; of several texts, of the lines of their hashes
    n_bytes: int  # of the texts
    n_files: int


def load(
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    identity: str,
    folder: Path,
    threads: int,
    flag: str = "--input_file",
) -> TokenFile:
    """The ids of these texts under the tokenizer of that `identity`, from the file in `folder` if it is whole and
    younger than they are, else encoded anew.

    Raises FileNotFoundError, ValueError (not UTF-8 text, empty) or OSError; then no file is left behind.
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


def encoded(files: list[Path], tokenizer: Tokenizer, threads: int, hashes: list) -> Generator[np.ndarray, None, None]:
    """Ids of the files in pieces, an end-of-document between two files; `hashes` is given a SHA-256 for each.

    Encoding releases Python's lock, so threads share the work; as many pieces as keep them busy are under way.
    """
    total = sum(path.stat().st_size for path in files)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="Encoding", dynamic_ncols=True, disable=None)
    with ThreadPoolExecutor(threads) as pool, bar:
        under_way: deque[Future[np.ndarray]] = deque()
        try:
            for path in files:
                hashes.append(hashlib.sha256())
                if path != files[0]:
                    under_way.append(pool.submit(np.array, [tokenizer.eot_token], np.uint32))
                with open(path, "rb") as file:
                    for piece in pieces(file, str(path), lambda d: (hashes[-1].update(d), bar.update(len(d)))):
                        under_way.append(pool.submit(encode, piece, tokenizer))
                        if len(under_way) > 2 * threads:
                            yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def build(path: Path, files: list[Path], tokenizer: Tokenizer, identity: str, threads: int) -> None:
    """Encode the files into `path`, which appears when it is whole. Raises ValueError or OSError."""
    name = "uint16" if tokenizer.n_vocab <= 2**16 else "uint32"
    dtype = DTYPES[name]
    facts: dict = {"tokenizer": identity, "dtype": name, "sources": sources(files)}
    n_bytes, free = sum(size for _, size, _ in facts["sources"]), shutil.disk_usage(path.parent).free
    needed = n_bytes * dtype.itemsize // 2  # about three bytes of text a token
    if needed > free:
        raise OSError(
            f"--cache_dir {path.parent}: the token ids need up to {needed / 1e6:,.1f} MB, and that disk has "
            f"{free / 1e6:,.1f} MB: choose another --cache_dir"
        )
    unknown = {"count": 10**15, "crc32": 2**32, "sha256": "0" * 64, "n_bytes": n_bytes}
    space = len(MAGIC.format(0, 0)) + len(json.dumps(facts | unknown)) + 64
    hashes: list = []
    count = checksum = 0
    with replacing(path) as file, closing(encoded(files, tokenizer, threads, hashes)) as parts:
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
    return TokenFile(np.memmap(path, dtype, "r", space, (count,)), facts["sha256"], facts["n_bytes"], len(files))
