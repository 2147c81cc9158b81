"""Every word to the user goes through one place from the first line on: short on the screen, whole
in train.log."""

import os
import re
from pathlib import Path

from conftest import TINY_FLAGS, log_text, without_date

import export_hf
import sample
import train
import update_readme
from parts.run.screen import log


def test_what_is_said_before_the_run_has_a_directory_is_said_like_all_else(
    tmp_path, monkeypatch, capsys
):
    """Here that the text has changed; on the screen, and in the log of the run that comes of it."""
    monkeypatch.chdir(tmp_path)
    Path("books").mkdir()
    handlers = list(log.handlers)
    flags = [*TINY_FLAGS, "--input_file=books", "--cache_dir=cache", "--steps=4"]
    for number, name in enumerate(("first", "second")):
        Path("books/one.txt").write_text(f"{number}: the quick brown fox. " * 50, encoding="utf-8")
        os.utime("books/one.txt", (1e9 + number, 1e9 + number))
        capsys.readouterr()
        assert train.main([*flags, f"--out_dir={name}"]) == 0
    shown, said = capsys.readouterr()
    assert said == ""
    (line,) = (line for line in shown.splitlines() if "anew" in line)
    assert re.fullmatch(r"\d\d:\d\d:\d\d \| WARNING \| .+; encoding the text anew", line)
    lines = log_text(Path("second")).splitlines()
    assert shown.splitlines() == [without_date(line) for line in lines]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \| WARNING \| .+ anew", lines[0])
    assert log.handlers == handlers, "all are taken away again"


def test_other_scripts_name_themselves_and_warn_on_stderr(monkeypatch, capsys):
    def warning(*_arguments) -> None:
        log.warning("the disk is slow")
        raise ValueError("one thing\nand another")

    for script in (sample, export_hf, update_readme):
        monkeypatch.setattr(script, "read_flags", warning)
        assert script.main([]) == 2
        start = f"{script.__name__}.py: "
        expected = (
            f"{start}warning: the disk is slow\n{start}error: one thing\n{start}error: and "
            f"another\n"
        )
        assert capsys.readouterr() == ("", expected)
