"""The token ids of a run, in memory or in a file on disk, and the floor of the loss on them.

A text that is not one small file is read, cut and encoded in a stream, on all cores, into a file of
token ids, which is then memory-mapped: memory does not grow with the text. The ids are those of the
whole text encoded at once, as it is cut only where the vocabularies' pattern never joins two
characters.
"""

import hashlib
import importlib
import json
import logging
import math
import os
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from tqdm import tqdm

from parts.flags import DEMO_CORPUS, Config, text_names
from parts.run.directory import free_bytes, open_locked, read_json, replacing, write_whole
from parts.run.screen import waiting
from parts.text.files import (
    Hashed,
    demo_text,
    find_files,
    in_words,
    pieces_of,
    read_pieces,
    same_texts,
)
from parts.text.vocabulary import Tokenizer, encode, fingerprint

log = logging.getLogger("train")

SMALL_TEXT = 2**24  # bytes of a file that is read and tokenised in memory, within a second or two
EXACT_FLOOR = 2**22  # tokens of a corpus whose floor is computed from all of it
COMPRESSORS = ("lzma", "bz2")  # modules that a Python may have been built without
# Tokens of the text that a compressor sees, and of the held-out text that it is measured on.
SEEN, HELD_OUT = 2**20, 2**18


@dataclass(frozen=True)
class Corpus:
    """A tokenised text, with the part of it, or the other text, that is held out."""

    tokens: np.ndarray  # (N,) uint16 or uint32, read-only, perhaps on disk
    sha256: str  # of the text's bytes
    text_tokens: int  # of the whole text, of which max_tokens may have left only the first
    bytes_per_token: float = math.nan
    vocabulary: str = ""  # content of the tokenizer.json, unless it is GPT-2's
    val_tokens: np.ndarray | None = None  # (M,), held out
    val_bytes_per_token: float = math.nan
    val_sha256: str = ""  # of --val_file
    val_remark: str = ""  # see `Documents`
    n_files: int = 1  # of the text
    remark: str = ""
    # A compressor, and the bits per byte it makes of the held-out text.
    yardstick: tuple[str, float] | None = None

    @property
    def floor_is_an_estimate(self) -> bool:
        """Whether `loss_floor` looks at a part of the tokens only."""
        return len(self.tokens) > EXACT_FLOOR


@dataclass(frozen=True)
class Documents:
    """The ids of one or several texts."""

    tokens: np.ndarray  # (N,) uint16 or uint32, an end-of-document between two texts
    n_bytes: int
    each: Hashed
    remark: str = ""  # what folders and globs gave, and left out

    @property
    def sha256(self) -> str:
        """The hash of the text; of several texts, of the lines of their hashes."""
        hashes = [sha256 for sha256, _ in self.each]
        lines = "\n".join(hashes).encode()
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(lines).hexdigest()


def load_corpus(config: Config, tokenizer: Tokenizer) -> Corpus:
    """Read and tokenise the text. Raises OSError or ValueError, also for one that cannot serve."""
    text = read_documents("--input_file", config, tokenizer)
    tokens = text.tokens[: config.max_tokens or None]
    known = ""
    validation: dict = {}
    if config.val_file:
        held_out = read_documents("--val_file", config, tokenizer)
        known = same_texts(text.each, held_out.each)
        validation = dict(
            val_tokens=held_out.tokens,
            val_bytes_per_token=held_out.n_bytes / max(1, len(held_out.tokens)),
            val_sha256=held_out.sha256,
            val_remark=held_out.remark,
        )
    elif config.val_fraction:
        n_part = len(tokens)
        n_train = n_part - max(1, round(n_part * config.val_fraction))
        tokens, val_tokens = tokens[:n_train], tokens[n_train:]
        size = bytes_per_token(val_tokens, tokenizer)
        validation = dict(val_tokens=val_tokens, val_bytes_per_token=size)
        if same_texts(text.each, text.each):
            known = same_texts(*split_documents(text, n_train, n_part, tokenizer.eot_token))
    if known:
        remedy = "leave one of the two out, or hold out other texts with --val_file"
        raise ValueError(f"the same text is trained on and held out: {known}; {remedy}")
    check_length(text_names(config.input_file), tokens, config)
    if validation:
        check_length("the validation split", validation["val_tokens"], config)
        validation["yardstick"] = compressed(tokens, validation["val_tokens"], tokenizer)
    tokens.flags.writeable = False
    size = text.n_bytes / len(text.tokens)
    if len(tokens) < len(text.tokens):
        size = bytes_per_token(tokens, tokenizer)
    vocabulary = getattr(tokenizer, "content", "")
    files: dict = dict(n_files=len(text.each), remark=text.remark)
    return Corpus(tokens, text.sha256, len(text.tokens), size, vocabulary, **files, **validation)


