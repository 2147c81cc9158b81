"""Runs stand side by side where they compare, best first, with the flags in which they differ; or
they are refused."""

import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest
from conftest import GPT2, ROOT, TINY_FLAGS
from markdown_it import MarkdownIt

import train
import update_readme
from parts.commandline import parse_config
from parts.report.comparison import REPORTING, Comparison, differing_flags, find_runs
from parts.report.reader import Run, outcome, read_run, validation

pytestmark = pytest.mark.xdist_group("compare")  # one worker trains the runs
COMPARE = "<!--AUTO:COMPARE:START-->\n<!--AUTO:COMPARE:END-->\n"
TEXTS = {
    "text.txt": "The quick brown fox jumps over the lazy dog. " * 40,
    "known.txt": "The quick brown fox jumps over the lazy dog. " * 20,
    "other.txt": "She sells sea shells by the sea shore, and that is sure. " * 40,
    "held_out.txt": "Peter Piper picked a peck of pickled peppers. " * 20,
}
RUNS = {  # name: what it adds to the tiny flags
    "lr-3e-2": ["--lr=3e-2"],
    "lr-1e-3": ["--lr=1e-3", "--log_every=3", "--num_prompts=0"],
    "words": ["--lr=3e-2", GPT2],
    "held_out": ["--lr=3e-2", "--val_file=held_out.txt", "--eval_every=4"],
    "other": ["--lr=3e-2", "--input_file=other.txt", "--val_file=held_out.txt", "--eval_every=4"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Real runs of the trainer, each of eight steps."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, text in TEXTS.items():
            Path(name).write_text(text, encoding="utf-8")
        for name, flags in RUNS.items():
            assert (
                train.main([*TINY_FLAGS, "--input_file=text.txt", f"--out_dir=out/{name}", *flags])
                == 0
            )
    return folder / "out"


@pytest.fixture
def out(trained, tmp_path, monkeypatch) -> Path:
    """Copies that a test may alter, in the working directory."""
    shutil.copytree(trained, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoints"))
    monkeypatch.chdir(tmp_path)
    return Path("out")


def update(*arguments: str | Path) -> int:
    return update_readme.main(list(map(str, arguments)))


def alter(path: Path, **values: object) -> None:
    """Change values of a JSON file."""
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8"
    )


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def test_the_lowest_corpus_loss_comes_first_and_runs_without_last(out):
    shutil.copytree(out / "lr-3e-2", out / "broken-off")
    alter(out / "broken-off" / "results.json", stop_reason="interrupted", corpus_loss=None)
    shutil.copytree(out / "lr-3e-2", out / "live")
    (out / "live" / "results.json").unlink()
    names = ["live", "lr-1e-3", "broken-off", "lr-3e-2"]
    table = Comparison.of([read_run(out / name) for name in names]).table()
    assert table[0] == ["run", "corpus loss, nats per token", "tokens", "time", "outcome", "lr"]
    assert [row[0] for row in table[1:]] == ["lr-3e-2", "lr-1e-3", "broken-off", "live"]
    first, second = (results(out / row[0]) for row in table[1:3])
    assert first["corpus_loss"] < second["corpus_loss"]
    assert table[1][1] == f"{first['corpus_loss']:.4f} ± {first['corpus_loss_standard_error']:.4f}"
    assert table[1][2] == f"{8 * 2 * 16}" and re.fullmatch(r"0:00:\d\d", table[1][3])
    assert [row[1] for row in table[3:]] == ["none: interrupted", "none: running"]
    assert [row[4:] for row in table[1:]] == [
        ["all steps done", "0.03"],
        ["all steps done", "0.001"],
        ["interrupted, to be continued", "0.03"],
        ["running, as of step 8", "0.03"],
    ]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (
            ["--lr=1e-3"],
            ["--lr=2e-3", "--log_every=5", "--out_dir=x", "--prompt=y", "--cache_dir=z"],
            ["lr"],
        ),
        (["--lr=1e-3"], ["--lr=2e-3", "--min_lr=1e-5"], ["lr", "min_lr"]),
        (["--steps=1000"], ["--steps=3000"], ["steps"]),
        (["--steps=1000"], ["--steps=3000", "--warmup_steps=7"], ["steps", "warmup_steps"]),
        (["--optimizer=muon"], ["--optimizer=adamw"], ["optimizer"]),
        (["--preset=small"], ["--preset=gpt2"], ["preset"]),
        (["--preset=small"], ["--preset=gpt2", "--n_head=16"], ["preset", "n_head"]),
        (["--micro_batch=1"], ["--micro_batch=2"], ["micro_batch"]),
        (
            ["--micro_batch=1", "--batch_size=8"],
            ["--micro_batch=2", "--batch_size=16"],
            ["batch_size", "micro_batch"],
        ),
        ([], ["--steps=1465", "--lr=3.5e-3"], []),
        (["--seed=1"], ["--seed=1"], []),
    ],
)
def test_only_flags_that_differ_and_say_something_new(first, second, expected):
    empty = Run(Path("run"), pd.DataFrame(), {}, {}, "", [], "gpt2")
    configs = [parse_config(flags) for flags in (first, second)]
    kept = [{"config": c.as_dict(), "origins": c.origins_as_dict()} for c in configs]
    runs = [replace(empty, config=config) for config in kept]
    assert differing_flags(runs, REPORTING) == expected


