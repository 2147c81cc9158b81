"""sample.py: the checkpoint's text and nothing else on stdout, the same for the same seed,
streamed."""

import io
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import GPT2, ROOT, TINY_FLAGS

import sample
import train
from parts.flags import Config
from parts.run.checkpoint import checkpoint_in, load_checkpoint, newest_run
from parts.text.corpus import load_corpus
from parts.text.vocabulary import load_tokenizer, train_vocabulary

GREEDY = ["--temperature=0", "--amp=off", "--device=cpu", "--max_new_tokens=20"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on the demo's text, a few steps long."""
    path = tmp_path_factory.mktemp("sample")
    text = "".join(
        f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs, é.\n" for i in range(200)
    )
    (path / "text.txt").write_text(text, encoding="utf-8", newline="\n")
    flags = [*TINY_FLAGS, GPT2, f"--input_file={path / 'text.txt'}", f"--out_dir={path / 'run'}"]
    assert (
        train.main([*flags, "--steps=60", "--lr=0.02", "--save_every=60", "--sample_every=60"]) == 0
    )
    return path


def run(folder: Path, *flags: str, **options) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        str(ROOT / "sample.py"),
        "--checkpoint=run/checkpoints/best.pt",
        *flags,
    ]
    options = {"input": "", "timeout": 100} | options
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, encoding="utf-8", **options
    )