def check_length(name: str, tokens: np.ndarray, config: Config) -> None:
    """Raises ValueError when there is not a single slice."""
    needed = config.seq_len + 1
    if len(tokens) < needed:
        problem = f"has {len(tokens):,} tokens, but a slice needs --seq_len + 1 = {needed:,}"
        larger = "a larger part of it (--max_tokens, --val_fraction)"
        raise ValueError(f"{name} {problem}: use a longer text, {larger}, or a smaller --seq_len")


def split_documents(text: Documents, n_train: int, n_part: int, end: int) -> tuple[list, list]:
    """The documents among the first `n_train` tokens, and those behind them, up to token `n_part`.
    A document that is cut in two is in both; `end` is the token between two documents."""

    def begun(place: int) -> int:
        """How many documents begin before this token."""
        return len(text.each) - int(np.count_nonzero(text.tokens[place - 1 :] == end))

    return text.each[: begun(n_train)], text.each[begun(n_train + 2) - 1 : begun(n_part)]


def compressed(
    tokens: np.ndarray, val_tokens: np.ndarray, tokenizer: Tokenizer
) -> tuple[str, float] | None:
    """The best compressor, and by how many bits for each byte held-out text lengthens the other."""
    seen, new = text_of(tokens[-SEEN:], tokenizer), text_of(val_tokens[:HELD_OUT], tokenizer)
    added = {}
    for name in COMPRESSORS:
        with suppress(ImportError):
            pack = importlib.import_module(name).compress
            added[name] = len(pack(seen + new)) - len(pack(seen))
    if not added:
        return None
    best = min(added, key=lambda name: added[name])
    return best, 8 * added[best] / max(1, len(new))


def text_of(tokens: np.ndarray, tokenizer: Tokenizer) -> bytes:
    """UTF-8 of these tokens, without the marks between documents."""
    return tokenizer.decode(tokens[tokens != tokenizer.eot_token].tolist()).encode()


def bytes_per_token(tokens: np.ndarray, tokenizer: Tokenizer) -> float:
    """Bytes of text for each of the first million tokens; marks between documents have none."""
    first = tokens[: 10**6]
    return len(text_of(first, tokenizer)) / max(1, len(first))


def read_documents(flag: str, config: Config, tokenizer: Tokenizer) -> Documents:
    """The ids of a flag's texts, in memory for one small file. Raises OSError or ValueError."""
    inputs = config.input_file if flag == "--input_file" else config.val_file
    if inputs == (DEMO_CORPUS,):
        return in_memory(BytesIO(demo_text().encode()), DEMO_CORPUS, tokenizer)
    if DEMO_CORPUS in inputs:
        raise ValueError(f"{flag} {DEMO_CORPUS} goes without other texts")
    left_out: dict[str, set[Path]] = {}
    files = find_files(inputs, flag, left_out)
    path = files[0]
    one_file = inputs == (path,)
    if one_file and config.tokenizer == "gpt2" and path.stat().st_size <= SMALL_TEXT:
        return in_memory(BytesIO(path.read_bytes()), path, tokenizer)
    found = on_disk(files, tokenizer, config.cache_dir, config.threads or 1)
    if one_file:
        return found
    remark = [f"{len(files):,} {'file' if len(files) == 1 else 'files'}", *in_words(left_out)]
    if same := same_texts(found.each, found.each):
        remark.append(f"the same text twice: {same}")
    return replace(found, remark="; ".join(remark))


def in_memory(data: BytesIO, path: Path, tokenizer: Tokenizer) -> Documents:
    """A small text's ids under GPT-2's vocabulary. Raises ValueError."""
    pieces = list(read_pieces(data, str(path)))
    n_bytes = sum(len(piece.encode()) for piece in pieces)
    if n_bytes == 0:
        raise ValueError(f"{path} is empty: name another text")
    ids = np.concatenate([encode(piece, tokenizer) for piece in pieces])
    sha256 = hashlib.sha256(data.getvalue()).hexdigest()
    return Documents(ids.astype(np.uint16), n_bytes, [(sha256, path)])


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
    """The shortest slice whose floor is at or below the target; None if longer than `longest`. The
    floor falls with the length, but at the edges of a tiny corpus, so there all are looked at."""
    lengths = range(1, min(longest, len(tokens) - 1) + 1)

    def is_enough(seq_len: int) -> bool:
        return loss_floor(tokens, seq_len) <= target_loss

    if len(tokens) < 5000:
        return next(filter(is_enough, lengths), None)
    if not is_enough(lengths[-1]):
        return None
    return lengths[bisect_left(lengths, True, key=is_enough)]


