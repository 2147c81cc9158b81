"""The token ids of a run, in memory or in a file on disk, and the floor of the loss on them.

A text that is not one small file is read, cut and encoded in a stream, on all cores, into a file of token ids, which is
then memory-mapped: memory does not grow with the text. The ids are those of the whole text encoded at once, because it
is cut only where the vocabularies' pattern never joins two characters.
"""

import glob
import hashlib
import importlib
import json
import logging
import math
import os
import re
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from parts.flags import DEMO_CORPUS, Config, text_names
from parts.run.directory import free_bytes, open_locked, read_json, replacing
from parts.run.terminal import waiting
from parts.text.vocabulary import (
    Tokenizer,
    encode,
    equal,
    find_files,
    identity,
    in_words,
    pieces,
    read_text,
)

log = logging.getLogger("train")


SMALL_TEXT = 2**24  # bytes of a file that is read and tokenised in memory, within a second or two
EXACT_FLOOR = 2**22  # tokens of a corpus whose floor is computed from all of it


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
    val_remark: str = ""  # see `Documents`
    n_files: int = 1  # of the text
    remark: str = ""
    yardstick: tuple[str, float] | None = (
        None  # a compressor, and the bits per byte it makes of the held-out text
    )

    @property
    def floor_is_an_estimate(self) -> bool:
        """Whether `loss_floor` looks at a part of the tokens only."""
        return len(self.tokens) > EXACT_FLOOR


@dataclass(frozen=True)
class Documents:
    """The ids of one or several texts."""

    tokens: np.ndarray  # (N,) uint16 or uint32, an end-of-document between two texts
    sha256: str  # of the text; of several texts, of the lines of their hashes
    n_bytes: int
    each: list[tuple[str, Path]]  # SHA-256 of the bytes, and the file
    remark: str = ""  # what folders and globs gave, and left out


def load_corpus(config: Config, tokenizer: Tokenizer) -> Corpus:
    """Read and tokenise the text; special-token text such as <|endoftext|> is plain text here.

    Raises OSError or ValueError (see `read_text`), also when the text is shorter than a slice, or
    when a document is both trained on and held out.
    """
    text = read_documents("--input_file", config, tokenizer)
    whole, n_bytes, known = text.tokens, float(text.n_bytes), ""
    part = whole[: config.max_tokens] if config.max_tokens else whole
    tokens, val_tokens, validation = part, None, (math.nan, "", "")
    if config.val_file:
        held_out = read_documents("--val_file", config, tokenizer)
        val_tokens, known = held_out.tokens, equal(text.each, held_out.each)
        size = held_out.n_bytes / max(1, len(val_tokens))
        validation = size, held_out.sha256, held_out.remark
    elif config.val_fraction:
        n_train = len(part) - max(1, round(len(part) * config.val_fraction))
        tokens, val_tokens = part[:n_train], part[n_train:]
        validation = bytes_per_token(val_tokens, tokenizer), "", ""
        if equal(text.each, text.each):
            known = equal(*split(text, n_train, len(part), tokenizer.eot_token))
    if known:
        raise ValueError(
            f"the same text is trained on and held out: {known}; leave one of the two out, or hold "
            "out other texts with --val_file"
        )
    if len(tokens) < len(whole):
        n_bytes = bytes_per_token(tokens, tokenizer) * len(whole)
    splits = {text_names(config.input_file): tokens, "the validation split": val_tokens}
    for name, kept in splits.items():
        if kept is not None and len(kept) < config.seq_len + 1:
            raise ValueError(
                f"{name} has {len(kept):,} tokens, but a slice needs --seq_len + 1 = "
                f"{config.seq_len + 1:,}: use a longer text, a larger part of it (--max_tokens, "
                "--val_fraction), or a smaller --seq_len"
            )
    tokens.flags.writeable = False
    own = getattr(tokenizer, "content", "")
    facts = text.sha256, len(whole), n_bytes / len(whole), own
    best = None if val_tokens is None else compressed(tokens, val_tokens, tokenizer)
    return Corpus(tokens, *facts, val_tokens, *validation, len(text.each), text.remark, best)