@pytest.mark.slow
def test_a_flag_that_changed_shows_its_values_one_after_the_other(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained.parent)
    where = tmp_path / "changed"
    flags = [
        *TINY_FLAGS,
        "--input_file=text.txt",
        f"--out_dir={where}",
        "--warmup_steps=0",
        "--decay_steps=8",
    ]
    assert train.main([*flags, "--lr=0.006"]) == 0
    assert (
        train.main([*flags, "--lr=0.3", "--steps=12", "--prompt=x, --seed 1 -> 2", "--dropout=0.1"])
        == 0
    )
    assert train.main([*flags, "--lr=0.3", "--steps=16", "--prompt=y"]) == 0
    run = read_run(where)
    assert [flags["lr"] for flags in run.flags_over_time] == [0.006, 0.3, 0.3]
    at_once = replace(run, out_dir=tmp_path / "once", config=run.config | {"launches": []})
    header, *rows = Comparison.of([run, at_once]).table()
    assert header[5:] == ["dropout", "steps", "lr"], "min_lr follows"
    assert {row[0]: row[5:] for row in rows} == {
        "changed": ["0, then 0.1", "8, then 12, then 16", "0.006, then 0.3"],
        "once": ["0.1", "16", "0.3"],
    }


def test_on_a_terminal_the_table_is_plain_and_the_plot_lies_beside_the_runs(out, capsys, plots):
    Path("README.md").write_text(COMPARE, encoding="utf-8")
    assert update("--out_dir", out / "lr-1e-3", out / "lr-3e-2") == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert (
        lines[-1] == f"Plot: {out / 'compare.png'}"
        and (out / "compare.png").stat().st_size > 10_000
    )
    assert [line.split()[0] for line in lines[:3]] == [
        "run",
        "lr-3e-2",
        "lr-1e-3",
    ] and "|" not in text
    for heading in ("corpus loss", "outcome"):
        start = lines[0].index(heading)
        assert all(line[start] != " " and line[start - 1] == " " for line in lines[:3]), heading
    assert lines[0].endswith("     lr") and len(lines[0]) == len(lines[1]) == len(lines[2]), (
        "numbers to the right"
    )
    assert Path("README.md").read_text(encoding="utf-8") == COMPARE
    assert update("--out_dir", "out/lr-*", "out/lr-3e-2") == 0, (
        "a glob that no shell has expanded, and a run twice"
    )
    assert capsys.readouterr().out == text


def test_the_plot_of_runs_from_elsewhere_lies_in_the_current_folder(
    out, tmp_path_factory, capsys, monkeypatch, plots
):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "run"
    shutil.copytree(out / "lr-1e-3", elsewhere)
    assert update("--out_dir", elsewhere, out / "lr-3e-2") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Plot: compare.png"
    assert Path("compare.png").stat().st_size > 10_000 and not (out / "compare.png").exists()
    shutil.copytree(elsewhere, elsewhere.with_name("other"))
    Path("compare.png").unlink()
    assert update("--out_dir", elsewhere, elsewhere.with_name("other")) == 0, (
        "in one folder, but not below this one"
    )
    assert Path("compare.png").exists() and not elsewhere.with_name("compare.png").exists()


