"""The README updater fills what is marked, the same way each time, and touches nothing else."""

import html
import json
import os
import re
import shlex
import shutil
import subprocess
import warnings
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from conftest import TINY_FLAGS, rows
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib import font_manager

import train
import update_readme
from parts.commandline import decode_escapes, parse_config
from parts.report.comparison import Comparison
from parts.report.reader import read_metrics, read_run
from parts.report.sections import INVISIBLE, filled, preformatted

ALL = "".join(
    f"## {n}\n\n<!--AUTO:{n}:START-->\n<!--AUTO:{n}:END-->\n\n" for n in update_readme.SECTIONS
)
HEADER = "step,loss,lr,tokens_per_sec,elapsed_sec\n"


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A real run of the trainer."""
    folder = tmp_path_factory.mktemp("readme")
    text = folder / "input.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    assert (
        train.main(
            [*TINY_FLAGS, "--input_file", str(text), "--out_dir", str(folder / "out" / "run")]
        )
        == 0
    )
    return folder / "out" / "run"


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy that a test may damage, beside a README to fill."""
    return Path(shutil.copytree(finished_run, tmp_path / "out" / "run"))


@pytest.fixture
def partial_run(tmp_path) -> Path:
    """A directory with the old five-column CSV alone."""
    logs = tmp_path / "out" / "old" / "logs"
    logs.mkdir(parents=True)
    (logs / "train_metrics.csv").write_text(
        HEADER + "1,10.9,3e-4,100,1\n50,6.5,3e-4,110,50\n", encoding="utf-8"
    )
    return logs.parent


def update(run: Path, readme: Path, *flags: str) -> int:
    return update_readme.main(["--out_dir", str(run), "--readme", str(readme), *flags])


def section(text: str, name: str) -> str:
    return text.split(f"<!--AUTO:{name}:START-->\n")[1].split(f"<!--AUTO:{name}:END-->")[0]


def test_a_file_that_is_not_there_is_made_with_all_sections(run, tmp_path, capsys):
    readme = tmp_path / "new.md"
    assert update(run, readme, "--check") == 1 and not readme.exists()
    assert "+<!--AUTO:PLOT:START-->" in capsys.readouterr().out
    assert update(run, readme) == 0 and f"{readme}: made from {run}" in capsys.readouterr().out
    text = readme.read_text(encoding="utf-8")
    assert re.findall(r"AUTO:(\w+):START", text) == list(update_readme.SECTIONS)
    assert "\n# " not in text and all(
        section(text, name).strip() for name in update_readme.SECTIONS
    )
    assert update(run, readme, "--check") == 0, "it is what a second start would write"


