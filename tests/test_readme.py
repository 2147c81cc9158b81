"""What the README and docs/ say is so: commands work, links lead somewhere, figures come from the
run that is shown."""

import json
import re
import shlex
import shutil
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT, run_script

import export_hf
import sample
import update_readme
from benchmarks import accept_gpu, golden
from parts.commandline import parse_config, read_flags
from parts.flags import Config, out_of_range
from parts.report.reader import read_metrics
from parts.report.sections import find_sections
from parts.text.files import demo_text
from parts.text.vocabulary import load_tokenizer

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / "benchmarks" / "README.md", ROOT / "data" / "README.md"]
TEXT = {path: path.read_text(encoding="utf-8") for path in [*PAGES, *OTHERS]}
README = TEXT[ROOT / "README.md"]
GENERATED = re.compile(r"<!--(AUTO|RECORD):([A-Z_]+):START-->.*?<!--\1:\2:END-->", re.DOTALL)
FENCES = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SCRIPTS = {
    "train.py": Config,
    "sample.py": sample.Options,
    "export_hf.py": export_hf.Options,
    "update_readme.py": update_readme.Arguments,
    "benchmarks/accept_gpu.py": accept_gpu.Options,
    "benchmarks/golden.py": golden.Options,
}


def commands_in(text: str) -> list[tuple[str, str]]:
    """Language and line of every command: in fenced blocks, and in a line of prose where a script
    is called."""
    fenced = [
        (language, line) for language, block in FENCES.findall(text) for line in block.splitlines()
    ]
    inline = re.findall(r"`(python3? [^`\n]+)`", FENCES.sub("", GENERATED.sub("", text)))
    return [
        (language, line)
        for language, line in fenced
        if language in ("bash", "powershell") and line.strip()
    ] + [("bash", line) for line in inline]


def commands_of(script: str, pages: list[Path] = PAGES) -> list[list[str]]:
    """The arguments of every call of a script."""
    found = []
    for language, line in (command for page in pages for command in commands_in(TEXT[page])):
        for part in re.split(r"&&|;|\{|\}", re.split(r"(?:^|\s)#", line)[0]):
            part = part.replace("$lr", "1e-3")  # of a loop
            words = shlex.split(part.replace("\\", "/") if language == "powershell" else part)
            if script in words:
                found.append(words[words.index(script) + 1 :])
    return found


COMMANDS = [
    (script, arguments)
    for script in SCRIPTS
    for arguments in commands_of(script)
    if "--help" not in arguments
]


def test_there_are_commands_to_check():
    counts = Counter(script for script, _ in COMMANDS)
    assert counts["train.py"] >= 15 and counts.keys() == SCRIPTS.keys(), counts


