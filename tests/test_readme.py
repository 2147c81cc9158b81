"""What the README says is so: its commands work, its figures come from the run that it shows."""

import json
import re
import shlex
import shutil
from dataclasses import fields

import pytest
from conftest import ROOT, run_script

import export_hf
import sample
import update_readme
from benchmarks import accept_gpu
from parts.config import DEMO_CORPUS, Config, parse_config
from parts.readme import find_sections
from parts.runs import read_metrics
from parts.text import load_tokenizer, read_text

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(bash|powershell)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [(language, line) for language, block in FENCES for line in block.splitlines() if line.strip()]


def commands_of(script: str) -> list[list[str]]:
    """The arguments of every call of a script in the README's fenced blocks."""
    found = []
    for language, line in COMMANDS:
        for part in re.split(r"&&|;|\{|\}", line):
            words = shlex.split(part.replace("\\", "/") if language == "powershell" else part, comments=True)
            if script in words:
                found.append(words[words.index(script) + 1 :])
    return found


def test_there_are_commands_to_check():
    assert len(commands_of("train.py")) >= 5 and len(commands_of("update_readme.py")) >= 1


@pytest.mark.parametrize("arguments", commands_of("train.py"), ids=" ".join)
def test_every_train_command_is_accepted(arguments):
    if "--help" not in arguments:
        parse_config(arguments)


def test_every_flag_named_is_a_flag():
    known = {field.name for field in fields(Config)} | {f.name for f in fields(update_readme.Arguments)}
    known |= {field.name for program in (sample, export_hf, accept_gpu) for field in fields(program.Options)}
    foreign = {"help", "index", "standalone", "nproc_per_node", "max_restarts"}  # of any program, pip and torchrun
    named = set(re.findall(r"(?<![\w-])--([a-z0-9_]+)", README))
    assert named - foreign <= known, named - foreign - known


def test_the_two_set_up_commands_stand_in_bash_and_powershell():
    for marker in ("requirements.txt", "requirements-dev.txt"):
        for language in ("bash", "powershell"):
            lines = [line for kind, line in COMMANDS if kind == language and f"-r {marker}" in line and "venv" in line]
            assert len(lines) == 1, (marker, language)
            assert ("&&" in lines[0]) is (language == "bash")


def test_the_sections_are_those_of_the_committed_run(monkeypatch):
    """As `--check` does in a fresh clone of the project."""
    shown = re.search(r"python update_readme\.py --out_dir (\S+)", README)[1]
    monkeypatch.chdir(ROOT)
    assert update_readme.main(["--out_dir", shown, "--readme", "README.md", "--check"]) == 0
    assert set(find_sections(README.split("\n"), ROOT / "README.md")) == set(update_readme.SECTIONS)
    config = json.loads((ROOT / shown / "config.json").read_text(encoding="utf-8"))
    assert config["git_commit"] and not config["git_commit"].endswith("-dirty")


@pytest.mark.slow
def test_the_demo_reaches_its_target_and_fills_a_readme(tmp_path, monkeypatch):
    """The README's first command, after the installation: the real thing, about two minutes."""
    (flags,) = {tuple(arguments) for arguments in commands_of("train.py") if arguments == ["--preset", "demo"]}
    result = run_script(*flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "out" / "demo"
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert results["stop_reason"] == "target" and results["window_loss"] <= results["target_loss"] == 0.099999
    assert results["target_window"] == 20
    first = read_metrics(run / "logs/train_metrics.csv")["loss"][0]
    assert abs(first - results["ln_vocab"]) < 0.5  # GPT-2's own initialisation keeps 0.3, see test_model.py
    corpus = load_tokenizer().decode(load_tokenizer().encode_ordinary(read_text(DEMO_CORPUS)[0])[:1500])
    sample = (run / "samples/samples.txt").read_text(encoding="utf-8").rsplit("OUTPUT:\n", 1)[1].strip()
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
