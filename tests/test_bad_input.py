"""A user's mistake costs one short message and exit code 2, and changes no file."""

import io
import os
import shutil
import subprocess
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from conftest import GPT2, POWERSHELL, TINY_FLAGS, needs_pwsh, run_script

import train
import update_readme
from parts.flags import Flags
from parts.text.files import read_text

HINTS = get_type_hints(Flags, include_extras=True)
LIMITS = {
    f.name: HINTS[f.name].__metadata__[0]
    for f in fields(Flags)
    if hasattr(HINTS[f.name], "__metadata__")
}


def out_of_range() -> list[tuple[str, str]]:
    """For every numeric flag: below its range, zero where zero means nothing, absurd, and what its
    type does not read: of an integer a fraction, of a float a word. NaN and infinity are floats."""
    cases = []
    for name, limit in LIMITS.items():
        integer = "int" in str(HINTS[name])
        values = ["-1", *(["9" * 30, "1.5"] if integer else ["1e+30", "nan", "inf", "many"])]
        values += ["0"] if limit.low > 0 else []
        cases += [(name, value) for value in values]
    return cases


@pytest.fixture
def refused(tmp_path, text_file, monkeypatch, capsys):
    """Run main with the flags, require exit code 2 and an unchanged directory, return the
    message."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str, out_dir: str = "run") -> str:
        def state():
            return {
                p: p.is_file() and (p.read_bytes(), p.stat().st_mtime_ns)
                for p in tmp_path.rglob("*")
            }

        before = state()
        code = train.main(
            [*TINY_FLAGS, GPT2, "--input_file", str(text_file), "--out_dir", out_dir, *flags]
        )
        captured = capsys.readouterr()
        assert code == 2, captured.out
        assert state() == before
        beforehand = [
            line
            for line in captured.out.splitlines()
            if not line.endswith("; encoding the text anew")
        ]
        assert beforehand == [] and "Traceback" not in captured.err
        assert 0 < len(captured.err) < 1500
        return captured.err

    return run


@pytest.mark.parametrize(("name", "value"), out_of_range())
def test_numbers(refused, name, value):
    message = refused(f"--{name}={value}")
    assert name in message and value in message.replace("\n", "").replace(" ", "")


def test_every_numeric_flag_has_a_range():
    numeric = {name for name, hint in HINTS.items() if "int" in str(hint) or "float" in str(hint)}
    assert numeric == set(LIMITS) and len(numeric) > 25


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--seq_len=17"], "--seq_len 17 exceeds --block_size 16"),
        (["--n_head=3"], "--n_embd 32 is not divisible by --n_head 3"),
        (["--warmup_steps=9"], "--warmup_steps 9 exceeds --decay_steps 8"),
        (["--min_lr=1"], "--min_lr 1.0 exceeds --lr 0.0035"),
        (["--mixed_steps=9"], "--mixed_steps 9 exceeds --steps 8"),
        (["--mixed_steps=4", "--seq_len=6"], "--seq_len 6 has no quarters: choose a multiple of 4"),
        (
            ["--mixed_steps=4", "--batch_size=3"],
            "--batch_size x --grad_accum = 3 slices are too few for --mixed_steps 4",
        ),
        (["--device=tpu"], "--device tpu is none of auto, cpu"),
        (["--device=cuda:99"], "--device cuda:99"),
        (["--device=mps"] if not torch.backends.mps.is_available() else ["--device=x"], "--device"),
        (["--n_embd=65536", "--n_layer=1024", "--n_head=1"], "parameters is beyond one device"),
        (["--batch_size=65536", "--grad_accum=65536"], "tokens per step exceeds"),
        (["--preset=gpt3"], "gpt2-xl"),
        (["--amp=fp8"], "bf16"),
        (["--optimizer=sgd"], "adamw"),
        (["--stps=5"], "--steps"),
        (["--learning_rate=5"], "--learning_rate is called --lr here"),
        (["extra"], "extra"),
        (["--steps"], "--steps"),
        (["--input_file=missing.txt"], "missing.txt does not exist"),
        (["--resume=missing.pt"], "--resume missing.pt: no such file"),
        (["--resume=."], "--resume .: a folder; name a checkpoint"),
        (["--resume=input.txt"], "input.txt is damaged or no checkpoint"),
        (["--out_dir="], "--out_dir is empty or the current folder"),
        (["--out_dir=."], "--out_dir is empty or the current folder"),
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


def zipped(**members: str) -> bytes:
    """A zip archive; of a name's signs, __ stands for a slash. A member `mimetype` is stored as it
    is."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            kind = zipfile.ZIP_STORED if name == "mimetype" else zipfile.ZIP_DEFLATED
            archive.writestr(name.replace("__", "/"), content, kind)
    return data.getvalue()