def test_a_plot_that_cannot_be_written_is_one_line_with_the_remedy(out, capsys, plots):
    (out / "compare.png").mkdir()
    assert update("--out_dir", "out/lr-*") == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and str((out / "compare.png").absolute()) in captured.err
    assert "cannot be written" in captured.err and "cd to a folder" in captured.err
    assert captured.out.startswith("run ") and "Plot:" not in captured.out
    assert [path.name for path in out.iterdir() if path.name.endswith(".tmp")] == []


@pytest.mark.skipif(os.name == "nt", reason="a link takes a right there that few have")
def test_a_run_with_two_names_is_one_row(out):
    (out / "linked").symlink_to((out / "lr-1e-3").absolute(), target_is_directory=True)
    found = find_runs((out / "linked", out / "lr-1e-3", out / "lr-3e-2"))
    rows = Comparison.of([read_run(path) for path in found]).table()[1:]
    assert {row[0] for row in rows} == {"lr-1e-3", "lr-3e-2"} and len(rows) == 2


def test_a_glob_finds_runs_alone_and_a_name_must_be_there(out, capsys):
    (out / "notes").mkdir()
    (out / "compare.png").write_bytes(b"of the last time")
    assert find_runs((out / "*",)) == [out / name for name in sorted(RUNS)]
    assert find_runs((out / "lr-1e-3", out / "compare.png")) == [out / "lr-1e-3"], (
        "as a shell expands out/*"
    )
    for arguments, expected in [
        (["out/sl-*"], "out/sl-*: no run directory matches"),
        (["out/lr-1e-3", "out/lr-2e-3"], "out/lr-2e-3: there is no such directory"),
        (["out/lr-1e-3", "out/notes"], "there is no run (no out/notes/logs/train_metrics.csv)"),
    ]:
        assert update("--out_dir", *arguments) == 2
        captured = capsys.readouterr()
        assert (
            expected in captured.err.replace("\\", "/")
            and captured.out == ""
            and captured.err.count("\n") == 1
        )