def on_disk(files: list[Path], tokenizer: Tokenizer, folder: Path, threads: int) -> Documents:
    """The ids of texts, from a file that is encoded anew if it does not fit. Raises ValueError or
    OSError; then no file is left behind."""
    with waiting("Checking the text"):
        each = [(sha256_of(file), file) for file in files]
    sources: list = [[p.resolve().as_posix(), p.stat().st_size, sha256] for sha256, p in each]
    vocabulary = fingerprint(tokenizer)
    made_of = {"tokenizer": vocabulary, "sources": sources}
    known_by = "\n".join([vocabulary, *(name for name, _, _ in sources)])
    stem = re.sub(r"\W+", "-", files[0].stem)[:40]
    path = folder / f"{stem}-{hashlib.sha256(os.fsencode(known_by)).hexdigest()[:12]}.tokens"
    dtype = "<u2" if tokenizer.n_vocab <= 2**16 else "<u4"

    def documents() -> Documents:
        tokens = map_ids(path, made_of, dtype)
        return Documents(tokens, sum(size for _, size, _ in sources), each)

    with suppress(OSError, ValueError):
        return documents()  # needs no lock, and no right to write
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open_locked(path.with_suffix(".lock"), wait=True)
    except OSError as error:
        problem = f"{error.strerror}; choose a folder that can be written"
        raise OSError(f"--cache_dir {folder}: {problem}") from error
    with lock:
        try:
            return documents()  # another program may have written it meanwhile
        except FileNotFoundError:
            pass
        except ValueError as reason:
            log.warning("%s: %s; encoding the text anew", path, reason)
        try:
            write_ids(path, each, made_of, dtype, tokenizer, threads)
        except PermissionError as error:
            problem = "under Windows a run that reads these token ids keeps them"
            remedy = "wait for it, or choose another --cache_dir"
            raise OSError(f"--cache_dir {folder}: {error} ({problem}): {remedy}") from error
        return documents()


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def map_ids(path: Path, made_of: dict, dtype: str) -> np.ndarray:
    """A file of ids, mapped where possible. Raises OSError, or ValueError when it does not fit."""
    ids = sha256_of(path)
    facts = read_json(path.with_suffix(".json"))
    if facts.get("ids") != ids:
        raise ValueError("it is damaged, or of another version")
    if facts != made_of | {"ids": ids}:
        raise ValueError("the text has changed since")
    try:
        return np.memmap(path, dtype, "r")
    except OSError:
        return np.fromfile(path, dtype)


def write_ids(
    path: Path, files: Hashed, made_of: dict, dtype: str, tokenizer: Tokenizer, threads: int
) -> None:
    """Encode the files into `path`; a JSON beside it has what the ids were made of, and their hash.
    Raises ValueError or OSError."""
    n_bytes = sum(size for _, size, _ in made_of["sources"])
    needed = n_bytes * np.dtype(dtype).itemsize // 2  # about three bytes of text a token
    free = free_bytes(path.parent)
    if needed > free:
        room = f"need up to {needed / 1e6:,.1f} MB, and that disk has {free / 1e6:,.1f} MB"
        remedy = "choose another --cache_dir"
        raise OSError(f"--cache_dir {path.parent}: the token ids {room}: {remedy}")
    ids = hashlib.sha256()
    with replacing(path) as file, waiting("Encoding", n_bytes, "B") as bar:
        for part in encoded(files, tokenizer, threads, bar):
            data = part.astype(dtype).tobytes()
            ids.update(data)
            file.write(data)
        if not file.tell():
            raise ValueError(f"{files[0][1]} is empty: name another text")
    facts = made_of | {"ids": ids.hexdigest()}
    write_whole(path.with_suffix(".json"), json.dumps(facts, indent=2).encode())


def encoded(files: Hashed, tokenizer: Tokenizer, threads: int, bar: tqdm) -> Iterator[np.ndarray]:
    """Ids of the files in pieces, encoded by threads, with an end-of-document between two files.
    Raises ValueError, also for a file that has not its hash."""
    under_way: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for number, (expected, path) in enumerate(files):
            if number:
                under_way.append(pool.submit(np.array, [tokenizer.eot_token], np.uint32))
            digest = hashlib.sha256()
            for piece in pieces_of(path, bar, digest.update):
                under_way.append(pool.submit(encode, piece, tokenizer))
                if len(under_way) > 4 * threads:
                    yield under_way.popleft().result()
            if digest.hexdigest() != expected:
                raise ValueError(f"{path} was changed meanwhile: start again")
        while under_way:
            yield under_way.popleft().result()