@pytest.mark.slow
def test_the_command_with_every_flag_gives_the_same_run(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(ALL, encoding="utf-8")
    assert update_readme.main(["--out_dir", str(finished_run), "--readme", str(readme)]) == 0
    shown = html.unescape(section(readme.read_text(encoding="utf-8"), "REPRO"))
    (command,) = (line for line in shown.splitlines() if line.startswith("python train.py --"))
    words = shlex.split(command)[2:]
    assert (
        "--target_loss" in words
        and "--lr" in words
        and len([word for word in words if word[:2] == "--"]) > 40
    )
    assert train.main(words) == 0
    assert rows(Path("out/again")) == rows(finished_run)


def test_a_run_whose_rate_was_changed_is_repeated_by_no_one_command(run):
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    same, other = (
        "The same with every flag",
        "No one command repeats this run, since --lr, --min_lr changed on the way",
    )
    for changed, expected, unexpected in (
        ({"steps": 4, "log_every": 1, "val_sha256": "f00d"}, same, other),
        ({"min_lr": 0, "lr": 1}, other, same),
    ):
        config["launches"] = [
            config["launches"][0],
            {"command": "python train.py", "first_step": 5, "changed": changed},
        ]
        (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
        shown = update_readme.repro_section(read_run(run), run)
        assert expected in shown and unexpected not in shown
        assert "\nfrom step 5:   python train.py\n" in shown


PROMPTS = [
    "-x",
    "--foo bar",
    "a\nb\n",
    "\n",
    "a\rb\x07c\u202ed",
    "C:\\new\\dir\r",
    "\\\n",
    r"typed\n\u0041\\",
    'it\'s $x `y` "z"\t',
    "\u200b\u2028\x85\xad",
    "<b>&amp;</b>\n",
    "é 漢字 \U0001f469\u200d\U0001f467 \U000e0041",
]


def shown_commands(run: Path) -> list[list[str]]:
    """The words of the commands in REPRO, as a reader copies them: of each launch, and the one with
    every flag."""
    lines = html.unescape(update_readme.repro_section(read_run(run), run)).splitlines()
    return [
        shlex.split(line.partition("python train.py ")[2])
        for line in lines
        if "python train.py " in line
    ]


@pytest.mark.parametrize("prompt", PROMPTS, ids=ascii)
@pytest.mark.parametrize("words", [1, 2])
def test_a_prompt_of_any_characters_is_repeated(run, prompt, words):
    argv = [
        "--preset=demo",
        *(["--prompt", prompt] if words == 2 and prompt[0] != "-" else [f"--prompt={prompt}"]),
    ]
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["launches"][0]["command"] = shlex.join(["python", "train.py", *argv])
    config["config"] = parse_config(argv).as_dict()
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    launch, every_flag = shown_commands(run)
    for command in (launch, every_flag):
        assert decode_escapes(parse_config(command).prompt) == decode_escapes(prompt)


def test_names_of_any_characters_are_repeated(run):
    argv = ["--input_file", "a.txt", "b c.txt", "--cache_dir=-e", "--tokenizer=--f.json"]
    flags = parse_config(argv)
    words = shlex.split(update_readme.full_command(flags.as_dict()))[2:]
    assert {"--cache_dir=-e", "--tokenizer=--f.json"} <= set(words)
    assert parse_config(words) == flags


@pytest.mark.slow
def test_a_run_that_went_on_from_a_checkpoint_starts_there_again(
    finished_run, tmp_path, monkeypatch
):
    """Also when it was then continued without that flag; and a step back within a run is no
    start."""
    monkeypatch.chdir(tmp_path)
    source = finished_run / "checkpoints/last.pt"
    flags = [*TINY_FLAGS, f"--input_file={finished_run.parents[1] / 'input.txt'}", "--out_dir=run"]
    flags += ["--decay_steps=14", "--warmup_steps=0"]
    assert train.main([*flags, f"--resume={source}", "--steps=10"]) == 0
    assert train.main([*flags, "--steps=12"]) == 0
    command = shown_commands(Path("run"))[-1]
    assert train.main(command) == 0
    again, first = (rows(Path(name), "step", "loss") for name in ("out/again", "run"))
    assert again[-1] == first[-1] and again[0][0] == first[0][0] == "10"
    assert train.main([*flags, "--steps=14", "--resume=run/checkpoints/prev.pt"]) == 0
    command = shown_commands(Path("run"))[-1]
    assert command[command.index("--resume") + 1] == str(source)
    assert "--resume" not in shown_commands(finished_run)[-1]


def test_fills_every_section_and_nothing_else(run, tmp_path):
    readme = tmp_path / "README.md"
    before = "# Title\n\ntext  \n\n" + ALL + "the end, without a line end"
    readme.write_bytes(before.encode())
    assert update(run, readme) == 0
    text = readme.read_bytes().decode()
    emptied = text
    for name in update_readme.SECTIONS:
        content = section(text, name)
        assert len(content) > 20, name
        emptied = emptied.replace(content, "")
    assert emptied == before
    assert "![Loss curve](out/run/logs/loss_curve.png)" in text
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert f"**{results['best_loss']:.6f}** at step {results['best_step']}" in section(
        text, "SUMMARY"
    )
    assert f"{results['corpus_loss']:.6f} ± " in section(text, "SUMMARY")
    assert "| 8 | " in section(text, "METRICS") and "| 1 | " in section(text, "METRICS")
    assert "STEP 8" in section(text, "SAMPLES") and "STEP 4" not in section(text, "SAMPLES")
    assert "Training complete." in section(text, "LOGS")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    for value in (
        config["command"],
        str(config["seed"]),
        config["corpus"]["sha256"],
        config["versions"]["torch"],
    ):
        assert value in section(text, "REPRO")


def test_the_same_run_gives_the_same_bytes_and_check_agrees(run, tmp_path, capsys, plots):
    readme = tmp_path / "README.md"
    readme.write_text(ALL, encoding="utf-8")
    assert update(run, readme, "--check") == 1
    assert "+![Loss curve]" in capsys.readouterr().out
    assert readme.read_text(encoding="utf-8") == ALL, "--check changes nothing"
    assert update(run, readme) == 0
    first, plot = readme.read_bytes(), (run / "logs/loss_curve.png").read_bytes()
    written = readme.stat().st_mtime_ns
    assert update(run, readme, "--check") == 0
    assert update(run, readme) == 0
    assert readme.read_bytes() == first and (run / "logs/loss_curve.png").read_bytes() == plot
    assert readme.stat().st_mtime_ns == written, "written only when it changes"


def test_windows_line_ends_stay(run, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_bytes(b"\xef\xbb\xbf# T\r\n" + ALL.replace("\n", "\r\n").encode())
    assert update(run, readme) == 0
    data = readme.read_bytes()
    assert data.startswith(b"\xef\xbb\xbf# T\r\n") and data.count(b"\n") == data.count(b"\r\n") > 60


def test_markers_in_code_are_text(run, tmp_path):
    readme = tmp_path / "README.md"
    code = "Write `<!--AUTO:PLOT:START-->`:\n\n````md\n```\n<!--AUTO:LOGS:START-->\n````\n\n"
    readme.write_text(code + "<!--AUTO:PLOT:START-->\n<!--AUTO:PLOT:END-->\n", encoding="utf-8")
    assert update(run, readme) == 0
    assert readme.read_text(encoding="utf-8").startswith(code)


def test_code_spans_lists_and_foreign_comments_are_text(run, tmp_path):
    readme = tmp_path / "README.md"
    before = (
        "```x``` is code\n\n- ```sh\n  <!--AUTO:LOGS:START-->\n  ```\n\n<!-- auto-generated "
        "-->\n<!-- AUTO-TOC -->\n"
    )
    readme.write_text(
        "\ufeff" + before + "<!--AUTO:LOGS:START-->\n<!--AUTO:LOGS:END-->\n", encoding="utf-8"
    )
    assert update(run, readme) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("\ufeff" + before) and "Training complete." in text


@pytest.mark.parametrize(
    "values",
    [
        {"best_loss": 10**400, "elapsed_sec": 1e300, "tokens": True, "stop_reason": ["x"]},
        {"best_loss": "<b>", "final_step": None, "ln_vocab": float("inf"), "target_loss": -1},
        {"launches": 5, "config": [], "corpus": "x", "versions": 3, "seed": {"a": "</pre>"}},
        {
            "launches": [1, {"command": "x"}] * 40,
            "config": {"preset": "|`<!--AUTO:PLOT:END"},
            "corpus": {"file": "[](y)\n"},
        },
    ],
)
def test_json_of_any_type_is_shown_or_left_out(run, tmp_path, values, plots):
    for name in ("results.json", "config.json"):
        (run / name).write_text(json.dumps(values), encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text(ALL, encoding="utf-8")
    assert update(run, readme) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.count("<!--AUTO:") == 12
    assert all(
        len(re.findall(r"(?<!\\)\|", line)) == 3 for line in section(text, "SUMMARY").splitlines()
    )
    assert update(run, readme, "--check") == 0


def test_many_launches_leave_room_for_the_rest(run, tmp_path):
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["launches"] *= 40
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text(ALL, encoding="utf-8")
    assert update(run, readme) == 0
    assert config["corpus"]["sha256"] in readme.read_text(encoding="utf-8")


def test_an_old_csv_alone(partial_run, tmp_path, plots):
    readme = tmp_path / "README.md"
    readme.write_text(ALL, encoding="utf-8")
    assert update(partial_run, readme) == 0
    text = readme.read_text(encoding="utf-8")
    assert "No samples yet." in text and "No log yet." in text and "No config.json yet." in text
    assert "| 50 | 6.5000 |" in section(text, "METRICS")
    assert (partial_run / "logs/loss_curve.png").stat().st_size > 10_000
    assert update(partial_run, readme, "--check") == 0


@pytest.mark.parametrize(
    ("body", "steps"),
    [
        ("", []),
        ("1,10.9,3e-4,100,1\n", [1]),
        ("1,10.9,3e-4,100,1\n2,10.1,3e-4,1", [1]),
        ("1,10.9,3e-4,100,1\n2,10.1,3e-4", [1]),
        ("1,10.9,3e-4,100,1\n2,nan,3e-4,100,2\n", [1, 2]),
        ("2,9,3e-4,100,2\n1,10.9,3e-4,100,1\n2,8,3e-4,100,2\n", [1, 2]),
        ("x,y,z,a,b\n1,10.9,3e-4,100,1\n", [1]),
    ],
)
def test_partial_csvs(partial_run, tmp_path, body, steps, plots):
    csv = partial_run / "logs/train_metrics.csv"
    csv.write_text(HEADER + body, encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text(ALL, encoding="utf-8")
    assert read_metrics(csv)["step"].tolist() == steps
    assert update(partial_run, readme) == 0
    assert ("No loss has been logged yet." in readme.read_text(encoding="utf-8")) is (not steps)
    assert (partial_run / "logs/loss_curve.png").exists() is bool(steps)


def test_a_validation_loss_is_drawn_and_tabled(run, tmp_path, plots):
    without = update_readme.draw_loss_curve(run).read_bytes()
    csv = run / "logs/train_metrics.csv"
    table = pd.read_csv(csv)
    table["val_loss"] = [None, 9.5, None, 9.25, None]
    table.to_csv(csv, index=False)
    readme = tmp_path / "README.md"
    readme.write_text(ALL, encoding="utf-8")
    assert update(run, readme) == 0
    assert "| val_loss |" in readme.read_text(encoding="utf-8") and "9.2500" in readme.read_text(
        encoding="utf-8"
    )
    assert (run / "logs/loss_curve.png").read_bytes() != without


def test_a_write_protected_readme_stays(run, tmp_path, capsys, plots):
    readme = tmp_path / "README.md"
    readme.write_text(ALL, encoding="utf-8")
    readme.chmod(0o444)
    assert update(run, readme, "--check") == 1, "which writes nothing"
    capsys.readouterr()
    assert update(run, readme) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{readme}: it is write-protected" in error
    assert readme.read_text(encoding="utf-8") == ALL and not (run / "logs/loss_curve.png").exists()
    readme.chmod(0o644)
    assert update(run, readme) == 0
    readme.chmod(0o444)
    assert update(run, readme) == 0, "already up to date"


def test_the_plot_path_is_relative_with_forward_slashes(run, tmp_path):
    readme = tmp_path / "docs" / "in here" / "README.md"
    readme.parent.mkdir(parents=True)
    readme.write_text(ALL, encoding="utf-8")
    assert update(run, readme) == 0
    assert "![Loss curve](../../out/run/logs/loss_curve.png)" in readme.read_text(encoding="utf-8")


def test_an_ignored_plot_is_a_warning(run, tmp_path, capsys):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("out/\n", encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text(ALL, encoding="utf-8")
    assert update(run, readme) == 0
    assert "git ignores" in capsys.readouterr().err


def test_dollars_in_a_name_are_no_formula(run, tmp_path, monkeypatch, plots):
    """In each plot; between two dollars, matplotlib reads a formula."""
    monkeypatch.chdir(tmp_path)
    names = ["a$^$b", "_$x_{$"]
    runs = [Path(shutil.copytree(run, tmp_path / "out" / name)) for name in names]
    readme = tmp_path / "README.md"
    readme.write_text(ALL, encoding="utf-8")
    for one in runs:
        assert (
            update(one, readme) == 0 and (one / "logs" / "loss_curve.png").stat().st_size > 10_000
        )
    assert update_readme.main(["--out_dir", *map(str, runs)]) == 0
    figure = update_readme.comparison_figure(Comparison.of(list(map(read_run, runs))))
    assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == sorted(names)


@pytest.mark.parametrize("name", ["日本-3e-4", "𒀀", "line\nend"])
def test_a_name_in_any_letters_is_drawn_without_a_word(run, tmp_path, monkeypatch, plots, name):
    """Also one that no font of this machine has, or nobody can see."""
    if os.name == "nt" and not name.isprintable():
        pytest.skip("there, no such name")
    monkeypatch.chdir(tmp_path)
    runs = [Path(shutil.copytree(run, tmp_path / "out" / one)) for one in (name, "other")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert update_readme.draw_loss_curve(runs[0]).stat().st_size > 10_000
        assert update_readme.main(["--out_dir", *map(str, runs)]) == 0
    assert [str(warning.message) for warning in caught] == [] and Path(
        "out/compare.png"
    ).stat().st_size > 10_000


def test_letters_come_from_a_font_that_has_them(run, tmp_path, plots, monkeypatch):
    """A font with one letter, under the name of one that a system may have."""
    name = update_readme.EAST_ASIAN[-1]
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "sun"])
    builder.setupCharacterMap({ord("日"): "sun"})
    pen = TTGlyphPen(None)
    for move, point in [(pen.moveTo, (0, 0)), (pen.lineTo, (0, 900)), (pen.lineTo, (900, 0))]:
        move(point)
    pen.closePath()
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "sun": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "sun": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "sun.ttf")
    run = run.rename(run.with_name("日"))
    others = [
        font
        for font in font_manager.fontManager.ttflist
        if font.name not in update_readme.EAST_ASIAN
    ]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", others)
    before = update_readme.draw_loss_curve(run).read_bytes()
    font_manager.fontManager.addfont(tmp_path / "sun.ttf")
    assert update_readme.draw_loss_curve(run).read_bytes() != before


NASTY = [
    "```\n<!--AUTO:SAMPLES:END-->\n<!--AUTO:PLOT:START-->",
    "</pre><script>alert(1)</script>",
    "~~~\n</PRE >\n# Heading\n| a | b |",
    "\\1 \\g<0> $1 & &lt; \r\n\r\x00\x1b[31m\u202e\u2028",
]


@pytest.mark.parametrize("text", NASTY)
def test_hostile_samples_stay_in_their_block(run, tmp_path, text):
    (run / "samples/samples.txt").write_text(
        f"{'=' * 80}\nSTEP 4\n\nPROMPT:\n{text}\n", encoding="utf-8", newline=""
    )
    readme = tmp_path / "README.md"
    readme.write_text(ALL + "end\n", encoding="utf-8", newline="\n")
    assert update(run, readme) == 0
    once = readme.read_bytes()
    content = section(once.decode(), "SAMPLES")
    inside = content.removeprefix("<pre>\n").removesuffix("\n</pre>\n")
    assert (
        len(inside) == len(content) - len("<pre>\n\n</pre>\n")
        and "<" not in inside
        and ">" not in inside
    )
    assert update(run, readme) == 0 and readme.read_bytes() == once
    assert once.decode().endswith("end\n") and once.decode().count("<!--AUTO:") == 12


fuzz = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@fuzz
@given(text=st.text(max_size=300))
def test_no_text_escapes_its_block(text):
    block = preformatted(text)
    inside = block.removeprefix("<pre>\n").removesuffix("\n</pre>")
    assert "<" not in inside and "\r" not in inside
    assert html.unescape(inside) == INVISIBLE.sub("\ufffd", text).strip("\n")


PIECES = [
    "<!--AUTO:PLOT:START-->",
    "<!--AUTO:PLOT:END-->",
    "<!--AUTO:LOGS:START-->",
    "<!--AUTO:LOGS:END-->",
]
PIECES += [
    "```",
    "~~~~",
    "text",
    "",
    "<!-- AUTO:X -->",
    "    ```",
    "`<!--AUTO:LOGS:END-->`",
    "\r",
    "é",
]


@fuzz
@given(
    lines=st.lists(st.sampled_from(PIECES), max_size=12), newline=st.sampled_from(["\n", "\r\n"])
)
def test_any_readme_is_filled_or_refused(partial_run, tmp_path, lines, newline):
    readme = tmp_path / "README.md"
    before = newline.join(lines).encode()
    readme.write_bytes(before)
    code = update(partial_run, readme)
    assert code in (0, 2)
    if code == 2:
        assert readme.read_bytes() == before
    else:
        assert update(partial_run, readme, "--check") == 0


@fuzz
@given(
    data=st.one_of(
        st.binary(max_size=200),
        st.text(alphabet='0123456789.,\n-einfa"\r', max_size=200).map(str.encode),
    )
)
def test_no_csv_crashes_the_reader(partial_run, data):
    path = partial_run / "logs/train_metrics.csv"
    path.write_bytes(HEADER.encode() + data)
    table = read_metrics(path)
    assert table["step"].is_monotonic_increasing and table["step"].is_unique
    readme = partial_run / "README.md"
    readme.write_text(
        "<!--AUTO:METRICS:START-->\n<!--AUTO:METRICS:END-->\n<!--AUTO:SUMMARY:START-->\n"
        "<!--AUTO:SUMMARY:END-->\n",
        encoding="utf-8",
    )
    assert update(partial_run, readme, "--check") in (0, 1)


DAMAGED = [
    "logs/train.log",
    "samples/samples.txt",
    "results.json",
    "config.json",
    "logs/train_metrics.csv",
]
WORDS = [
    "=" * 80,
    "STEP 4",
    "PROMPT:",
    "OUTPUT:",
    "</pre>",
    "2025-12-14 03:38:36,559 | INFO | ",
    "```",
    "<!--AUTO:LOGS:END-->",
    "step,loss",
    "1,2",
    '{"best_loss": 1',
    "}",
    "\x00",
    "\u2028",
    "\x1b[31m",
    "|",
    "é",
]


@fuzz
@given(
    name=st.sampled_from(DAMAGED),
    data=st.one_of(
        st.binary(max_size=300),
        st.lists(st.sampled_from(WORDS), max_size=12).map(lambda words: "\n".join(words).encode()),
    ),
)
def test_no_file_of_a_run_crashes_the_updater_or_escapes(
    finished_run, tmp_path_factory, name, data
):
    folder = tmp_path_factory.mktemp("fuzz")
    run = Path(
        shutil.copytree(finished_run, folder / "run", ignore=shutil.ignore_patterns("checkpoints"))
    )
    (run / name).write_bytes(data)
    readme = folder / "README.md"
    before = "before\n" + ALL + "after\n"
    readme.write_bytes(before.encode())
    code = update(run, readme, "--check")
    assert code in (0, 1, 2) and readme.read_bytes() == before.encode()
    if code != 2:
        made = {
            one: partial(make, read_run(run), readme)
            for one, make in update_readme.SECTIONS.items()
        }
        text = filled(before, made, readme)
        for section_name in update_readme.SECTIONS:
            text = text.replace(section(text, section_name), "", 1)
        assert text == before
    shutil.rmtree(folder)
