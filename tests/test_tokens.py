"""The rooms of the text: any cut of the text leaves its ids as they are, and the file of ids is
whole or not there."""

import copy
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY_FLAGS, log_text
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from parts.progress import Progress
from parts.recipe import decide
from parts.report.provenance import launch_record
from parts.report.words import plan
from parts.run.checkpoint import load_checkpoint
from parts.text import corpus
from parts.text.corpus import Corpus, load_corpus, loss_floor
from parts.text.files import find_files, places_to_cut, read_pieces
from parts.text.vocabulary import (
    DOCUMENT_END,
    OwnVocabulary,
    encode,
    load_tokenizer,
    train_vocabulary,
    whole_characters,
)

links = pytest.mark.skipif(os.name == "nt", reason="a link takes a right there that few have")
NASTY = [
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\x1c",
    "\x85",
    "\x0b",
    "'",
    "'s",
    "'ll",
    "\u2019s",
    "a",
    "Zoë",
    "e\u0301",
    "1",
    "٣",
    "½",
    "!",
    "...",
    "—",
    "\U0001f469\u200d\U0001f467",
    "\U0001fae8",
    "漢字",
    "\uff0c",
    "ไทย",
    "ß",
    "ǅ",
    "\x01",
    "<|endoftext|>",
    "don't",
    "x'S",
]


def in_pieces(text: str, path: Path, size: int, tokenizer) -> np.ndarray:
    """Ids by way of pieces of about `size` bytes."""
    path.write_bytes(text.encode())
    parts = [encode(piece, tokenizer) for piece in read_pieces(io.BytesIO(text.encode()), "text")]
    return np.concatenate([np.zeros(0, dtype=np.uint32), *parts])


@settings(max_examples=400, deadline=None)
@given(words=st.lists(st.sampled_from(NASTY), max_size=60), size=st.integers(1, 40))
def test_pieces_have_the_ids_of_the_whole(words, size, tokenizer, tmp_path_factory):
    text = "".join(words)
    path = tmp_path_factory.getbasetemp() / "nasty.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parts.text.files.CHUNK", size)
        found = in_pieces(text, path, size, tokenizer)
    expected = tokenizer.encode_ordinary(text.removeprefix("\ufeff"))
    assert found.tolist() == expected


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=80),
    size=st.integers(1, 40),
)
def test_pieces_of_any_unicode(text, size, tokenizer, tmp_path_factory):
    test_pieces_have_the_ids_of_the_whole.hypothesis.inner_test(
        [text], size, tokenizer, tmp_path_factory
    )


def test_every_place_that_may_be_cut_may_be_cut(tokenizer):
    generator = random.Random(0)
    cuts = 0
    for _ in range(3000):
        text = "".join(generator.choices(NASTY, k=12))
        whole = tokenizer.encode_ordinary(text)
        _, place = places_to_cut(text)
        while place:
            assert (
                tokenizer.encode_ordinary(text[:place]) + tokenizer.encode_ordinary(text[place:])
                == whole
            ), text
            cuts += 1
            _, place = places_to_cut(text[:place])
    assert cuts > 3_000