@pytest.fixture
def say(folder, monkeypatch, capsys):
    """What the program writes to stdout and stderr, in this process; `typed` comes through a
    pipe."""

    def run(*flags: str, typed: bytes = b"", code: int = 0) -> tuple[str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        capsys.readouterr()
        assert sample.main(["--checkpoint=run/checkpoints/best.pt", *flags]) == code
        return capsys.readouterr()

    return run


def expected(folder: Path, prompt: str, max_new_tokens: int = 20) -> str:
    """What train.py's own generate adds, greedily in fp32."""
    checkpoint = load_checkpoint(folder / "run/checkpoints/best.pt")
    model = train.GPT(Config.from_dict(checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    tokenizer = load_tokenizer()
    options = dict(
        context=checkpoint["trained_context"],
        temperature=0.0,
        top_k=0,
        generators=[torch.Generator()],
    )
    return tokenizer.decode(
        train.generate(model, [tokenizer.encode_ordinary(prompt)], max_new_tokens, **options)[0]
    )


@pytest.mark.slow
def test_text_alone_goes_to_stdout(folder):
    result = run(folder, r"--prompt=Line 1:\n the", *GREEDY)
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected(folder, "Line 1:\n the") + "\n"
    assert result.stderr.startswith("[20 tokens, ") and result.stderr.endswith(" tok/s]\n")


def test_the_prompt_comes_from_wherever_it_is(folder, say):
    (folder / "prompt.txt").write_text("Line 7: the", encoding="utf-8")
    answers = {
        say("--prompt=Line 7: the", *GREEDY)[0],
        say("--prompt_file=prompt.txt", *GREEDY)[0],
        say(*GREEDY, typed=b"Line 7: the\n")[0],
    }
    assert answers == {expected(folder, "Line 7: the") + "\n"}


@pytest.mark.slow
def test_another_process_with_its_prompt_from_a_pipe_writes_the_same(folder, say):
    flags = ["--seed=5", "--max_new_tokens=20", "--amp=off", "--device=cpu"]
    assert run(folder, *flags, input="Line 7: é").stdout == say("--prompt=Line 7: é", *flags)[0]


def test_no_prompt_at_all_is_one_too(folder, say):
    assert say("--prompt=", *GREEDY)[0] == expected(folder, "\n")[1:] + "\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_on_a_terminal_it_asks(folder):
    outer, inner = os.openpty()
    command = [
        sys.executable,
        str(ROOT / "sample.py"),
        "--checkpoint=run/checkpoints/best.pt",
        *GREEDY,
    ]
    process = subprocess.Popen(
        command, cwd=folder, stdin=inner, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    os.write(outer, b"Line 1:\nLine 2:\n\x04")
    out, err = process.communicate(timeout=100)
    os.close(outer)
    os.close(inner)
    assert process.returncode == 0 and err.count(b"prompt> ") == 3
    assert (
        out.decode().replace("\r", "")
        == f"{expected(folder, 'Line 1:')}\n{expected(folder, 'Line 2:')}\n"
    )


def test_the_same_seed_gives_the_same_text(say):
    flags = ["--prompt=Line", "--num_samples=3", "--max_new_tokens=20", "--temperature=1.5"]
    first, again = say(*flags, "--seed=5")[0], say(*flags, "--seed=5")[0]
    assert first == again != say(*flags, "--seed=6")[0]
    texts = first.split(f"\n{sample.SEPARATOR}\n")
    assert len(set(texts)) == 3 and all(text.startswith("Line") for text in texts)


def test_a_character_is_written_when_it_is_whole(folder, monkeypatch):
    sampler = sample.Sampler(folder / "run/checkpoints/best.pt", "cpu", "off")
    text = "ab\U0001fae8é 漢\ufffd!"
    tokens = sampler.tokenizer.encode_ordinary(text)
    monkeypatch.setattr(
        train, "continuations", lambda *_args, **_options: iter([token] for token in tokens)
    )
    pieces = list(sampler.stream("x", sample.Options(Path())))
    assert len(pieces) == len(tokens), "one for each token"
    assert list(filter(None, pieces)) == ["ab", "\U0001fae8", "é", " ", "漢", "\ufffd", "!"]


@pytest.mark.slow
def test_no_sample_ends_inside_a_character(tmp_path, monkeypatch, capsys):
    """Neither of sample.py nor of train.py, at whichever token of a character it ends."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("🫨漢鬱" * 200, encoding="utf-8")
    flags = [
        *TINY_FLAGS,
        GPT2,
        "--input_file=text.txt",
        "--out_dir=run",
        "--steps=60",
        "--lr=0.02",
        "--amp=off",
    ]
    assert train.main([*flags, "--save_every=60", "--sample_every=60"]) == 0
    checkpoint = load_checkpoint(Path("run/checkpoints/best.pt"))
    config = replace(
        Config.from_dict(checkpoint["config"]), temperature=0.0, prompt="🫨漢", num_prompts=1
    )
    corpus, tokenizer, endings = load_corpus(config, load_tokenizer()), load_tokenizer(), set()
    for n in range(1, 9):
        trainer = train.Trainer(replace(config, max_new_tokens=n), corpus, None)
        trainer.model.load_state_dict(checkpoint["model"])
        trainer.progress.trained_context = checkpoint["trained_context"]
        whole = expected(tmp_path, "🫨漢", n)
        endings.add(whole[-1] == "\ufffd")
        assert trainer.sample(tokenizer) == ("🫨漢", [whole.removesuffix("\ufffd")])
        capsys.readouterr()
        command = [
            "--checkpoint=run/checkpoints/best.pt",
            "--prompt=🫨漢",
            *GREEDY,
            f"--max_new_tokens={n}",
        ]
        assert sample.main(command) == 0
        assert capsys.readouterr()[0] == whole.removesuffix("\ufffd") + "\n"
    assert endings == {True, False}, "some of them would have"


def test_of_a_folder_the_best_is_taken_then_the_last_then_the_one_before(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    names = ("best.pt", "last.pt", "prev.pt")
    for name in names:
        (checkpoints / name).touch()
    for name in names:
        for folder in (checkpoints.parent, checkpoints):
            assert checkpoint_in(folder, "--checkpoint") == checkpoints / name
        assert checkpoint_in(checkpoints / name, "--checkpoint") == checkpoints / name
        (checkpoints / name).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"--checkpoint .*run: no best.pt, last.pt, prev.pt in this folder"
    ):
        checkpoint_in(checkpoints.parent, "--checkpoint")


def test_a_run_directory_does_where_a_checkpoint_is_asked_for(folder, say):
    out, error = say("--checkpoint=run", "--prompt=Line 7: the", *GREEDY)
    assert out == expected(folder, "Line 7: the") + "\n"
    assert error.startswith(f"[checkpoint: {Path('run/checkpoints/best.pt')}]\n")


def test_without_a_checkpoint_it_takes_the_newest_run(folder, tmp_path, monkeypatch, capsys):
    """Newest is what changed last, be it the last or the best; of that run it takes the best."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("one", "two")):
        checkpoints = tmp_path / "out" / name / "checkpoints"
        shutil.copytree(folder / "run/checkpoints", checkpoints)
        for path in checkpoints.iterdir():
            os.utime(path, (1000 + number, 1000 + number))
    (tmp_path / "out/one/checkpoints/prev.pt").touch()
    for newest, changed in (("two", None), ("one", "out/one/checkpoints/last.pt")):
        if changed:
            os.utime(changed, (2000, 2000))
        capsys.readouterr()
        assert sample.main(["--prompt=Line 7: the", *GREEDY]) == 0
        out, error = capsys.readouterr()
        assert out == expected(folder, "Line 7: the") + "\n"
        assert error.startswith(f"[checkpoint: {Path('out', newest, 'checkpoints/best.pt')}]\n")


def test_without_any_run_it_says_how_to_train_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert sample.main(["--prompt=x"]) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.count("\n") == 1 and "python train.py --preset demo" in error
        (tmp_path / "out/empty/checkpoints").mkdir(parents=True, exist_ok=True)


def test_copied_passages_are_found(tmp_path):
    corpus = "Before we proceed any further, hear me speak. You are all resolved rather to die."
    path = tmp_path / "corpus.txt"
    path.write_text(corpus, encoding="utf-8")
    found = sample.Novelty(path, load_tokenizer())
    text = "Now hear me speak. You are all resolved rather to dance."
    assert found.longest_copy(text) == " hear me speak. You are all resolved rather to d"
    assert found.longest_copy(corpus) == corpus and found.report(corpus).startswith("[100% of ")
    assert len(found.longest_copy("zqx")) <= 1 and found.report("zqx").startswith("[0% of ")


def test_the_report_on_copies(folder, say):
    out, error = say("--prompt=Line 1:", "--novelty=text.txt", *GREEDY)
    assert "8-grams of tokens that were added are in text.txt; longest passage copied: " in error
    assert out == expected(folder, "Line 1:") + "\n"


def test_the_text_of_the_demo_can_be_looked_through(say):
    """As the README has it."""
    _, error = say("--prompt=Line 1:", "--novelty=pydoc_data.topics", *GREEDY)
    assert "that were added are in pydoc_data.topics; longest passage copied: " in error


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes of this kind")
def test_a_prompt_may_come_from_what_is_no_regular_file(folder, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=["Line 1:"])
    writer.start()
    options = sample.Options(prompt_file=pipe)
    assert list(sample.prompts(options)) == ["Line 1:"]
    writer.join()


def test_a_run_that_may_not_be_read_is_passed_over(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    other = shutil.copytree(folder / "run", folder / "runs/locked")
    shutil.copytree(folder / "run", folder / "runs/own")
    os.utime(other / "checkpoints/best.pt", (2**31, 2**31))
    assert newest_run(folder / "runs") == folder / "runs/own"
    shutil.rmtree(folder / "runs")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint=none.pt"], "--checkpoint none.pt: no such file"),
        (["--checkpoint=text.txt"], "text.txt is damaged or no checkpoint"),
        (["--prompt=a", "--prompt_file=text.txt"], "choose one"),
        (["--prompt_file=none.txt"], "none.txt does not exist"),
        (["--novelty=none.txt"], "none.txt does not exist"),
        (["--prompt_file=run"], "run is a folder"),
        (["--checkpoint=."], "--checkpoint .: no best.pt, last.pt, prev.pt in this folder"),
        (["--temperature=-1"], "--temperature -1.0 is outside"),
        (["--top_p=0"], "--top_p 0.0 is outside"),
        (["--num_samples=0"], "--num_samples 0 is outside"),
        (["--device=cuda:99"], "--device cuda:99"),
        (["--device=tpu"], "--device tpu"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(folder)
    capsys.readouterr()
    assert sample.main(["--checkpoint=run/checkpoints/best.pt", *flags]) == 2
    out, error = capsys.readouterr()
    assert message in error and out == ""
    assert error.count("\n") == 1 and error.startswith("sample.py: error: ")


def test_bytes_that_are_no_text(say):
    """Latin-1, piped or typed; Python hands on bytes that it cannot read as surrogates."""
    out, error = say(typed=b"caf\xe9", code=2)
    assert out == "" and "the prompt from stdin is not UTF-8: byte 0xe9 at offset 3" in error
    out, error = say("--prompt=caf\udce9", code=2)
    assert out == "" and "is not UTF-8" in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no POSIX locale")
def test_text_on_a_system_that_is_told_to_speak_ascii(folder):
    ascii_only = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert run(folder, "--prompt=Line é", *GREEDY, env=ascii_only).stdout.startswith("Line é")


def test_hardly_any_temperature_is_none(say):
    assert (
        len(
            {say("--prompt=Line 1: the", *GREEDY, f"--temperature={t}")[0] for t in ("0", "1e-300")}
        )
        == 1
    )


def test_the_vocabulary_is_that_of_the_checkpoint(folder, tmp_path):
    """Whatever lies by now where it once was read from."""
    words = tmp_path / "tokenizer.json"
    words.write_text(train_vocabulary([folder / "text.txt"], 300), encoding="utf-8")
    flags = [
        *TINY_FLAGS,
        f"--input_file={folder / 'text.txt'}",
        f"--out_dir={tmp_path / 'run'}",
        "--steps=4",
    ]
    assert train.main([*flags, f"--tokenizer={words}", f"--cache_dir={tmp_path / 'cache'}"]) == 0
    path = tmp_path / "run/checkpoints/best.pt"
    before = sample.Sampler(path).tokenizer.content
    words.write_text(train_vocabulary([folder / "text.txt"], 280), encoding="utf-8")
    assert sample.Sampler(path).tokenizer.content == before


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
def test_nobody_listens_to_stderr(folder):
    command = (
        f"{sys.executable} {ROOT / 'sample.py'} --checkpoint run/checkpoints/best.pt --prompt "
        f"Line 2>&-"
    )
    result = subprocess.run(
        f"{command} --max_new_tokens 3",
        cwd=folder,
        shell=True,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0 and "tok/s" not in result.stdout


@pytest.mark.slow
def test_a_reader_that_has_enough_is_no_error(folder):
    """As `sample.py | head` is, also under Windows, where the system has another word for it."""
    flags = ["--checkpoint=run/checkpoints/best.pt", "--prompt=Line", "--max_new_tokens=3000"]
    command = [sys.executable, str(ROOT / "sample.py"), *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=folder, **pipes) as process:
        assert process.stdout.read(5).startswith(b"Line")
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0 and said == b""


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        sample.main(["--help"])
    assert "--novelty" in capsys.readouterr().out