def test_different_texts_are_refused(out, capsys, plots):
    readme = Path("README.md")
    readme.write_text(COMPARE, encoding="utf-8")
    before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    assert update("--out_dir", out / "lr-3e-2", out / "other", "--readme", readme) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and len(captured.err) < 400
    shas = [
        json.loads((out / name / "config.json").read_bytes())["corpus"]["sha256"]
        for name in ("lr-3e-2", "other")
    ]
    for part in (
        "lr-3e-2 and other learned different texts",
        "text.txt",
        "other.txt",
        *(sha[:12] for sha in shas),
    ):
        assert part in captured.err
    assert before == {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    part = read_run(out / "lr-1e-3").flags | {"max_tokens": 99}
    alter(out / "lr-1e-3" / "config.json", config=part)
    assert update("--out_dir", out / "lr-1e-3", out / "lr-3e-2") == 2, (
        "a part of the same text is another text"
    )
    (out / "words" / "config.json").unlink()
    assert update("--out_dir", out / "words", out / "lr-3e-2") == 2
    assert "words: no config.json says which text" in capsys.readouterr().err


def test_two_vocabularies_compare_in_bits_per_byte(out, capsys):
    comparison = Comparison.of([read_run(out / "lr-3e-2"), read_run(out / "words")])
    table = comparison.table()
    assert table[0][1] == "corpus loss, bits per byte" and table[0][5:] == ["tokenizer"]
    measured = {name: results(out / name) for name in ("lr-3e-2", "words")}
    expected = sorted(measured, key=lambda name: measured[name]["bits_per_byte"])
    assert (
        [row[0] for row in table[1:]]
        == expected
        != sorted(measured, key=lambda n: measured[n]["corpus_loss"])
    )
    for row in table[1:]:
        of_run = measured[row[0]]
        error = (
            of_run["corpus_loss_standard_error"] * of_run["bits_per_byte"] / of_run["corpus_loss"]
        )
        assert row[1] == f"{of_run['bits_per_byte']:.4f} ± {error:.4f}"
    assert "Losses are in bits per byte, because the vocabularies differ." in comparison.text()
    axis = update_readme.comparison_figure(comparison).axes[0]
    assert "bits per byte" in axis.get_ylabel()
    for name, line in zip(comparison.runs, axis.lines, strict=True):
        assert (
            line.get_ydata().tolist()
            == read_run(out / name).metrics["bits_per_byte"].dropna().tolist()
        )
    for name in measured:
        config = json.loads((out / name / "config.json").read_bytes())["config"]
        alter(out / name / "config.json", config=config | {"max_tokens": 200})
    assert update("--out_dir", out / "lr-3e-2", out / "words") == 2, (
        "200 tokens of each are two texts"
    )
    assert "200" not in capsys.readouterr().out


def test_validation_losses_order_the_runs_where_all_have_one(out):
    held_out, other = read_run(out / "held_out"), read_run(out / "other")
    sha256 = hashlib.sha256(TEXTS["held_out.txt"].encode()).hexdigest()
    assert held_out.corpus["val_sha256"] == other.corpus["val_sha256"] == sha256
    comparison = Comparison.of([held_out, other])
    table = comparison.table()
    assert table[0][1] == "lowest validation loss, nats per token" and table[0][5:] == [
        "input_file"
    ]
    lowest = {name: results(out / name) for name in ("held_out", "other")}
    assert [row[:2] for row in table[1:]] == [
        [
            name,
            "{best_loss:.4f} ± {best_loss_standard_error:.4f} at step {best_step}".format(
                **lowest[name]
            ),
        ]
        for name in sorted(lowest, key=lambda name: lowest[name]["best_loss"])
    ]
    assert comparison.notes == [
        "held_out and other learned different texts: only validation losses compare."
    ]
    figure = update_readme.comparison_figure(comparison)
    assert figure.legends[0].get_title().get_text() == "by lowest validation loss, the best first"
    lines = figure.axes[0].lines
    assert [line.get_linestyle() for line in lines] == ["--", "--"], (
        "their training losses do not compare"
    )
    mixed = Comparison.of([held_out, read_run(out / "lr-3e-2")])
    assert mixed.table()[0][1:] == ["corpus loss, nats per token", "tokens", "time", "outcome"]
    assert mixed.notes == ["Not by validation loss: lr-3e-2 has none."]
    lines = update_readme.comparison_figure(mixed).axes[0].lines
    assert sorted(line.get_linestyle() for line in lines) == ["-", "-", "--"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["--val_file=known.txt"], ["--val_file=held_out.txt"]),
        (
            ["--val_file=held_out.txt", "--seq_len=16"],
            ["--val_file=held_out.txt", "--seq_len=4", "--lr=1", "--min_lr=1"],
        ),
    ],
)
def test_of_a_run_continued_with_another_validation_only_what_was_measured_since_counts(
    trained, tmp_path, monkeypatch, before, after
):
    monkeypatch.chdir(trained.parent)
    where = tmp_path / "changed"
    flags = [
        *TINY_FLAGS,
        "--input_file=text.txt",
        "--lr=3e-2",
        "--eval_every=2",
        f"--out_dir={where}",
    ]
    assert train.main([*flags, *before]) == 0
    assert train.main([*flags, *after, "--steps=14", "--decay_steps=8", "--warmup_steps=0"]) == 0
    run, best = read_run(where), results(where)
    losses = run.metrics.set_index("step")["val_loss"].dropna()
    assert losses.loc[:8].min() < best["best_loss"] and best["best_step"] > 8, "or nothing is shown"
    for stands in (best, best | {"best_step": 8, "best_loss": losses[8], "final_step": 8}):
        alter(
            where / "results.json", **stands
        )  # the second: as the first part left it, until the next save
        comparison = Comparison.of([read_run(where), read_run(trained / "held_out")])
        row = next(row for row in comparison.table() if row[0].endswith("changed"))
        known = f" ± {best['best_loss_standard_error']:.4f}" if stands is best else ""
        assert row[1] == f"{losses.loc[9:].min():.4f}{known} at step {losses.loc[9:].idxmin():.0f}"
        drawn = update_readme.curves(comparison, read_run(where))["--"]
        assert drawn["loss"].tolist() == losses.loc[9:].tolist()


