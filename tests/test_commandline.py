"""Flags as typed: found under their names, explained in groups, and each mistake answered in a
line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GPT2, ROOT, TINY_FLAGS

import export_hf
import sample
import train
import update_readme
from parts.commandline import OTHER_NAMES, parse_config
from parts.flags import PRESETS, Config


def complaint(*argv: str) -> str:
    with pytest.raises(ValueError) as refused:
        parse_config(list(argv))
    return str(refused.value)


@pytest.mark.parametrize("here", OTHER_NAMES)
def test_the_names_of_other_programs_are_known(here):
    assert here in Config.__dataclass_fields__
    for name in OTHER_NAMES[here].split():
        for typed in (f"--{name}", f"--{name.replace('_', '-')}=5"):
            assert complaint(typed).startswith(f"--{name} is called --{here} here")
    assert complaint("--num_epochs=3").endswith("as many steps as the log calls a pseudo-epoch")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--preset", "smal"], ["--preset: ", "'smal'", "'small'"]),
        (["--stepz=3"], ["there is no flag --stepz", "--steps?"]),
        (["--steps"], ["--steps: ", "expected"]),
        (["--steps", "many"], ["--steps: ", "int", "'many'"]),
        (["--micro_batch=1.5"], ["--micro_batch: ", "int", "'1.5'"]),
        (["--lr", "small"], ["--lr: ", "float", "'small'"]),
        (["book.txt"], ["book.txt belongs to no flag", "--input_file"]),
        (["--deterministic", "yes"], ["yes belongs to no flag"]),
        (["--deterministic=yes"], ["--deterministic: ", "'yes'"]),
        (["--dry-run="], ["--dry_run: ", "''"]),
        (["--no_such_thing"], ["there is no flag --no_such_thing"]),
        (["--steps="], ["--steps: ", "int", "''"]),
        (["--steps", "9" * 5000], ["--steps: ", "int", "9" * 40]),
        (["x" * 5000], [f"{'x' * 40}... belongs to no flag"]),
        ([""], ["'' belongs to no flag"]),
        (["--dry_run", ""], ["'' belongs to no flag"]),
    ],
)
def test_a_mistake_is_answered_in_one_line(argv, expected):
    """It names the flag, the value, and what the flag takes."""
    message = complaint(*argv)
    assert all(words in message for words in expected), message
    assert message.count("train.py --help") == 1 and "\n" not in message


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--steps=" + "9" * 4000, f"--steps {'9' * 40}... is outside 1 to 1,000,000,000"),
        ("--out_dir=", "--out_dir is empty or the current folder: name another path"),
    ],
    ids=lambda value: value[:20],
)
def test_a_value_that_cannot_be(argument, expected):
    message = complaint(argument)
    assert message.startswith(expected) and "\n" not in message and len(message) < 200


def test_a_name_that_the_disk_refuses_is_answered_in_one_line(text_file, capsys):
    flags = [*TINY_FLAGS, GPT2, f"--input_file={text_file}", "--out_dir=out/" + "x" * 300]
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert "xxx" in error and error.count("\n") == 1


@pytest.mark.parametrize("program", [train, sample, export_hf, update_readme])
def test_all_scripts_answer_in_the_same_style(program, capsys):
    name = Path(program.__file__).name
    assert program.main(["--no_such_flag"]) == 2
    assert capsys.readouterr() == (
        "",
        f"{name}: error: there is no flag --no_such_flag: {name} --help lists every flag\n",
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_help_shows_the_groups_and_the_presets_defaults(preset, capsys):
    assert train.main(["--preset", preset, "--help"]) == 0
    lines, config = capsys.readouterr().out.splitlines(), parse_config(["--preset", preset])
    groups = [
        "Text",
        "Run",
        "Model",
        "Batch",
        "Optimizer",
        "Stopping",
        "Validation",
        "Device",
        "Reporting",
    ]
    assert [line[:-1] for line in lines if re.fullmatch(r"\w+:", line)] == ["options", *groups]
    entries = [" ".join(entry.split()) for entry in "\n".join(lines).split("\n  --")]
    said = {name: getattr(config, name) for name in ("preset", "lr", "out_dir")}
    said |= {
        "steps": "follows from the text",
        "decay_steps": "the last step",
        "mixed_steps": "80 % of the steps",
    }
    for name, default in said.items():
        (entry,) = (entry for entry in entries if entry.startswith(f"{name} "))
        assert f"(default: {default})" in entry


@pytest.mark.slow
def test_a_reader_of_the_help_may_leave_early():
    """As `train.py --help | head` does."""
    code = (
        "import sys, train; sys.stdout.reconfigure(write_through=True); "
        "sys.exit(train.main(['--help']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "out/gpt2"),
        (["--input_file=data/input.txt"], "out/gpt2"),
        (["--preset=demo"], "out/demo"),
        (["--preset=demo", "--input_file=data/input.txt"], "out/demo-input"),
        (["--input_file=my books/War & Peace.txt"], "out/gpt2-War-Peace"),
        (["--input_file", "books/*.txt", "more.txt", "--preset=small"], "out/small-books"),
        (["--input_file=books"], "out/gpt2-books"),
        (["--input_file=*.txt"], "out/gpt2-text"),
        (["--input_file=book.txt", "--out_dir=here"], "here"),
    ],
)
def test_each_text_has_a_directory_of_its_own(flags, expected):
    assert parse_config(flags).out_dir == Path(expected)


def test_a_dry_run_tells_and_writes_nothing(tmp_path, text_file, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*TINY_FLAGS, GPT2, f"--input_file={text_file}", "--out_dir=run"]
    before = sorted(tmp_path.rglob("*"))
    assert train.main([*flags, "--dry_run"]) == 0
    said = capsys.readouterr().out
    for line in (
        "Run directory: run",
        "Plan: 8 steps",
        "Time: ",
        "Disk: 0.07 GB at most in run",
        "Dry run: no file",
    ):
        assert f" | {line}" in said
    assert said.index("| Measuring two steps ...\n") < said.index("| Time: ")
    assert re.search(r" for 8 steps at most: begun now, they end by [A-Z]\w\w \d\d:\d\d\n", said)
    assert sorted(tmp_path.rglob("*")) == before
    assert train.main(flags) == 0
    files = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert train.main([*flags, "--dry_run", "--tensorboard"]) == 0, "of a run that is over"
    assert train.main([*flags, "--dry_run", "--steps=12"]) == 0, "of a run that goes on"
    said = capsys.readouterr().out
    assert "Plan: 12 steps" in said
    assert " for the 4 steps that are left of 12 at most: begun now, " in said
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == files