@pytest.mark.parametrize(
    "text", ["漢字仮名交り文、" * 3000, "abc123" * 4000, "a-b" * 8000, "x" * 20_000 + " end"]
)
def test_text_with_hardly_any_white_space(text, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("parts.text.files.CHUNK", 1000)
    assert in_pieces(
        text, tmp_path / "dense.txt", 1000, tokenizer
    ).tolist() == tokenizer.encode_ordinary(text)


@pytest.mark.parametrize("white", [" ", "\n", "\t \n", "\u00a0"])
def test_endless_white_space(white, tokenizer, tmp_path):
    run = (white * 300_000)[:300_000]
    for text in (f"one{run}two", f"{run}two", f"one{run}"):
        assert in_pieces(
            text, tmp_path / "white.txt", 0, tokenizer
        ).tolist() == tokenizer.encode_ordinary(text)


def load(*inputs, tokenizer, folder, threads=2):
    files = find_files([Path(path) for path in inputs])
    return corpus.on_disk(files, tokenizer, Path(folder), threads)


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("b/two.txt", "Second text.\n"),
        ("b/a/one.txt", "First text, é.\r\n"),
        ("b/other.md", "Third"),
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(text.encode())
    return tmp_path


def test_documents_are_joined_in_a_stable_order(texts, tokenizer):
    found = load("b", "b/*.md", tokenizer=tokenizer, folder="cache")
    decoded = tokenizer.decode(found.tokens.tolist())
    assert decoded == "First text, é.\r\n<|endoftext|>Second text.\n<|endoftext|>Third"
    assert (found.tokens == 50_256).sum() == 2 and found.n_bytes == sum(
        p.stat().st_size for p in find_files([Path("b"), Path("b/other.md")])
    )
    assert find_files([Path("b/two.txt"), Path("b")]) == [Path("b/two.txt"), Path("b/a/one.txt")], (
        "none twice"
    )


def test_the_file_is_used_again_and_a_changed_text_is_noticed(
    texts, tokenizer, caplog, monkeypatch
):
    monkeypatch.setattr(train.log, "propagate", True)
    first = load("b", tokenizer=tokenizer, folder="cache")
    (path,) = Path("cache").glob("*.tokens")
    written = path.stat().st_mtime_ns
    again = load("b", tokenizer=tokenizer, folder="cache")
    assert (
        path.stat().st_mtime_ns == written
        and again.sha256 == first.sha256
        and (again.tokens == first.tokens).all()
    )
    del first, again  # or Windows would not replace their file
    assert not caplog.messages
    Path("b/two.txt").write_text("Changed.", encoding="utf-8")
    assert "Changed." in tokenizer.decode(
        load("b", tokenizer=tokenizer, folder="cache").tokens.tolist()
    )
    assert "has changed" in caplog.text and len(list(Path("cache").glob("*.tokens"))) == 1


@pytest.mark.slow
def test_a_damaged_file_is_noticed_whatever_the_damage(texts, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(train.log, "propagate", True)

    def facts() -> tuple:
        found = load("b", tokenizer=tokenizer, folder="cache")
        return found.tokens.tolist(), found.sha256, found.n_bytes

    expected = facts()  # and not the ids themselves: their file is about to be damaged
    generator = random.Random(1)
    for kind in ("tokens", "json"):
        (path,) = Path("cache").glob(f"*.{kind}")
        whole = path.read_bytes()
        places = [*generator.sample(range(len(whole)), min(60, len(whole))), len(whole) - 1]
        damages = [whole[:place] for place in places] + [whole + b"\0\0", b"", b"\n" * 100]
        damages += [
            whole[:p] + bytes([whole[p] ^ 1 << generator.randrange(8)]) + whole[p + 1 :]
            for p in places
        ]
        for damaged in damages:
            path.write_bytes(damaged)
            assert facts() == expected
    assert "encoding the text anew" in caplog.text


def test_one_text_has_the_hash_of_its_bytes(texts, tokenizer):
    found = load("b/two.txt", tokenizer=tokenizer, folder="cache")
    assert found.sha256 == hashlib.sha256(b"Second text.\n").hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good \xff bad", "two.txt is not UTF-8: byte 0xff at offset 5"),
        (b"x" * 300_000 + b"\xc3(", "two.txt is not UTF-8: byte 0xc3 at offset 300000"),
        (b"cut \xe2\x82", "two.txt is not UTF-8: byte 0xe2 at offset 4"),
        ("utf-16".encode("utf-16"), "two.txt is UTF-16"),
    ],
)
def test_a_text_that_is_none_leaves_nothing_behind(texts, tokenizer, content, message):
    Path("b/two.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load("b", tokenizer=tokenizer, folder="cache")
    assert [path.suffix for path in Path("cache").iterdir()] in ([], [".lock"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input_file", "empty"], "empty holds no .txt file"),
        (["--input_file", "b/*.csv"], "b/*.csv matches no file"),
        (["--input_file", "b/two.txt", "none.txt"], "none.txt does not exist"),
        (["--input_file", "b/two.txt", "pydoc_data.topics"], "without other texts"),
        (["--input_file", "b", "--tokenizer", "bpe:1000"], "the text yields"),
        (["--input_file", "b", "--tokenizer", "bpe:20"], "--tokenizer bpe:20 is none of"),
        (["--input_file", "b", "--tokenizer", "bpe:256"], "--tokenizer bpe:256 is none of"),
        (["--tokenizer", "bpe:300"], "goes with --tokenizer gpt2 only"),
        (["--input_file", ""], "--input_file is empty or the current folder"),
        (["--input_file", "b", "--cache_dir", ""], "--cache_dir is empty or the current folder"),
        (["--input_file", "b", "--cache_dir", "b/two.txt"], "--cache_dir b/two.txt: "),
        (["--input_file", "b/two.txt", "--val_file", "none.txt"], "--val_file"),
        (["--input_file", "b", "--tokenizer", "none.json"], "--tokenizer none.json: no such file"),
        (["--input_file", "b", "--tokenizer", "odd.json"], "odd.json is no tokenizer.json"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(texts, capsys, flags, message):
    Path("empty").mkdir()
    Path("odd.json").write_text("{}", encoding="utf-8")
    assert train.main(["--preset=demo", "--out_dir=run", *flags]) == 2
    out, error = capsys.readouterr()
    assert message in error.replace("\\", "/") and error.count("\n") == 1
    assert out == "" and not Path("run").exists()


@pytest.mark.slow
@pytest.mark.xdist_group("kills")
def test_a_build_that_was_killed_starts_again(tmp_path, tokenizer):
    text = " ".join(str(n) for n in range(600_000))
    Path(tmp_path / "long.txt").write_text(text, encoding="utf-8")
    program = (
        "from parts.text import corpus, vocabulary as text; from pathlib import Path;"
        "corpus.on_disk([Path('long.txt')], text.load_tokenizer(), Path('cache'), 1)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment)
    while not any(path.stat().st_size > 100_000 for path in tmp_path.glob("cache/*.tmp")):
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
    process.wait()
    assert list(tmp_path.glob("cache/*.tmp")) and not list(tmp_path.glob("cache/*.tokens"))
    found = load(tmp_path / "long.txt", tokenizer=tokenizer, folder=tmp_path / "cache")
    assert np.array_equal(found.tokens, np.array(tokenizer.encode_ordinary(text), dtype=np.uint16))
    assert not list(tmp_path.glob("cache/*.tmp"))


def test_training_on_a_folder_equals_training_on_the_joined_ids(texts, tokenizer, monkeypatch):
    """The same corpus from memory and from the file on disk gives the same run."""
    long = "To be, or not to be, that is the question: whether 'tis nobler. " * 40
    Path("b/two.txt").write_text(long, encoding="utf-8")
    flags = [*TINY_FLAGS, "--steps=4", "--input_file=b/two.txt"]
    assert train.main([*flags, "--out_dir=memory"]) == 0
    monkeypatch.setattr("parts.text.corpus.SMALL_TEXT", 100)
    assert train.main([*flags, "--out_dir=disk"]) == 0
    losses = [
        re.findall(r"\| loss ([\d.]+)", Path(run, "logs/train.log").read_text(encoding="utf-8"))
        for run in ("memory", "disk")
    ]
    assert losses[0] == losses[1] and len(losses[0]) >= 2
    assert list(Path("data/cache").glob("two-*.tokens"))


@pytest.fixture
def vocabulary(tiny_shakespeare):
    return OwnVocabulary(train_vocabulary([tiny_shakespeare], 1000), "bpe:1000")


@pytest.mark.parametrize("kind", ["gpt2", "own"])
def test_text_ends_in_a_whole_character(kind, tokenizer, own):
    """After each token: the characters whose bytes have all come, a real U+FFFD among them."""
    vocabulary = tokenizer if kind == "gpt2" else own
    text = "Zoë \ufffd 漢字🫨🦊 ไทย\ufffd鬱👩\u200d👧<|endoftext|>"
    tokens, cut = vocabulary.encode_ordinary(text), 0
    assert vocabulary.decode_bytes(tokens) == text.encode()
    for end in range(len(tokens) + 1):
        known = text.encode()[: len(vocabulary.decode_bytes(tokens[:end]))]
        found = "".join(whole_characters(vocabulary, tokens[:end]))
        assert found == known.decode("utf-8", errors="ignore")
        cut += found != vocabulary.decode(tokens[:end])
    assert found == text and cut > 5


@pytest.mark.parametrize("kind", ["gpt2", "own", "odd"])
def test_tokens_in_any_order_have_the_text_that_the_library_gives_them(kind, tokenizer, own):
    """Whatever a model that knows nothing writes: bytes that are no UTF-8, special tokens, tokens
    that no text has."""
    vocabulary = tokenizer if kind == "gpt2" else own
    if kind == "odd":
        parts = json.loads(own.content)
        n = len(parts["model"]["vocab"])
        parts["model"]["vocab"] |= {"漢字 é": n}
        parts["added_tokens"] += [
            parts["added_tokens"][0] | {"id": n + i, "content": word}
            for i, word in enumerate(["<é b>", "<é>"], 1)
        ]
        vocabulary = OwnVocabulary(json.dumps(parts), "odd.json")
        assert vocabulary.n_vocab == n + 3
    generator = random.Random(3)
    for _ in range(300):
        tokens = [vocabulary.eot_token, *generator.choices(range(vocabulary.n_vocab), k=20)]
        tokens[generator.randrange(1, 20)] = vocabulary.n_vocab - generator.randint(1, 3)
        text = vocabulary.decode(tokens)
        assert vocabulary.decode_bytes(tokens).decode("utf-8", errors="replace") == text
        found = "".join(whole_characters(vocabulary, tokens))
        assert found == text or found + "\ufffd" == text


def test_a_folder_says_how_many_files_it_gave(texts, tokenizer):
    def told(*inputs: str) -> tuple[str, int]:
        config = decide(
            dict(input_file=tuple(map(Path, inputs)), threads=1, seq_len=2, device="cpu")
        )
        corpus = load_corpus(config, tokenizer)
        line = next(
            line for line in plan(config, corpus, 0.0, Progress()) if line.startswith("Corpus: ")
        )
        record = launch_record([], config, corpus, None, {}, {})
        return line.partition(" tokens")[0].rpartition(", ")[0], record["corpus"]["files"]

    other = "left out: not .txt 1 (b/other.md)"
    assert told("b") == (f"Corpus: b (2 files; {other.replace('/', os.sep)})", 2)
    assert told("b/a") == ("Corpus: b/a (1 file)", 1)
    assert told("b/*.*", "b/two.txt") == ("Corpus: b/*.*, b/two.txt (2 files)", 2)
    assert told("b/two.txt") == ("Corpus: b/two.txt", 1)


def test_an_own_vocabulary(vocabulary, tiny_shakespeare):
    assert vocabulary.n_vocab == 1000
    text = tiny_shakespeare.read_text(encoding="utf-8")[:20_000]
    found = vocabulary.encode_ordinary(text)
    assert vocabulary.decode(found) == text and max(found) < 1000 and len(text) / len(found) > 2
    again = OwnVocabulary(train_vocabulary([tiny_shakespeare], 1000), "again")
    assert again.content == vocabulary.content, "learned the same twice"
    special = vocabulary.encode_ordinary("<|endoftext|>")
    assert len(special) > 1 and vocabulary.eot_token not in special, (
        "special tokens in a text are plain text"
    )


@settings(max_examples=150, deadline=None)
@given(words=st.lists(st.sampled_from(NASTY), max_size=60), size=st.integers(1, 40))
def test_pieces_have_the_ids_of_the_whole_under_an_own_vocabulary(
    words, size, own, tmp_path_factory
):
    test_pieces_have_the_ids_of_the_whole.hypothesis.inner_test(words, size, own, tmp_path_factory)


@pytest.fixture(scope="session")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "text.txt"
    path.write_bytes("".join(random.Random(2).choices(NASTY, k=20_000)).encode())
    return OwnVocabulary(train_vocabulary([path], 400), "bpe:400")


@pytest.mark.slow
def test_a_run_with_an_own_vocabulary_keeps_it(texts):
    text = "".join(f"Line {i}: {i * i} is the square of {i}.\n" for i in range(500))
    Path("b/two.txt").write_text(text, encoding="utf-8")
    flags = [*TINY_FLAGS, "--input_file=b/two.txt", "--tokenizer=bpe:300", "--out_dir=run"]
    assert train.main([*flags, "--steps=4"]) == 0
    saved = load_checkpoint(Path("run/checkpoints/last.pt"))
    assert saved["tokenizer"]["content"] == Path("run/tokenizer.json").read_text(encoding="utf-8")
    assert saved["config"]["vocab_size"] == 300 == len(saved["model"]["wte.weight"])
    assert train.main([*flags, "--steps=6"]) == 0, "and continues with it"
    # The vocabulary that was learned can be named, and is the same one.
    named = [
        *TINY_FLAGS,
        "--input_file=b/two.txt",
        "--tokenizer=run/tokenizer.json",
        "--out_dir=named",
        "--steps=4",
    ]
    assert train.main(named) == 0
    other = load_checkpoint(Path("named/checkpoints/last.pt"))["model"]
    assert all((value == other[name]).all() for name, value in saved["model"].items())
    assert train.main([*flags[:-2], "--out_dir=run", "--tokenizer=gpt2"]) == 2, (
        "another vocabulary is another model"
    )


def test_the_floor_of_a_large_corpus_is_estimated(monkeypatch):
    corpus = np.random.default_rng(0).integers(0, 50, 20_000).astype(np.uint16)
    exact = loss_floor(corpus, 16)
    monkeypatch.setattr("parts.text.corpus.EXACT_FLOOR", 10_000)
    assert loss_floor(corpus, 16) == pytest.approx(exact, rel=0.01)
    config = replace(decide({}), device="cpu")
    corpus = Corpus(corpus, "made up", len(corpus), 3.0)
    assert any("(an estimate)" in line for line in plan(config, corpus, exact, Progress()))


@links
def test_a_file_is_read_once_whatever_its_names(texts):
    os.symlink(".", "b/loop")
    os.symlink("two.txt", "b/three.txt")
    found = find_files([Path("b"), Path("b/**/*.txt"), Path("b/loop/two.txt")])
    assert sorted(path.resolve().name for path in found) == ["one.txt", "two.txt"]


@pytest.fixture
def mixed(texts):
    """A folder in which not all is text to train on."""
    for name in ("OLD.TXT", "a.txt", "._a.txt", ".x/b.txt", "sub/c.txt", "sub/d.md"):
        Path("m", name).parent.mkdir(parents=True, exist_ok=True)
        Path("m", name).write_text(f"This is {name}.", encoding="utf-8")
    os.symlink(Path("b").resolve(), "m/link")
    os.symlink("nowhere", "m/lost.txt")
    return texts


@links
@pytest.mark.parametrize(
    ("inputs", "expected", "left_out"),
    [
        (
            ["m"],
            "OLD.TXT a.txt link/a/one.txt link/two.txt sub/c.txt",
            {
                "hidden": "._a.txt .x",
                "broken links": "lost.txt",
                "not .txt": "link/other.md sub/d.md",
            },
        ),
        (
            ["m/**/*.txt"],
            "a.txt link/a/one.txt link/two.txt sub/c.txt",
            {"hidden": "._a.txt .x", "broken links": "lost.txt"},
        ),
        (["m/*/?.*"], "sub/c.txt sub/d.md", {"hidden": ".x"}),
        (["m/*.txt"], "a.txt", {"hidden": "._a.txt", "broken links": "lost.txt"}),
        (["m/**/.*.txt", "m/.x"], "._a.txt .x/b.txt", {}),
        (["m/._a.txt", "m/sub/**"], "._a.txt sub/c.txt sub/d.md", {}),
    ],
)
def test_folders_and_globs_follow_one_rule(mixed, inputs, expected, left_out):
    found: dict[str, set[Path]] = {}
    files = find_files(list(map(Path, inputs)), left_out=found)
    assert [path.relative_to("m").as_posix() for path in files] == expected.split()
    said = {
        why: " ".join(sorted(p.relative_to("m").as_posix() for p in paths))
        for why, paths in found.items()
    }
    assert said == left_out


@links
def test_what_is_left_out_or_equal_is_said(mixed, tokenizer):
    Path("m/sub/again.txt").write_bytes(Path("m/a.txt").read_bytes())
    flags = dict(input_file=(Path("m"),), val_file=(Path("b"),), threads=1, seq_len=2, device="cpu")
    Path("m/link").unlink()
    config = decide(flags)
    lines = [
        line.replace(os.sep, "/")
        for line in plan(config, load_corpus(config, tokenizer), 0.0, Progress())
    ]
    assert (
        "Corpus: m (4 files; left out: hidden 2 (m/._a.txt, m/.x), broken links 1 (m/lost.txt), "
        "not .txt 1 "
        "(m/sub/d.md); the same text twice: m/a.txt = m/sub/again.txt), "
    ) in "\n".join(lines)
    assert any(
        re.match(r"Validation: \d+ tokens \(2 files; left out: not \.txt 1 \(b/other\.md\)\)", one)
        for one in lines
    )


@pytest.mark.parametrize(
    ("names", "flags", "refused"),
    [
        ("abz", {"val_fraction": 0.3}, "m/1a.txt = m/3z.txt"),
        ("abz", {"val_fraction": 0.3, "max_tokens": 15}, None),
        ("azb", {"val_fraction": 0.3}, None),
        ("abz", {"val_file": "copy.txt"}, "a.txt = copy.txt"),
        ("abz", {"val_file": "copy.txt", "max_tokens": 9}, "a.txt = copy.txt"),
        ("a", {"val_file": "m/1a.txt"}, "1a.txt = m/1a.txt"),
    ],
)
def test_a_text_is_not_trained_on_and_held_out(texts, tokenizer, names, flags, refused):
    """Texts of 10 tokens under names in this order; a and z are equal."""
    Path("m").mkdir()
    for number, name in enumerate(names, 1):
        Path("m", f"{number}{name}.txt").write_text(
            ("b" if name == "b" else "a") + " one" * 9, encoding="utf-8"
        )
    Path("copy.txt").write_text("a" + " one" * 9, encoding="utf-8")
    flags = flags | ({"val_file": (Path(flags["val_file"]),)} if "val_file" in flags else {})
    config = decide(dict(input_file=(Path("m"),), threads=1, seq_len=2, **flags))
    if refused is None:
        assert len(load_corpus(config, tokenizer).tokens) > 5
        return
    with pytest.raises(ValueError, match="the same text is trained on and held out") as refusal:
        load_corpus(config, tokenizer)
    assert refused in str(refusal.value).replace(os.sep, "/") and "\n" not in str(refusal.value)


def test_a_run_does_not_read_itself(launch, text_file, capsys):
    """Its directory lies among the texts, or is their folder, and what it wrote fits the glob."""
    Path("books").mkdir()
    os.replace(text_file, "books/a.txt")
    for steps in (2, 3):
        assert launch("books/out", "--input_file=books", f"--steps={steps}") == 0
    log = capsys.readouterr().out
    assert (
        "Resuming from step 2" in log
        and f"(1 file; left out: written by train.py 1 ({Path('books/out')}))" in log
    )
    shutil.copytree("books/out", "books", dirs_exist_ok=True)
    for inputs in ("books", "books/*", "books/**/*"):
        assert find_files([Path(inputs)]) == [Path("books/a.txt")]
    with pytest.raises(FileNotFoundError, match="matches no file; left out: written by train"):
        find_files([Path("data/**/*")])
    assert find_files([Path("books/samples")]) == [Path("books/samples/samples.txt")], (
        "which is named"
    )


@pytest.mark.parametrize("flag", ["--input_file", "--val_file"])
def test_a_text_of_the_same_name_size_and_time_is_another_text(launch, text_file, capsys, flag):
    """As a restored backup, or a copy that keeps times."""
    other = Path("other.txt")
    other.write_text("Another text, long enough for some slices of it. " * 9, encoding="utf-8")
    path, name = (text_file, "run") if flag == "--input_file" else (other, "held-out")
    flags = ["--val_file=other.txt"] if flag == "--val_file" else []
    assert launch(name, *flags, "--steps=2") == 0
    before, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-4] + b"new.")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    code = launch(name, *flags, "--steps=3")
    if flag == "--input_file":
        assert code == 2 and "was trained on another text" in capsys.readouterr().err
        return
    assert code == 0 and "best.pt does not compare" in log_text(Path(name))
    corpus = json.loads(Path(name, "config.json").read_text(encoding="utf-8"))["corpus"]
    assert corpus["val_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_globs_in_folder_names(texts):
    text = "".join(f"Line {i}: {i * i} is the square of {i}.\n" for i in range(100))
    for folder in ("x/one", "x/two"):
        Path(folder).mkdir(parents=True)
        Path(folder, "in.txt").write_text(text, encoding="utf-8")
    config = decide(dict(input_file=(Path("x/*/in.txt"),), threads=1, seq_len=16))
    assert load_corpus(config, load_tokenizer()).tokens.tolist().count(50_256) == 1


@pytest.fixture(scope="session")
def good(own):
    return json.loads(own.content)


@pytest.mark.parametrize(
    ("change", "required"),
    [
        (lambda parts: parts["model"].update(dropout=0.5), "a BPE without dropout"),
        (lambda parts: parts.update(normalizer={"type": "Lowercase"}), "normalizer: none"),
        (lambda parts: parts["pre_tokenizer"].update(use_regex=False), "GPT-2's pattern"),
        (
            lambda parts: parts["pre_tokenizer"].update(add_prefix_space=True),
            "without a prefix space",
        ),
        (lambda parts: parts.update(decoder=None), "decoder: ByteLevel"),
        (lambda parts: parts["model"]["vocab"].pop("e"), "vocabulary: every byte"),
        (lambda parts: parts["model"]["vocab"].update(e=70_000), "ids without gaps"),
        (lambda parts: parts["added_tokens"][0].update(special=False), "special ones only"),
    ],
)
def test_a_vocabulary_that_would_lose_text_is_refused(good, change, required):
    parts = copy.deepcopy(good)
    parts["model"]["merges"] = []
    used = {token["content"] for token in parts["added_tokens"]} | set(tokens_of_bytes())
    names = [name for name in parts["model"]["vocab"] if name in used]
    parts["model"]["vocab"] = {name: number for number, name in enumerate(names)}
    parts["added_tokens"][0]["id"] = parts["model"]["vocab"][DOCUMENT_END]
    OwnVocabulary(json.dumps(parts), "good.json")
    change(parts)
    with pytest.raises(ValueError, match=r"bad\.json") as refusal:
        OwnVocabulary(json.dumps(parts), "bad.json")
    assert required in str(refusal.value) and "\n" not in str(refusal.value)


def tokens_of_bytes() -> list[str]:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def test_another_vocabulary_under_the_same_name_is_another_model(texts, own, capsys):
    text = "".join(f"Line {i}: {i * i} is the square of {i}.\n" for i in range(500))
    Path("b/two.txt").write_text(text, encoding="utf-8")
    Path("own.json").write_text(own.content, encoding="utf-8")
    flags = [*TINY_FLAGS, "--input_file=b/two.txt", "--out_dir=run", "--steps=4"]
    assert train.main([*flags, "--tokenizer=own.json"]) == 0
    Path("same.json").write_text(own.content, encoding="utf-8")
    assert train.main([*flags, "--tokenizer=same.json", "--steps=5"]) == 0, (
        "the same one under another name"
    )
    Path("own.json").write_text(train_vocabulary([Path("b/two.txt")], 300), encoding="utf-8")
    assert train.main([*flags, "--tokenizer=own.json", "--steps=6"]) == 2
    assert "has another vocabulary" in capsys.readouterr().err


def test_bytes_between_documents_are_no_text(texts):
    many = Path("many")
    many.mkdir()
    for number in range(40):
        (many / f"{number}.txt").write_bytes(f"Line {number}.\n".encode())
    Path("b/two.txt").write_text("Another text to train on.", encoding="utf-8")
    for flags in (
        dict(val_fraction=0.5, input_file=(many,)),
        dict(val_file=(many,), input_file=(Path("b/two.txt"),)),
    ):
        config = decide(dict(threads=1, seq_len=4, **flags))
        corpus = load_corpus(config, load_tokenizer())
        size = sum(path.stat().st_size for path in many.glob("*.txt"))
        n_tokens = (
            40 * 5 - 1 if flags.get("val_file") else len(corpus.val_tokens) + len(corpus.tokens)
        )
        assert corpus.val_bytes_per_token == pytest.approx(size / n_tokens, rel=0.05)


def test_a_large_text_needs_no_number_of_threads(texts, tokenizer, monkeypatch):
    """`threads` is None until a run has chosen it, and a corpus can be loaded without a run."""
    text = "".join(f"Line {i}: {i * i} is the square of {i}.\n" for i in range(500))
    Path("b/two.txt").write_bytes(text.encode())
    monkeypatch.setattr("parts.text.corpus.SMALL_TEXT", 100)
    monkeypatch.setattr("parts.text.files.CHUNK", 50)
    config = decide(dict(input_file=(Path("b/two.txt"),), threads=None, seq_len=16))
    assert config.threads is None
    found = load_corpus(config, tokenizer).tokens
    assert isinstance(found, np.memmap), "encoded on all cores, into a file"
    assert found.tolist() == tokenizer.encode_ordinary(text)


def test_bytes_per_token_are_those_of_the_part_that_is_trained_on(texts):
    Path("mix.txt").write_text(
        "Plain English words here. " * 200 + "漢字仮名交り文" * 400, encoding="utf-8"
    )
    config = decide(dict(input_file=(Path("mix.txt"),), max_tokens=500, seq_len=16))
    assert load_corpus(config, load_tokenizer()).bytes_per_token == pytest.approx(26 / 5, rel=0.01)


def test_a_cache_that_cannot_be_written_can_be_read(texts, tokenizer, monkeypatch):
    expected = load("b", tokenizer=tokenizer, folder="cache").tokens.tolist()

    def refuse(_path, wait=False):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("parts.text.corpus.open_locked", refuse)
    assert load("b", tokenizer=tokenizer, folder="cache").tokens.tolist() == expected
    with pytest.raises(OSError, match="--cache_dir cache: Read-only"):
        load("b/two.txt", tokenizer=tokenizer, folder="cache")


def test_an_empty_text_yields_no_vocabulary_and_is_called_empty(texts, capsys):
    Path("nothing.txt").write_text("", encoding="utf-8")
    assert train.main(["--tokenizer=bpe:4000", "--input_file=nothing.txt", "--out_dir=run"]) == 2
    error = capsys.readouterr().err
    assert "nothing.txt is empty" in error and "257" not in error


@pytest.mark.slow
@pytest.mark.xdist_group("kills")
@pytest.mark.skipif(os.name == "nt", reason="needs SIGTERM")
def test_sigterm_while_a_text_is_encoded_leaves_nothing_half_written(tmp_path):
    text = " ".join(str(n) for n in range(3_000_000))
    Path(tmp_path / "long.txt").write_text(text, encoding="utf-8")
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--preset=demo",
        "--input_file=long.txt",
        "--out_dir=run",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not any(path.stat().st_size > 100_000 for path in tmp_path.glob("data/cache/*.tmp")):
        assert process.poll() is None, "it was done before it could be stopped"
        time.sleep(0.005)
    process.terminate()
    assert process.wait(60) == 143
    assert not list(tmp_path.glob("data/cache/*.tmp")) and not Path(tmp_path, "run").exists()