def split(text: Documents, n_train: int, n_part: int, end: int) -> tuple[list, list]:
    """Of `text.each` what is among the first `n_train` tokens, and what is behind them and up to
    token `n_part`; a document that is cut in two is in both."""

    def begun(place: int) -> int:
        """How many documents begin before this token."""
        return len(text.each) - int(np.count_nonzero(text.tokens[place - 1 :] == end))

    return text.each[: begun(n_train)], text.each[begun(n_train + 2) - 1 : begun(n_part)]


COMPRESSORS = ("lzma", "bz2")  # modules that a Python may have been built without
BEFORE, HELD_OUT = (
    2**20,
    2**18,
)  # tokens of the text that a compressor sees, and of the text it is measured on


def compressed(
    tokens: np.ndarray, val_tokens: np.ndarray, tokenizer: Tokenizer
) -> tuple[str, float] | None:
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
    return tokenizer.decode(
        [token for token in tokens.tolist() if token != tokenizer.eot_token]
    ).encode()


def bytes_per_token(tokens: np.ndarray, tokenizer: Tokenizer) -> float:
    """Bytes of text for each of the first million tokens; what stands between documents is no text."""
    start = tokens[: 10**6]
    return len(text_of(start, tokenizer)) / max(1, len(start))


def read_documents(flag: str, config: Config, tokenizer: Tokenizer) -> Documents:
    """The texts of a flag: in memory for one small file, else by way of a file of token ids.

    Raises OSError or ValueError.
    """
    inputs = config.input_file if flag == "--input_file" else config.val_file
    path = inputs[0]
    named = path.is_file() or not (path.is_dir() or glob.has_magic(str(path)))
    one_file = len(inputs) == 1 and named
    if one_file and not (path.is_file() and path.stat().st_size > SMALL_TEXT):
        text, sha256 = read_text(path, flag)
        if config.tokenizer == "gpt2" and not re.search(r"\s{100000}", text):
            ids = np.array(tokenizer.encode_ordinary(text), dtype=np.uint16)
            return Documents(ids, sha256, len(text.encode()), [(sha256, path)])
    if DEMO_CORPUS in inputs:
        raise ValueError(f"{flag} {DEMO_CORPUS} goes without other texts")
    threads = config.threads or 1
    left_out: dict[str, set[Path]] = {}
    files = find_files(inputs, flag, left_out)
    found = load(files, tokenizer, identity(tokenizer), config.cache_dir, threads, flag)
    remark = [f"{len(files):,} file{'s' * (len(files) > 1)}", *in_words(left_out)]
    if same := equal(found.each, found.each):
        remark.append(f"the same text twice: {same}")
    return found if one_file else replace(found, remark="; ".join(remark))


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


def load(
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    identity: str,
    folder: Path,
    threads: int,
    flag: str = "--input_file",
) -> Documents:
    """The ids of these texts under the tokenizer of that `identity`, from the file in `folder` if it is whole and
    of the bytes that they have, else encoded anew.

    Raises FileNotFoundError, ValueError (not UTF-8 text, empty) or OSError; then no file is left behind.
    """
    files = find_files(inputs, flag)
    known = sources(files)
    names = "\n".join([identity, *(name for name, _, _ in known)])
    stem = re.sub(r"\W+", "-", files[0].stem)[:40]
    path = folder / f"{stem}-{hashlib.sha256(os.fsencode(names)).hexdigest()[:12]}.tokens"
    with suppress(OSError, ValueError):
        return read(path, files, known, identity)  # needs no lock, and no right to write
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open_locked(path.with_suffix(".lock"), wait=True)
    except OSError as error:
        raise OSError(
            f"--cache_dir {folder}: {error.strerror}; choose a folder that can be written"
        ) from error
    with lock:
        try:
            return read(
                path, files, known, identity
            )  # another program may have written it meanwhile
        except FileNotFoundError:
            pass
        except ValueError as reason:
            log.warning("%s: %s; encoding the text anew", path, reason)
        build(path, files, known, tokenizer, identity, threads)
        return read(path, files, known, identity)