@pytest.mark.slow
def test_a_start_takes_back_what_changed_behind_its_checkpoint(
    trained, tmp_path, monkeypatch, before_step
):
    """A run continued with another validation text, killed before its first save, and continued
    without that text."""

    def killed():
        raise KeyboardInterrupt

    monkeypatch.chdir(trained.parent)
    where = tmp_path / "run"
    flags = [
        *TINY_FLAGS,
        "--input_file=text.txt",
        "--eval_every=2",
        f"--out_dir={where}",
        "--decay_steps=8",
    ]
    assert train.main([*flags, "--val_file=held_out.txt"]) == 0
    before_step({11: killed})
    assert train.main([*flags, "--val_file=other.txt", "--steps=12", "--save_every=20"]) == 130
    sha256 = hashlib.sha256(TEXTS["held_out.txt"].encode()).hexdigest()
    changed = json.loads((where / "config.json").read_bytes())["launches"][1]["changed"]
    assert changed == {
        "steps": 8,
        "save_every": 4,
        "val_file": ["held_out.txt"],
        "val_sha256": sha256,
    }
    assert validation(read_run(where))["step"].tolist() == [10]
    assert train.main([*flags, "--val_file=held_out.txt", "--steps=12"]) == 0
    assert validation(read_run(where))["step"].tolist() == [2, 4, 6, 8, 10, 12]


def test_a_readme_is_filled_in_its_section_compare_alone(out, capsys, plots):
    readme = Path("README.md")
    sections = "".join(
        f"<!--AUTO:{name}:START-->\nold\n<!--AUTO:{name}:END-->\n"
        for name in update_readme.SECTIONS
    )
    readme.write_text(f"# Runs\n{sections}{COMPARE}the end", encoding="utf-8", newline="\n")
    command = ["--out_dir", "out/lr-*", "--readme", readme]
    assert update(*command, "--check") == 1
    assert (
        "+![2 runs compared](compare.png)" in capsys.readouterr().out
        and not Path("compare.png").exists()
    )
    assert update(*command) == 0
    text, plot = readme.read_bytes(), Path("compare.png").read_bytes()
    before, _, after = text.decode().partition("<!--AUTO:COMPARE:START-->\n")
    content, _, end = after.partition("<!--AUTO:COMPARE:END-->\n")
    assert before == f"# Runs\n{sections}" and end == "the end"
    rows = [line for line in content.splitlines() if line.startswith("|")]
    assert (
        len(rows) == 4
        and rows[2].startswith("| lr-3e-2 | ")
        and {row.count("|") for row in rows} == {7}
    )
    assert update(*command, "--check") == 0
    assert update("--out_dir", out / "lr-3e-2", out / "lr-1e-3", "--readme", readme) == 0, (
        "in any order"
    )
    assert readme.read_bytes() == text and Path("compare.png").read_bytes() == plot
    assert update("--out_dir", out / "lr-3e-2", "--readme", readme) == 0
    filled = readme.read_text(encoding="utf-8")
    assert content in filled and "old" not in filled, "one run fills all but COMPARE"
    alter(out / "lr-3e-2" / "results.json", corpus_loss=99.0)
    assert update(*command, "--check") == 1


@pytest.mark.skipif(os.name == "nt", reason="there, no such names")
def test_names_stay_apart_in_a_table_and_are_shown_as_they_are(out):
    """Rendered as GitHub does it: CommonMark with tables."""
    names = [
        "a|b",
        "a\nb",
        "a?b",
        "a\\nb",
        "a<b>",
        "a`*b*`",
        "_a_",
        "<!--AUTO:COMPARE:END-->",
        "日本 & &amp;",
    ]
    for name in names:
        shutil.copytree(out / "lr-3e-2", out / "runs" / name)
    readme = Path("README.md")
    readme.write_text(COMPARE, encoding="utf-8")
    assert update("--out_dir", "out/runs/*", "--readme", readme) == 0
    assert update("--out_dir", "out/runs/*", "--readme", readme, "--check") == 0
    parser = MarkdownIt("commonmark").enable("table")
    html_rows = re.findall(
        r"<tr>\n<td>(.*)</td>", parser.render(readme.read_text(encoding="utf-8"))
    )
    shown = ["a\\nb" if name == "a\nb" else name.replace("\\", "\\\\") for name in names]
    assert sorted(html.unescape(cell) for cell in html_rows if "<" not in cell) == sorted(shown)
    terminal = Comparison.of(list(map(read_run, find_runs((out / "runs" / "*",))))).text()
    assert {line.split("  ")[0].strip() for line in terminal.splitlines()[1:]} == set(shown)