@pytest.mark.parametrize(
    ("script", "arguments"), COMMANDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_command_is_accepted(script, arguments):
    if script == "train.py":
        parse_config(arguments)
    else:
        assert not out_of_range(read_flags(SCRIPTS[script], arguments, script, None))


def test_no_command_writes_into_the_run_that_is_shown():
    shown = Path(commands_of("update_readme.py", [ROOT / "README.md"])[0][1])
    assert (ROOT / shown / "results.json").is_file()
    for script, arguments in COMMANDS:
        if script == "train.py":
            assert parse_config(arguments).out_dir != shown, arguments
        if script == "update_readme.py":
            assert "--check" in arguments or shown.as_posix() not in arguments, arguments


def test_every_flag_named_is_a_flag():
    known = {field.name for options in SCRIPTS.values() for field in fields(options)}
    foreign = {
        "help",
        "index",
        "standalone",
        "nproc_per_node",
        "max_restarts",
    }  # of any program, pip and torchrun
    foreign |= {
        "dist",
        "force",
        "local",
        "repo",
        "logdir",
        "bind_all",
        "sync",
        "signal",
    }  # pytest; others' flags
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--([a-z0-9_]+)", TEXT[page]))
        assert named - foreign <= known, (page.name, named - foreign - known)


def anchors(text: str) -> set[str]:
    """Those that GitHub gives the headings of a page."""
    found: Counter[str] = Counter()
    anchors = set()
    for title in re.findall(r"^#+ +(.+?) *$", FENCES.sub("", text), re.MULTILINE):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()
        anchor = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        anchors.add(f"{anchor}-{found[anchor]}" if found[anchor] else anchor)
        found[anchor] += 1
    return anchors


@pytest.mark.parametrize("page", TEXT, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    text = FENCES.sub("", TEXT[page])
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


def test_every_page_of_the_docs_is_reached_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[^)#]+\.md)", README))
    assert linked == {page.relative_to(ROOT).as_posix() for page in PAGES[1:]}


def test_the_readme_is_read_in_minutes():
    words = len(GENERATED.sub("", README).split())
    assert words <= 3000, (
        f"{words:,} words beside the generated sections: move some of them to docs/"
    )


def test_the_ratio_in_the_readme_is_the_fair_one():
    rows = json.loads(
        (ROOT / "benchmarks/records/throughput-8x128.json").read_text(encoding="utf-8")
    )["rows"]
    (fair,) = (
        row["train.py is faster by"]
        for row in rows
        if row["program"] == "nanoGPT, compiled, memory kept"
    )
    (stated,) = re.findall(r"([\d.]+) times nanoGPT with the same memory setting", README)
    assert float(stated) == round(fair, 2)


def test_the_two_set_up_commands_stand_in_bash_and_powershell():
    for marker in ("requirements.txt", "requirements-dev.txt"):
        for language in ("bash", "powershell"):
            lines = [
                line
                for kind, line in commands_in(README)
                if kind == language and f"-r {marker}" in line and "venv" in line
            ]
            assert len(lines) == 1, (marker, language)
            assert ("&&" in lines[0]) is (language == "bash")


def test_the_sections_are_those_of_the_committed_run(monkeypatch):
    """As `--check` does in a fresh clone of the project."""
    shown = commands_of("update_readme.py", [ROOT / "README.md"])[0][1]
    monkeypatch.chdir(ROOT)
    assert update_readme.main(["--out_dir", shown, "--readme", "README.md", "--check"]) == 0
    assert set(find_sections(README.split("\n"), ROOT / "README.md")) == set(update_readme.SECTIONS)
    config = json.loads((ROOT / shown / "config.json").read_text(encoding="utf-8"))
    assert config["git_commit"] and not config["git_commit"].endswith("-dirty")


@pytest.mark.slow
def test_the_demo_reaches_its_target_and_fills_a_readme(tmp_path, monkeypatch):
    """The README's first command, after the installation: the real thing, about two minutes."""
    (flags,) = {
        tuple(arguments)
        for arguments in commands_of("train.py")
        if arguments == ["--preset", "demo"]
    }
    result = run_script(*flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "out" / "demo"
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert results["stop_reason"] == "target" and results["target_loss"] == 0.099999
    assert results["corpus_loss"] <= 0.099999 and results["window_loss"] <= 0.099999
    assert results["target_window"] == 20
    first = read_metrics(run / "logs/train_metrics.csv")["loss"][0]
    assert (
        abs(first - results["ln_vocab"]) < 0.5
    )  # GPT-2's own initialisation keeps 0.3, see test_model.py
    corpus = load_tokenizer().decode(load_tokenizer().encode_ordinary(demo_text())[:1500])
    sample = (
        (run / "samples/samples.txt").read_text(encoding="utf-8").rsplit("OUTPUT:\n", 1)[1].strip()
    )
    spans = [sample[i : i + 40] for i in range(0, len(sample) - 40, 10)]
    assert sum(span in corpus for span in spans) > len(spans) / 2, sample
    readme = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", readme)
    assert run_script("--out_dir", run, cwd=tmp_path, script="update_readme.py").returncode == 0
    monkeypatch.chdir(tmp_path)
    assert update_readme.main(["--out_dir", str(run), "--check"]) == 0
    assert "| outcome | target reached |" in readme.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_speed_tables_are_those_of_the_records():
    result = run_script("--check", cwd=ROOT, script="benchmarks/summary.py")
    assert result.returncode == 0, result.stdout + result.stderr
