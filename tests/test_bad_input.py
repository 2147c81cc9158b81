"""A user's mistake costs one short message and exit code 2, and changes no file."""

import os
import pickle
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
from conftest import TINY_FLAGS, run_script

import train

HINTS = get_type_hints(train.Config, include_extras=True)
LIMITS = {f.name: HINTS[f.name].__metadata__[0] for f in fields(train.Config) if hasattr(HINTS[f.name], "__metadata__")}


def out_of_range() -> list[tuple[str, str]]:
    """For every numeric flag: below its range, zero where zero means nothing, NaN, infinite, absurd."""
    cases = []
    for name, limit in LIMITS.items():
        integer = "int" in str(HINTS[name])
        values = ["-1", "nan", "inf", "many", *(["9" * 30, "1.5"] if integer else ["1e+30"])]
        values += ["0"] if limit.low > 0 else []
        cases += [(name, value) for value in values]
    return cases


@pytest.fixture
def refused(tmp_path, text_file, monkeypatch, capsys):
    """Run main with the flags, require exit code 2 and an unchanged directory, return the message."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str, out_dir: str = "run") -> str:
        def state():
            return {p: p.is_file() and (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*")}

        before = state()
        code = train.main([*TINY_FLAGS, "--input_file", str(text_file), "--out_dir", out_dir, *flags])
        captured = capsys.readouterr()
        assert code == 2, captured.out
        assert state() == before
        assert captured.out == "" and "Traceback" not in captured.err
        assert 0 < len(captured.err) < 1500
        return captured.err

    return run


@pytest.mark.parametrize(("name", "value"), out_of_range())
def test_numbers(refused, name, value):
    message = refused(f"--{name}={value}")
    assert name in message and value in message.replace("\n", "").replace("│", "").replace(" ", "")


def test_every_numeric_flag_has_a_range():
    numeric = {name for name, hint in HINTS.items() if "int" in str(hint) or "float" in str(hint)}
    assert numeric == set(LIMITS) and len(numeric) > 25


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--seq_len=17"], "--seq_len 17 exceeds --block_size 16"),
        (["--n_head=3"], "--n_embd 32 is not divisible by --n_head 3"),
        (["--warmup_steps=9"], "--warmup_steps 9 exceeds --decay_steps 8"),
        (["--min_lr=1"], "--min_lr 1.0 exceeds --lr 0.0003"),
        (["--device=tpu"], "--device tpu is none of auto, cpu"),
        (["--device=cuda:99"], "--device cuda:99"),
        (["--device=mps"] if not train.torch.backends.mps.is_available() else ["--device=x"], "--device"),
        (["--n_embd=65536", "--n_layer=1024", "--n_head=1"], "parameters is beyond one device"),
        (["--batch_size=65536", "--grad_accum=65536"], "tokens per step exceeds"),
        (["--preset=gpt3"], "gpt2-xl"),
        (["--amp=fp8"], "bf16"),
        (["--optimizer=sgd"], "adamw"),
        (["--stps=5"], "--steps"),
        (["--learning_rate=5"], "Unrecognized options"),
        (["extra"], "extra"),
        (["--steps"], "--steps"),
        (["--input_file=missing.txt"], "missing.txt does not exist"),
        (["--input_file=."], "is a directory"),
        (["--resume=missing.pt"], "--resume missing.pt: no such file"),
        (["--resume=."], "--resume .: no such file"),
        (["--resume=input.txt"], "input.txt is damaged or no checkpoint"),
        (["--max_tokens=5"], "has 5 tokens, but a slice needs --seq_len + 1 = 17"),
    ],
)
def test_flags(refused, flags, expected):
    assert expected in " ".join(refused(*flags).replace("│", "").split())


def test_every_problem_is_reported_at_once(refused):
    message = refused("--seq_len=17", "--n_head=3", "--min_lr=1")
    assert message.count("train.py: error: ") == 3
    message = refused("--lr=nan", "--steps=0", "--dropout=2")
    assert message.count("train.py: error: ") == 3


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"too short", "tokens, but a slice needs --seq_len + 1 = 17"),
        (b"good text, then \xff bad", "is not UTF-8: byte 0xff at offset 16"),
        ("text\n".encode("utf-16"), "is UTF-16, which is what '>' writes in Windows PowerShell 5.1"),
        ("text\n".encode("utf-16-be"), "tokens, but a slice needs"),
        (b"caf\xe9 in the Windows code page", "byte 0xe9 at offset 3"),
    ],
)
def test_corpora(refused, tmp_path, data, expected):
    (tmp_path / "bad.txt").write_bytes(data)
    message = refused("--input_file=bad.txt")
    assert expected in message and "bad.txt" in message and message.count("\n") == 1


def test_out_dir_below_a_file(refused):
    assert "input.txt is no directory; choose another --out_dir" in refused(out_dir="input.txt/run")


@pytest.mark.parametrize("name", ["logs", "samples", "checkpoints"])
def test_a_file_where_a_folder_must_be(refused, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("in the way", encoding="utf-8")
    assert f"{name} is no directory" in refused()


@pytest.mark.parametrize("name", ["config.json", "results.json", "logs/train.log", "checkpoints/best.pt"])
def test_a_folder_where_a_file_must_be(refused, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    assert "is no file; choose another --out_dir" in refused().replace("\\", "/")


def test_an_argument_that_is_not_utf8(refused):
    assert "is not UTF-8" in refused("--prompt=ab\udcff")


def test_more_white_space_than_the_tokenizer_takes(refused, tmp_path):
    (tmp_path / "blank.txt").write_text("a" + " " * 600_000 + "b", encoding="utf-8")
    assert "500,000 white-space characters in a row" in refused("--input_file=blank.txt")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere, Windows has no such modes")
def test_out_dir_not_writable(refused, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "locked is not writable" in refused(out_dir="locked/run")


@pytest.fixture
def earlier_run(tmp_path, text_file, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert train.main([*TINY_FLAGS, "--input_file", str(text_file), "--out_dir", "run"]) == 0
    return tmp_path / "run"


def test_a_run_of_another_shape_or_text(earlier_run, refused, tmp_path):
    assert "last.pt has --n_layer 2 (--preset gpt2), not 3: choose another --out_dir" in refused("--n_layer=3")
    assert "last.pt has --block_size 16 (--preset gpt2), not 32" in refused("--block_size=32")
    (tmp_path / "other.txt").write_text("Another text. " * 50, encoding="utf-8")
    assert "was trained on another text than other.txt" in refused("--input_file=other.txt")
    assert "not 100: set --max_tokens 0, or choose" in refused("--max_tokens=100")
    assert "holds weights alone" in refused("--resume=run/checkpoints/best.pt")
    assert "holds another run than --resume" in refused("--resume=elsewhere/last.pt")


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "pickle", "foreign", "another version"])
def test_a_damaged_checkpoint(earlier_run, refused, damage):
    path = earlier_run / "checkpoints" / "last.pt"
    data = path.read_bytes()
    if damage == "foreign":
        train.torch.save({"model": {}}, path)
    elif damage == "another version":
        train.torch.save({**train.load_checkpoint(path), "format": 99}, path)
    else:
        harmful = pickle.dumps(os.getcwd, protocol=2)
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "text": b"hello", "pickle": harmful}[damage])
    message = refused()
    assert "last.pt has format 99" in message if damage == "another version" else "last.pt is" in message
    if damage != "another version":
        assert "--resume run/checkpoints/prev.pt goes on from the one before" in message.replace("\\", "/")


@pytest.mark.parametrize(
    "flags", [("--lr", "nan"), ("--stps", "5"), ("--preset", "gpt3"), ("--input_file", "missing.txt")]
)
def test_as_a_subprocess(tmp_path, flags):
    result = run_script(*flags, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == "" and "Traceback" not in result.stderr
    assert flags[1] in result.stderr or flags[0] in result.stderr
    assert list(tmp_path.iterdir()) == []