def test_each_readme_has_a_plot_of_its_own_beside_the_file_that_is_written(out, plots):
    (folder := Path("docs")).mkdir()
    files = [Path("README.md"), Path("A.md"), Path("A.markdown"), folder / "b c.md"]
    for file in files:
        file.write_text(COMPARE, encoding="utf-8")
    if os.name != "nt":  # where it takes a right that few have
        Path("link.md").symlink_to(files[-1])
        files[-1] = Path("link.md")
    drawn = []
    compared = ["lr-*", "held_out words", "lr-3e-2 words", "lr-1e-3 words"]
    for readme, runs in zip(files, compared, strict=True):
        assert update("--out_dir", *(out / run for run in runs.split()), "--readme", readme) == 0
        (image,) = re.findall(r"!\[.*\]\((.*)\)", readme.read_text(encoding="utf-8"))
        drawn.append(readme.resolve().parent / unquote(image))
    names = ["compare.png", "compare-A.png", "compare-A.markdown.png", "docs/compare-b c.png"]
    assert drawn == [Path(name).resolve() for name in names]
    assert len({path.read_bytes() for path in drawn}) == 4 and not Path("compare-link.png").exists()


def test_a_readme_without_the_section_is_refused(out, capsys, plots):
    Path("README.md").write_text(
        "<!--AUTO:SUMMARY:START-->\n<!--AUTO:SUMMARY:END-->\n", encoding="utf-8"
    )
    assert update("--out_dir", "out/lr-*", "--readme", "README.md") == 2
    error = capsys.readouterr().err
    assert "put <!--AUTO:COMPARE:START--> and <!--AUTO:COMPARE:END--> on two lines" in error
    assert not Path("compare.png").exists()
    assert update("--out_dir", "out/lr-*", "--check") == 2
    assert "name it with --readme" in capsys.readouterr().err


@pytest.mark.parametrize("count", [2, 8, 9, 12])
def test_the_plot_has_a_line_for_each_run_in_the_tables_order(out, count):
    run = read_run(out / "lr-3e-2")
    runs = [
        replace(run, out_dir=Path(f"out/r{i}"), results=run.results | {"corpus_loss": 20.0 - i})
        for i in range(count)
    ]
    comparison = Comparison.of(runs)
    figure = update_readme.comparison_figure(comparison)
    axis = figure.axes[0]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert (
        names
        == [row[0] for row in comparison.table()[1:]]
        == [f"r{i}" for i in reversed(range(count))]
    )
    assert len(axis.lines) == count and axis.get_yscale() == "log"
    assert len({(line.get_color(), line.get_marker()) for line in axis.lines}) == count
    drawn = run.metrics.dropna(subset=["window_loss"])
    assert axis.get_xlabel() == "tokens trained"
    assert axis.lines[0].get_xdata().tolist() == drawn["tokens"].tolist()
    assert axis.lines[0].get_ydata().tolist() == drawn["window_loss"].tolist()


@pytest.mark.parametrize(
    "values",
    [
        {"corpus": 3},
        {"corpus": {"sha256": []}},
        {"config": 5},
        {"config": {"preset": [], "lr": "|", "steps": {}}},
        {"config": {"tokenizer": "x\n", "max_tokens": "y", "val_file": 7, "seed": None}},
        {"corpus": {"sha256": "|`<!--AUTO:COMPARE:END-->\n", "tokens": "z", "file": None}},
    ],
)
def test_a_config_of_any_type_is_shown_or_refused(out, values, capsys, plots):
    alter(out / "lr-3e-2" / "config.json", **values)
    readme = Path("README.md")
    readme.write_text(COMPARE, encoding="utf-8")
    code = update("--out_dir", "out/lr-*", "--readme", readme)
    captured = capsys.readouterr()
    if code == 2:
        assert captured.err.count("\n") == 1 and readme.read_text(encoding="utf-8") == COMPARE
    else:
        rows = [
            line for line in readme.read_text(encoding="utf-8").splitlines() if line.startswith("|")
        ]
        assert (
            code == 0
            and len(rows) == 4
            and len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
        )


