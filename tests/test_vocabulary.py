"""A vocabulary of one's own: learned from any text, ended by a signal, the same in every form of
its file."""

import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from parts.report.reader import read_run
from parts.text.vocabulary import (
    DOCUMENT_END,
    LONG_WORD,
    OwnVocabulary,
    TextYieldsFewer,
    train_vocabulary,
)

LINES = "".join(f"Line {i}: {i * i} is the square of {i}.\n" for i in range(500))


def plainly_learned(text: str, n_vocab: int) -> Tokenizer:
    """What the library makes of the whole text at once."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[DOCUMENT_END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def test_ordinary_text_gives_the_vocabulary_that_the_library_learns(tmp_path):
    text = LINES + "漢字仮名交り文、" * 300 + "\n" + "-" * LONG_WORD + " " * LONG_WORD
    (tmp_path / "text.txt").write_text(text, encoding="utf-8", newline="\n")
    assert train_vocabulary([tmp_path / "text.txt"], 400) == plainly_learned(text, 400).to_str()


def test_one_long_word_is_learned_from_in_pieces(tmp_path):
    """Whole, it takes time that grows with the square of its length; a token longer than a piece
    would tell."""
    for letter in "a-漢":
        (tmp_path / "text.txt").write_text(letter * 20_000, encoding="utf-8")
        with pytest.raises(TextYieldsFewer) as problem:
            train_vocabulary([tmp_path / "text.txt"], 400)
        vocabulary = OwnVocabulary(
            train_vocabulary([tmp_path / "text.txt"], problem.value.n_vocab), "own"
        )
        longest = max(len(vocabulary.decode_bytes([token])) for token in range(vocabulary.n_vocab))
        assert LONG_WORD / 4 < longest <= LONG_WORD


@pytest.mark.slow
@pytest.mark.xdist_group("kills")
@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_a_signal_ends_the_learning_of_a_vocabulary(tmp_path):
    """The program sends it to itself while the library is at work, for minutes if it were left
    alone."""
    letters = bytes(b"ACGT"[byte % 4] for byte in range(256))
    (tmp_path / "dna.txt").write_bytes(random.Random(0).randbytes(12_000_000).translate(letters))
    program = """
        import os, signal, sys, threading, time
        import train

        def send():
            while "learning" not in {thread.name for thread in threading.enumerate()}:
                time.sleep(0.01)
            time.sleep(1)
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))

        threading.Thread(target=send).start()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
        flags = ["--input_file=dna.txt", "--tokenizer=bpe:60000", "--val_fraction=0.1"]
        sys.exit(train.main([*flags, "--out_dir=run"]))
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command, said = [sys.executable, "-c", textwrap.dedent(program)], subprocess.PIPE
    processes = {
        code: subprocess.Popen([*command, name], cwd=tmp_path, env=environment, stderr=said)
        for code, name in ((130, "SIGINT"), (143, "SIGTERM"))
    }
    for code, process in processes.items():
        try:
            assert process.wait(40) == code
            assert process.stderr.read() == b""
        finally:
            process.kill()
            process.communicate()
    assert [path.name for path in tmp_path.iterdir()] == ["dna.txt"]


def with_pairs(content: str) -> str:
    """A tokenizer.json with merges as pairs."""
    parts = json.loads(content)
    parts["model"]["merges"] = [
        pair if isinstance(pair, list) else pair.split() for pair in parts["model"]["merges"]
    ]
    return json.dumps(parts)


def with_strings(content: str) -> str:
    """The same as other programs and versions lay it out, with a key that nobody knows."""
    parts = json.loads(with_pairs(content))
    parts["model"]["merges"] = [" ".join(pair) for pair in parts["model"]["merges"]]
    parts["decoder"]["trim_offsets"] = not parts["decoder"].get("trim_offsets")
    return json.dumps(parts | {"comment": "of somebody"}, indent=4)


@pytest.mark.parametrize("form", [with_pairs, with_strings])
def test_a_vocabulary_is_the_same_in_another_form(launch, tmp_path, form):
    """Of the file that is named, of the one in the run directory, and inside an older
    checkpoint."""
    Path("text.txt").write_text(LINES, encoding="utf-8")
    Path("own.json").write_text(train_vocabulary([Path("text.txt")], 300), encoding="utf-8")
    flags = ["--input_file=text.txt", "--tokenizer=own.json"]
    assert launch("run", *flags, "--steps=4") == 0
    before, run_file = read_run(Path("run")).vocabulary, Path("run/tokenizer.json")
    run_file.write_text(form(run_file.read_text(encoding="utf-8")), encoding="utf-8")
    assert read_run(Path("run")).vocabulary == before
    own_file = Path("own.json")
    own_file.write_text(form(own_file.read_text(encoding="utf-8")), encoding="utf-8-sig")
    assert launch("next", *flags, "--steps=1", "--init_from=run") == 0
    assert launch("run", *flags, "--steps=5") == 0
    saved = torch.load("run/checkpoints/last.pt")
    saved["tokenizer"]["content"] = form(saved["tokenizer"]["content"])
    torch.save(saved, "run/checkpoints/last.pt")
    assert launch("run", *flags, "--steps=6") == 0
    other = json.loads(Path("run/tokenizer.json").read_text(encoding="utf-8"))
    other["model"]["merges"] = other["model"]["merges"][::-1]
    Path("own.json").write_text(json.dumps(other), encoding="utf-8")
    assert launch("run", *flags, "--steps=7") == 2, "other merges, other ids"
