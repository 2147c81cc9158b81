"""training.ps1 is run by PowerShell itself: on the PATH, or unpacked beside the project."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest
from conftest import KILLS, POWERSHELL, PWSH, ROOT, TINY_FLAGS, log_text, needs_pwsh

from parts.commandline import parse_config

pytestmark = pytest.mark.slow

SOURCE = (ROOT / "training.ps1").read_text(encoding="ascii")
CODE = re.sub(r"(?m)(^|\s)#.*$", "", SOURCE)
TELLS_ITS_ARGUMENTS = """
import json, os, sys
print(json.dumps(sys.argv[1:]))
if "results" in os.environ:
    open(os.environ["results"], "w").close()
sys.exit(int(os.environ.get("code", 0)))
"""
# First this Python, also where the virtual environment is not activated.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
FILLS_THE_README = "import sys; print('README', sys.argv[1:]); sys.exit(3)"


@pytest.fixture
def wrapper(tmp_path):
    """Run a copy of training.ps1 beside other scripts; returns exit code and output."""
    folder = tmp_path / "a folder [1]"
    folder.mkdir()
    shutil.copy(ROOT / "training.ps1", folder)
    (folder / "train.py").write_text(TELLS_ITS_ARGUMENTS, encoding="utf-8")
    (folder / "update_readme.py").write_text(FILLS_THE_README, encoding="utf-8")

    def run(*arguments: str, before: str = "", **environment: str) -> tuple[int, str]:
        """`before` is PowerShell that comes before the call."""
        words = " ".join("'" + word.replace("'", "''") + "'" for word in arguments)
        call = f"{before}; & '{folder / 'training.ps1'}' {words}; exit $LASTEXITCODE"
        ended = subprocess.run(
            [*POWERSHELL, "-Command", call],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"PATH": PATH} | environment,
            cwd=tmp_path,
            timeout=100,
        )
        return ended.returncode, ended.stdout + ended.stderr

    return run


def told(output: str) -> list[str]:
    """The arguments that train.py was given."""
    return json.loads(next(line for line in output.splitlines() if line.startswith("[")))


def test_nothing_that_5_1_lacks():
    for pattern in (r"&&", r"\|\|", r"\?\?", r"\$IsWindows", r"\?\."):
        assert not re.search(pattern, CODE), pattern


def test_its_flags_are_the_trainers():
    array = CODE[CODE.index("$trainArgs = @(") : CODE.index(")")]
    config = parse_config(re.findall(r"'([^']*)'", array))
    assert (config.preset, config.out_dir.as_posix()) == ("gpt2", "out/gpt2")


HARD = ["--prompt", "two words", "", 'a "b c" d', "--x=y", "back\\", "ends in one\\"]


@needs_pwsh
@pytest.mark.parametrize(
    "before",
    [
        "",
        "Set-StrictMode -Version Latest",
        "$ExecutionContext.SessionState.LanguageMode = 'ConstrainedLanguage'",
        "$PSNativeCommandArgumentPassing = 'Legacy'",
        "$env:OS = 'Windows_NT'",  # here the call that keeps the machine awake fails
    ],
)
def test_arguments_arrive_as_they_are(wrapper, before):
    code, output = wrapper(*HARD, before=before)
    assert code == 0 and told(output)[-len(HARD) :] == HARD


@needs_pwsh
def test_exit_codes_are_the_trainers(wrapper):
    for code in (0, 1, 2, 130):
        found, output = wrapper(code=str(code))
        assert found == code and "README" not in output


@needs_pwsh
@pytest.mark.parametrize(
    "out_dir",
    [
        "out/x",
        "my runs [2]",
        pytest.param(
            "with:colon",
            marks=pytest.mark.skipif(os.name == "nt", reason="there, no such names"),
        ),
    ],
)
def test_the_readme_is_filled_after_a_run_and_only_then(wrapper, tmp_path, out_dir):
    results = tmp_path / "a folder [1]" / out_dir / "results.json"
    results.parent.mkdir(parents=True)
    assert wrapper("--out_dir", "other", "--out_dir", out_dir)[0] == 0
    code, output = wrapper("--out_dir", "other", "--out_dir", out_dir, results=str(results))
    assert code == 3 and f"README ['--out_dir', '{out_dir}', '--readme', 'README.md']" in output
    assert wrapper("--out_dir", out_dir, "--help")[0] == 0, "nothing was trained"
    assert wrapper(f"--out-dir={out_dir}", results=str(results))[0] == 3
    assert wrapper("--out_dir", out_dir, results=str(results), code="1")[0] == 1


@needs_pwsh
def test_a_drive_that_is_not_there_is_left_to_the_trainer(wrapper):
    code, output = wrapper("--out_dir", "Z:\\runs", before="$env:OS = 'Windows_NT'", code="2")
    assert code == 2 and "Z:" in told(output)[-1] and "drive" not in output.lower()


@needs_pwsh
def test_without_python_it_says_what_to_install(wrapper, tmp_path):
    code, output = wrapper(before=f"$env:PATH = '{tmp_path}'")
    assert code == 2 and "no Python was found: install Python 3.11 or newer" in output


@needs_pwsh
@pytest.mark.skipif(os.name == "nt", reason="there, no program is called python3")
def test_python3_alone_is_found(wrapper, tmp_path):
    folder = tmp_path / "only python3"
    folder.mkdir()
    (folder / "python3").symlink_to(sys.executable)
    assert wrapper(before=f"$env:PATH = '{folder}'")[0] == 0


@needs_pwsh
def test_a_real_run_fills_a_real_readme(tmp_path, text_file):
    """The trainer is found in `.venv`; the folder's name has a space and brackets."""
    project = tmp_path / "our [project]"
    project.mkdir()
    for name in ("train.py", "update_readme.py", "training.ps1", "README.md"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "parts", project / "parts")
    place = {"base": str(project / ".venv")}
    venv.create(place["base"], symlinks=os.name != "nt")
    ours = sorted({sysconfig.get_path(kind) for kind in ("purelib", "platlib")})
    theirs = Path(sysconfig.get_path("purelib", "venv", place), "ours.pth")
    theirs.write_text("\n".join(ours), encoding="utf-8")
    flags = [word for flag in TINY_FLAGS for word in flag.split("=")]  # a colon splits --flag=value
    flags += ["--preset", "demo", "--input_file", str(text_file), "--out_dir", "o 1"]
    ended = subprocess.run(
        [*POWERSHELL, "-File", project / "training.ps1", *flags],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        cwd=tmp_path,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Training complete." in log_text(project / "o 1")
    before = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (project / "README.md").read_text(encoding="utf-8") != before


WAITS = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
print("training", flush=True)
time.sleep(60)
"""


@needs_pwsh
@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C at a terminal needs a pty")
@pytest.mark.parametrize("is_file", [True, False])
def test_ctrl_c_is_told_by_the_exit_code(tmp_path, is_file):
    """But a PowerShell that is open stays open."""
    import pty

    shutil.copy(ROOT / "training.ps1", tmp_path)
    (tmp_path / "train.py").write_text(WAITS, encoding="utf-8")
    how = ["-File", "training.ps1"]
    if not is_file:
        how = ["-NoExit", "-Command", "Remove-Module PSReadLine; ./training.ps1"]
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execv(PWSH, [PWSH, "-NoProfile", *how])
    read_until(terminal, "training\r")
    os.write(terminal, b"\x03")
    if is_file:
        read_until(terminal, "nothing more, until it is closed")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    else:
        assert "PS " in read_until(terminal, "PS "), "its prompt"
        time.sleep(1)
        assert os.waitpid(process, os.WNOHANG) == (0, 0), "it waits"
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def read_until(terminal: int, text: str) -> str:
    """What a terminal shows until it shows this, or for half a minute."""
    shown = ""
    deadline = time.monotonic() + 30
    while text not in shown and time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            try:
                shown += os.read(terminal, 4096).decode(errors="replace")
            except OSError:  # the other side is closed
                break
    return shown


for _test in (test_ctrl_c_is_told_by_the_exit_code, test_a_real_run_fills_a_real_readme):
    for _mark in KILLS:
        _test = _mark(_test)