def test_how_a_run_stands(out):
    """Running before its first save, between saves, and when a finished run goes on; then steps
    without a target."""
    run = read_run(out / "lr-3e-2")
    started, saved = (
        replace(run, results={}),
        run.results | {"stop_reason": "running", "final_step": 4},
    )
    assert (
        outcome(replace(started, metrics=run.metrics.iloc[:0])) == "running, before its first row"
    )
    assert outcome(started) == outcome(replace(run, results=saved)) == "running, as of step 8"
    assert outcome(replace(run, results=run.results | {"final_step": 6})) == "running, as of step 8"
    assert outcome(replace(started, config={})) == "unknown", "a CSV alone"
    assert outcome(run) == "all steps done"
    assert "| target | none |" in update_readme.summary_section(run, Path("README.md"))
    aimed = replace(run, results=run.results | {"target_loss": 0.1})
    assert outcome(aimed) == "all steps done, target not reached"
    found = run.results
    summary = update_readme.summary_section(aimed, Path("README.md"))
    assert "| target | 0.1 |" in summary
    assert f"| window_loss | {found['window_loss']:.6f} (mean of the last 3 steps) |" in summary
    assert f"| corpus loss | {found['corpus_loss']:.6f} ± " in summary


@pytest.mark.parametrize(
    ("corpus_loss", "words"),
    [
        (0.106, "target reached by window_loss alone"),
        (0.1, "target reached"),
        (None, "target reached"),
    ],
)
def test_a_target_that_random_slices_did_not_confirm_is_not_called_reached(out, corpus_loss, words):
    """As of a run by the classic rule, or by a train.py that looked at window_loss only."""
    run = read_run(out / "lr-3e-2")
    results = {"stop_reason": "target", "target_loss": 0.1, "corpus_loss": corpus_loss}
    assert outcome(replace(run, results=run.results | results)) == words


def test_a_reached_target_is_told_with_both_losses(out):
    run = read_run(out / "lr-3e-2")
    results = {
        "stop_reason": "target",
        "target_loss": 0.1,
        "corpus_loss": 0.098,
        "window_loss": 0.0951,
    }
    reached = replace(run, results=run.results | results)
    header, *rows = Comparison.of([reached, read_run(out / "lr-1e-3")]).table()
    (row,) = (row for row in rows if row[0] == "lr-3e-2")
    assert (
        row[1].startswith("0.0980")
        and row[header.index("outcome")] == "target reached (window_loss 0.0951)"
    )


@pytest.mark.slow
def test_it_needs_no_pytorch(out):
    """The script as its user starts it, where PyTorch cannot be imported."""
    broken = out.absolute() / "packages"
    broken.mkdir()
    (broken / "torch.py").write_text(
        "raise ModuleNotFoundError('No module named torch')\n", encoding="utf-8"
    )
    # Jupyter's backend is inherited by what it starts, and may not be installed there.
    environment = os.environ | {"PYTHONPATH": str(broken), "MPLBACKEND": "not_here"}
    asked = [str(ROOT / "update_readme.py"), "--out_dir", "out/lr-3e-2", "out/lr-1e-3"]
    results = [
        subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=400,
        )
        for arguments in (["-c", "import torch"], asked)
    ]
    assert results[0].returncode == 1, "it must be missing"
    assert results[1].returncode == 0 and "lr-1e-3" in results[1].stdout and results[1].stderr == ""
    assert (out / "compare.png").exists()


def test_the_loops_of_the_guide_train_the_same_runs():
    guide = (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8")
    bash, powershell = (
        re.search(rf"```{language}\n(.*?)```", guide, re.DOTALL)[1]
        for language in ("bash", "powershell")
    )
    rates = [re.findall(r"\d+e-\d", loop) for loop in (bash, powershell)]
    assert rates[0] == rates[1] and len(rates[0]) == 5
    for loop in (bash, powershell):
        (flags,) = re.findall(r"train\.py (.*?)(?:;|$| })", loop, re.MULTILINE)
        configs = [
            parse_config(flags.replace('"', "").replace("$lr", rate).split()) for rate in rates[0]
        ]
        assert [config.out_dir for config in configs] == [
            Path("out") / f"lr-{rate}" for rate in rates[0]
        ]
        assert [config.lr for config in configs] == [float(rate) for rate in rates[0]]
        assert {(config.preset, config.device) for config in configs} == {("demo", "auto")}
        assert re.search(r'update_readme\.py --out_dir "?out/lr-\*', loop)