WESTERN = "Élan, café, naïve: “the Windows code page” — Zoë\u2019s.\n"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"too short", "tokens, but a slice needs --seq_len + 1 = 17"),
        (b"good text, then \xff bad", "is not UTF-8: byte 0xff at offset 16"),
        (
            "text\n".encode("utf-16"),
            "is UTF-16, which is what '>' writes in Windows PowerShell 5.1",
        ),
        (b"\xef\xbb\xbfgood text, then \xff bad", "is not UTF-8: byte 0xff at offset 19"),
        (
            b"caf\xe9",
            "byte 0xe9 at offset 3; if all of it is in another encoding, such as windows-1252",
        ),
        (
            zipped(**{"[Content_Types].xml": "<Types/>"}),
            "is a zip archive, or a document such as Word's: unpack it",
        ),
        (
            b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n" * 9,
            'a PDF: run pdftotext -enc UTF-8 "',
        ),
        (
            b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
            "has a NUL byte at offset 8, which no text has: it is binary",
        ),
        (b"\0", "offset 0, which no text has"),
        (b"Good text. " * 50 + b"\0" + b"Good text. " * 50, "at offset 550, which no text has"),
        ((WESTERN * 40).encode("utf-16le"), "UTF-16 without a mark"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "bytes",  # the same in all workers
)
def test_corpora(refused, tmp_path, data, expected):
    (tmp_path / "bad.txt").write_bytes(data)
    message = refused("--input_file=bad.txt")
    assert expected in message and "bad.txt" in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "flags", [["--input_file=books"], ["--val_file=books/two.txt"], ["--tokenizer=bpe:300"]]
)
def test_a_byte_in_a_text_that_is_read_in_pieces(refused, tmp_path, monkeypatch, flags):
    """Found where it is, whatever came before; no token ids are left behind."""
    monkeypatch.setattr("parts.text.files.CHUNK", 1000)
    monkeypatch.setattr("parts.text.corpus.SMALL_TEXT", 100)
    (tmp_path / "books").mkdir()
    (tmp_path / "books/one.txt").write_text(WESTERN * 50, encoding="utf-8")
    (tmp_path / "books/two.txt").write_bytes(
        b"Good text, and more. " * 500 + b"\0" + b"The end. " * 200
    )
    cache = tmp_path.parent / f"{tmp_path.name}-cache"
    flags = ["--input_file=books/two.txt", *flags, f"--cache_dir={cache}"]
    message = refused(*flags).replace("\\", "/")
    assert "books/two.txt has a NUL byte at offset 10500, which no text has" in message
    assert (
        message.count("\n") == 1
        and not list(cache.glob("*two*.tokens"))
        and not list(cache.glob("books*.tokens"))
    )


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe:300"])
def test_a_document_among_texts(refused, tmp_path, tokenizer):
    """However the text is read, the file is called what it is; of a folder only the .txt files are
    read."""
    (tmp_path / "books").mkdir()
    (tmp_path / "books/one.txt").write_text(WESTERN * 50, encoding="utf-8")
    (tmp_path / "books/two.odt").write_bytes(
        zipped(mimetype="application/vnd.oasis.opendocument.text")
    )
    flags = [f"--tokenizer={tokenizer}", f"--cache_dir={tmp_path.parent / 'cache'}"]
    assert "two.odt is a zip archive, or a document" in refused("--input_file=books/*", *flags)
    (tmp_path / "books/one.txt").unlink()
    message = refused("--input_file=books", *flags)
    assert (
        "--input_file books holds no .txt file, nor do the folders in it; name others with a glob"
        in message
    )


OTHER_ENCODINGS = [("", "cp1252"), ("\ufeff", "utf-16-le"), ("\ufeff", "utf-16-be")]


def conversions(refused, folder: Path, mark: str, encoding: str) -> tuple[str, str]:
    """The commands for a POSIX shell and for PowerShell that a message names."""
    (folder / "my text.txt").write_bytes((mark + WESTERN).encode(encoding))
    message = refused("--input_file=my text.txt").strip()
    posix, _, windows = message.partition("Linux, macOS: ")[2].partition("; PowerShell: ")
    return posix, windows