def sources(files: list[Path]) -> list[list]:
    """What tells whether a text has changed: name, size and SHA-256 of each file, read for this."""
    with waiting("Checking the text"):
        return [[path.resolve().as_posix(), path.stat().st_size, sha256_of(path)] for path in files]


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encoded(
    files: list[Path], tokenizer: Tokenizer, threads: int, hashes: list
) -> Generator[np.ndarray, None, None]:
    """Ids of the files in pieces, an end-of-document between two files; `hashes` is given a SHA-256 for each.

    Encoding releases Python's lock, so threads share the work; as many pieces as keep them busy are under way.
    """
    total = sum(path.stat().st_size for path in files)
    bar = tqdm(
        total=total, unit="B", unit_scale=True, desc="Encoding", dynamic_ncols=True, disable=None
    )
    with ThreadPoolExecutor(threads) as pool, bar:
        under_way: deque[Future[np.ndarray]] = deque()
        try:
            for path in files:
                hashes.append(hashlib.sha256())
                if path != files[0]:
                    under_way.append(pool.submit(np.array, [tokenizer.eot_token], np.uint32))
                with open(path, "rb") as file:
                    for piece in pieces(
                        file, str(path), lambda d: (hashes[-1].update(d), bar.update(len(d)))
                    ):
                        under_way.append(pool.submit(encode, piece, tokenizer))
                        if len(under_way) > 2 * threads:
                            yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def build(
    path: Path,
    files: list[Path],
    known: list[list],
    tokenizer: Tokenizer,
    identity: str,
    threads: int,
) -> None:
    """Encode the files into `path`, as nothing but ids, and write a JSON with what they are beside
    it. Each appears when it is whole. Raises ValueError or OSError."""
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")
    n_bytes, free = sum(size for _, size, _ in known), free_bytes(path.parent)
    needed = n_bytes * dtype.itemsize // 2  # about three bytes of text a token
    if needed > free:
        raise OSError(
            f"--cache_dir {path.parent}: the token ids need up to {needed / 1e6:,.1f} MB, and that disk has "
            f"{free / 1e6:,.1f} MB: choose another --cache_dir"
        )
    hashes: list = []
    ids = hashlib.sha256()
    with replacing(path) as file, closing(encoded(files, tokenizer, threads, hashes)) as parts:
        for part in parts:
            data = part.astype(dtype).tobytes()
            ids.update(data)
            file.write(data)
        if not file.tell():
            raise ValueError(f"{files[0]} is empty: a run needs --seq_len + 1 tokens at least")
    digests = [one.hexdigest() for one in hashes]
    whole = (
        digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    )
    # The hashes are those of the bytes that were encoded, even if a text changed in between.
    read_now = [
        [name, size, digest] for (name, size, _), digest in zip(known, digests, strict=True)
    ]
    facts = {
        "tokenizer": identity,
        "dtype": dtype.str,
        "sources": read_now,
        "sha256": whole,
        "n_bytes": n_bytes,
    }
    with replacing(path.with_suffix(".json")) as file:
        file.write(json.dumps(facts | {"digest": digest_of(facts, ids)}, indent=2).encode())


def digest_of(facts: dict, ids: "hashlib._Hash") -> str:
    """What tells whether ids and facts are those that were written."""
    ids.update(json.dumps(facts).encode())
    return ids.hexdigest()


def read(path: Path, files: list[Path], known: list[list], identity: str) -> Documents:
    """Map the file, or read it where none can be mapped; `known` are the texts' `sources`.

    Raises OSError when there is none, ValueError when it is damaged or of other bytes than the texts have.
    """
    with open(path, "rb") as file:
        facts = read_json(path.with_suffix(".json"))
        written = facts.pop("digest", None)
        if written != digest_of(facts, hashlib.file_digest(file, "sha256")):
            raise ValueError("it is damaged, or of another version")
    if (facts["sources"], facts["tokenizer"]) != (known, identity):
        raise ValueError("the text has changed since")
    try:
        tokens: np.ndarray = np.memmap(path, facts["dtype"], "r")
    except OSError:
        tokens = np.fromfile(path, facts["dtype"])
    each = [(one[2], file) for one, file in zip(facts["sources"], files, strict=True)]
    return Documents(tokens, facts["sha256"], facts["n_bytes"], each)