@pytest.mark.slow
@pytest.mark.skipif(
    os.name == "nt" or shutil.which("iconv") is None, reason="needs iconv and a POSIX shell"
)
@pytest.mark.parametrize(("mark", "encoding"), OTHER_ENCODINGS)
def test_the_conversion_that_a_message_names(refused, tmp_path, mark, encoding):
    command, _ = conversions(refused, tmp_path, mark, encoding)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert read_text(tmp_path / "utf8.txt", "--input_file") == WESTERN


@pytest.mark.slow
@needs_pwsh
@pytest.mark.parametrize(("mark", "encoding"), OTHER_ENCODINGS)
def test_the_conversion_in_powershell(refused, tmp_path, mark, encoding):
    _, command = conversions(refused, tmp_path, mark, encoding)
    subprocess.run([*POWERSHELL, "-Command", command], cwd=tmp_path, check=True, timeout=100)
    assert read_text(tmp_path / "utf8.txt", "--input_file") == WESTERN


def test_out_dir_below_a_file(refused):
    assert "input.txt is no directory; choose another --out_dir" in refused(out_dir="input.txt/run")


@pytest.mark.parametrize("name", ["logs", "samples", "checkpoints"])
def test_a_file_where_a_folder_must_be(refused, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("in the way", encoding="utf-8")
    assert f"{name} is no directory" in refused()


@pytest.mark.parametrize(
    "name", ["config.json", "results.json", "logs/train.log", "checkpoints/best.pt"]
)
def test_a_folder_where_a_file_must_be(refused, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    assert "is no file; choose another --out_dir" in refused().replace("\\", "/")


def test_an_argument_that_is_not_utf8(refused):
    assert "is not UTF-8" in refused("--prompt=ab\udcff")


@pytest.mark.skipif(
    os.name == "nt" or os.geteuid() == 0,
    reason="root may write anywhere, Windows has no such modes",
)
def test_out_dir_not_writable(refused, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "locked is not writable" in refused(out_dir="locked/run")


@pytest.fixture
def earlier_run(tmp_path, text_file, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert train.main([*TINY_FLAGS, GPT2, "--input_file", str(text_file), "--out_dir", "run"]) == 0
    return tmp_path / "run"


def test_a_run_of_another_shape_or_text(earlier_run, refused, tmp_path):
    assert "last.pt has --n_layer 2 (--preset gpt2), not 3: choose another --out_dir" in refused(
        "--n_layer=3"
    )
    assert "last.pt has --block_size 16 (--preset gpt2), not 32" in refused("--block_size=32")
    assert "last.pt has --optimizer muon (--preset gpt2), not adamw: choose" in refused(
        "--optimizer=adamw"
    )
    (tmp_path / "other.txt").write_text("Another text. " * 50, encoding="utf-8")
    message = refused("--input_file=other.txt").replace("\\", "/")
    assert (
        "was trained on another text than other.txt: to go on from its weights with this one, give"
        in message
    )
    assert (
        " give --init_from run/checkpoints/last.pt and another --out_dir; for a new model, choose"
        in message
    )
    assert "not 100: set --max_tokens 0 --val_fraction 0.0, or choose" in refused(
        "--max_tokens=100"
    )
    assert "holds weights alone" in refused("--resume=run/checkpoints/best.pt")
    assert "holds another run than --resume" in refused("--resume=elsewhere/last.pt")


@pytest.mark.slow
def test_a_text_that_has_grown_and_weights_of_another_model(refused, tmp_path, capsys):
    """The flags that the messages name are the way on."""
    text = tmp_path / "input.txt"
    flags = [
        *TINY_FLAGS,
        f"--input_file={text}",
        "--tokenizer=bpe:300",
        f"--cache_dir={tmp_path.parent / 'cache'}",
    ]
    assert train.main([*flags, "--out_dir=run"]) == 0
    text.write_text(
        text.read_text(encoding="utf-8") + "More text, and more words.\n" * 20, encoding="utf-8"
    )
    capsys.readouterr()
    advice = (
        refused(*flags[-2:])
        .replace("\\", "/")
        .partition(" give ")[2]
        .partition(" and another --out_dir")[0]
    )
    assert advice == "--init_from run/checkpoints/last.pt --tokenizer run/tokenizer.json"
    assert train.main([*flags, *advice.split(), "--out_dir=more"]) == 0
    assert "Starting from the weights of run" in Path("more/logs/train.log").read_text(
        encoding="utf-8"
    )
    capsys.readouterr()

    other = ["--init_from=run/checkpoints/best.pt", "--n_layer=1", "--block_size=32"]
    message = refused(*other, out_dir="third").replace("\\", "/")
    assert (
        "best.pt is another model than these flags make (it was made with --preset gpt2 and --token"
        in message
    )
    advice = message.strip().partition(" give ")[2]
    assert advice == "--n_layer 2 --tokenizer run/tokenizer.json", "a longer one is fine"
    assert train.main([*flags, *other, *advice.split(), "--out_dir=third"]) == 0
    capsys.readouterr()
    Path("run/tokenizer.json").write_text("{}", encoding="utf-8")
    message = refused(other[0], out_dir="fourth")
    assert "give --tokenizer PATH.json, with the tokenizer.json of its run" in message

    assert train.main([*TINY_FLAGS, GPT2, f"--input_file={text}", "--out_dir=gpt2"]) == 0
    capsys.readouterr()
    message = refused(*flags[-2:], "--init_from=gpt2/checkpoints/best.pt", out_dir="fifth")
    assert message.strip().endswith(": give --tokenizer gpt2")


def test_weights_for_a_run_that_has_its_own(launch, capsys):
    assert launch("first", "--steps=2") == launch("second", "--steps=2", "--init_from=first") == 0
    assert launch("second", "--steps=4", "--init_from=first") == 0, "the same command goes on"
    assert launch("second", "--steps=6", "--init_from=second") == 2
    message = capsys.readouterr().err.replace("\\", "/")
    assert (
        "--init_from second is for a new run, and second/checkpoints/last.pt continues one: "
        "leave it out" in message
    )


def test_a_folder_of_another_program(refused, tmp_path):
    """Such as a model folder of Hugging Face's, which has a config.json too."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    assert "config.json was not written by train.py: choose another --out_dir" in refused()


@pytest.fixture(scope="session")
def reported_run(tmp_path_factory) -> Path:
    """A finished run and a README that fits it."""
    folder = tmp_path_factory.mktemp("reported")
    (folder / "input.txt").write_text(
        "The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8"
    )
    flags = [
        *TINY_FLAGS,
        GPT2,
        f"--input_file={folder / 'input.txt'}",
        f"--out_dir={folder / 'run'}",
        "--amp=off",
    ]
    assert train.main(flags) == 0
    (folder / "README.md").write_text(SECTIONS, encoding="utf-8")
    return folder


@pytest.fixture
def bad_report(reported_run, tmp_path, monkeypatch, capsys):
    """Damage a copy of the run or its README, require update_readme's refusal and an unchanged
    directory."""
    shutil.copytree(
        reported_run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")
    )
    shutil.copy(reported_run / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(path: str, content: bytes | None, *flags: str) -> str:
        if content is None:
            Path(path).unlink(missing_ok=True)
            Path(path).mkdir()
        else:
            Path(path).write_bytes(content)
        before = {
            p: p.is_file() and (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*")
        }
        assert update_readme.main(["--out_dir=run", "--readme=README.md", *flags]) == 2
        captured = capsys.readouterr()
        assert before == {
            p: p.is_file() and (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*")
        }
        assert (
            captured.out == ""
            and captured.err.startswith("update_readme.py: error: ")
            and len(captured.err) < 400
        )
        assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
        return captured.err

    return run


SECTIONS = "".join(
    f"<!--AUTO:{name}:START-->\n<!--AUTO:{name}:END-->\n" for name in update_readme.SECTIONS
)
START, END = "<!--AUTO:PLOT:START-->\n", "<!--AUTO:PLOT:END-->\n"
CSV, LOG, SAMPLES = "run/logs/train_metrics.csv", "run/logs/train.log", "run/samples/samples.txt"
DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("path", "content", "expected"),
    [
        (CSV, b"", "the first line names no columns step and loss"),
        (CSV, b"\n\n\n", "names no columns"),
        (CSV, b"1,10.9\n2,10.8\n", "names no columns"),
        (CSV, b"step;loss\n1;10\n", "names no columns"),
        (CSV, b"loss\n10\n", "names no columns"),
        (CSV, b"step,loss,loss\n1,2,3\n", "names no columns"),
        (CSV, "step,loss\n1,10\n".encode("utf-16"), "names no columns"),
        (CSV, b"PK\x03\x04\x00\xff", "names no columns"),
        (CSV, None, "there is no run (no run/logs/train_metrics.csv)"),
        (LOG, None, "train.log"),
        (SAMPLES, None, "samples.txt"),
        *(
            (f"run/{name}.json", content, expected)
            for name in ("config", "results")
            for content, expected in [
                (b"", "is not JSON"),
                (b"{", "is not JSON"),
                (b"[]", "holds no JSON object"),
                (b"3", "holds no JSON object"),
                (b"null", "holds no JSON object"),
                (b'{"a": 1,}', "is not JSON"),
                (b"\xff\xfe{", "is not JSON"),
                (DEEP, "is not JSON"),
                (b'{"a": 1} {', "is not JSON"),
                (None, name),
            ]
        ),
        ("README.md", b"", "no sections"),
        ("README.md", b"# Title\n", "no sections"),
        ("README.md", b"caf\xe9\n", "is not UTF-8: offset 3"),
        ("README.md", SECTIONS.encode("utf-16"), "is not UTF-8"),
        ("README.md", START.encode(), "README.md:1: PLOT starts here and never ends"),
        ("README.md", END.encode(), "README.md:1: PLOT ends without a start"),
        ("README.md", (END + START).encode(), "README.md:1: PLOT ends without"),
        ("README.md", (START + END + START + END).encode(), "README.md:3: a second section PLOT"),
        ("README.md", (START + START + END).encode(), "README.md:2: PLOT starts inside PLOT"),
        (
            "README.md",
            (START + END.replace("PLOT", "LOGS")).encode(),
            "README.md:2: LOGS ends inside PLOT",
        ),
        (
            "README.md",
            (START + END).replace("PLOT", "GRAPH").encode(),
            "README.md:1: unknown section GRAPH",
        ),
        ("README.md", (START + END).lower().encode(), "README.md:1: a marker must be exactly"),
        (
            "README.md",
            (START + END).replace("AUTO", " AUTO").encode(),
            "README.md:1: a marker must be exactly",
        ),
        ("README.md", ("see " + START + END).encode(), "README.md:2: PLOT ends without a start"),
        ("README.md", (START.strip() + END).encode(), "README.md:1: a marker must be exactly"),
        ("README.md", ("```\n" + START + END + "```\n").encode(), "no sections"),
        ("README.md", None, "README.md is a folder"),
    ],
)
def test_reports(bad_report, path, content, expected):
    assert expected in bad_report(path, content).replace("\\", "/")


@pytest.mark.skipif(os.name == "nt", reason="links need a right under Windows")
def test_a_readme_that_is_a_link_to_itself(bad_report):
    Path("circle.md").symlink_to("circle.md")
    said = bad_report("notes.txt", b"", "--readme=circle.md")
    assert "--readme circle.md is a link in a circle: name another file" in said


@pytest.mark.parametrize("path", [CSV, "run/config.json", "run/results.json", "README.md"])
def test_what_cannot_be_reported_is_not_called_stale(bad_report, path):
    """`--check` reads the same files, and has the same answer."""
    assert bad_report(path, b"\xff" * 99, "--check")


@pytest.mark.parametrize(
    "flags",
    [
        ["--out_dir=missing"],
        ["--readme=missing/new.md"],
        ["--out_dir=README.md"],
        ["--readme=run"],
        ["--out_dir=."],
    ],
)
def test_report_flags(bad_report, flags):
    message = bad_report("unrelated.txt", b"", *flags).replace("\\", "/")
    assert flags[0].partition("=")[2] in message


def test_a_report_needs_a_run(capsys):
    """The one flag without a default."""
    assert update_readme.main([]) == 2
    assert "--out_dir" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        (
            "train.py",
            ["--preset", "demo", "--resume", "bad.pt"],
            "bad.pt is damaged or no checkpoint",
        ),
        ("update_readme.py", ["--out_dir", ".", "--chek"], "--chek"),
    ],
)
def test_as_a_subprocess(tmp_path, script, flags, expected):
    (tmp_path / "bad.pt").write_bytes(b"\x80\x04\xff no checkpoint")
    result = run_script(*flags, cwd=tmp_path, script=script)
    assert result.returncode == 2 and result.stdout == "" and "Traceback" not in result.stderr
    assert (
        expected in " ".join(result.stderr.replace("│", "").split()) and len(result.stderr) < 1500
    )
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]
