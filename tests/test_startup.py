"""What stands before PyTorch: an old Python, closed streams, and how threads share the machine."""

import ast
import os
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT, TINY_FLAGS

from parts.compute.device import choose_threads
from parts.startup import SPINS, SPINS_BESIDE_OTHERS, choose_spins, usable_cores


def spin_count(script: str, **environment: str) -> str:
    """What GNU OpenMP finds in the environment when PyTorch is loaded."""
    program = (
        "import builtins, os, sys; load = builtins.__import__\n"
        "def watched(name, *rest, **more):\n"
        "    if name == 'torch':\n"
        "        print(os.environ.get('GOMP_SPINCOUNT')); sys.stdout.flush(); os._exit(0)\n"
        "    return load(name, *rest, **more)\n"
        f"builtins.__import__ = watched\nimport {script}\n"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", program]
    pipes = dict(capture_output=True, text=True, encoding="utf-8")
    result = subprocess.run(command, env=clean | environment, cwd=ROOT, **pipes)
    return result.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "sample", "export_hf"])
def test_every_script_decides_before_pytorch_is_loaded(script):
    assert spin_count(script) in (SPINS, SPINS_BESIDE_OTHERS)


@pytest.mark.slow
def test_what_the_user_has_set_stays():
    assert spin_count("train", GOMP_SPINCOUNT="7") == "7"
    assert spin_count("train", OMP_WAIT_POLICY="ACTIVE") == "None"


@pytest.mark.parametrize(
    ("loadavg", "spins"),
    [
        ("", SPINS),  # not Linux
        ("0.10 1.00 9.00 1/200 4242", SPINS),
        ("4.00 4.00 4.00 1/200 4242", SPINS),  # a run that just ended
        ("0.20 0.10 0.00 9/200 4242", SPINS),  # a moment's work
        ("2.10 1.00 0.50 3/200 4242", SPINS_BESIDE_OTHERS),
    ],
)
def test_beside_other_programs_threads_that_wait_spin_less(loadavg, spins):
    found, reason = choose_spins(loadavg, 4)
    assert found == spins
    assert reason == (
        "idle threads sleep: others keep 2.0 of 4 cores busy" if spins != SPINS else ""
    )


@pytest.mark.parametrize(
    ("files", "cores", "reason"),
    [
        ({}, 4, ""),
        ({"self": "0::/", "cpu.max": "max 100000"}, 4, ""),
        ({"self": "0::/", "cpu.max": "50000 100000"}, 1, "a CPU quota of 0.5 cores"),
        ({"self": "0::/", "cpu.max": "250000 100000"}, 3, "a CPU quota of 2.5 cores"),
        ({"self": "0::/", "cpu.max": "800000 100000"}, 4, ""),
        # The limit of a group above, and a group that the container does not see by its name.
        ({"self": "0::/a/job", "a/cpu.max": "100000 100000"}, 1, "a CPU quota of 1 cores"),
        ({"self": "0::/../host", "cpu.max": "200000 100000"}, 2, "a CPU quota of 2 cores"),
        (
            {
                "self": "3:cpuset:/\n1:cpu,cpuacct:/docker/1f\n0::/",
                "cpu/cpu.cfs_quota_us": "150000",
                "cpu/cpu.cfs_period_us": "100000",
            },
            2,
            "a CPU quota of 1.5 cores",
        ),
        (
            {"self": "1:cpu:/", "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            4,
            "",
        ),
    ],
)
def test_a_quota_of_cpu_time_is_seen(tmp_path, monkeypatch, files, cores, reason):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    for name, content in files.items():
        path = tmp_path / ("proc/self/cgroup" if name == "self" else f"sys/fs/cgroup/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n", encoding="utf-8")
    assert usable_cores(tmp_path) == (cores, reason)


def test_an_affinity_is_seen_and_told(config, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 7}, raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    assert choose_threads(config)[0] == 2
    assert choose_threads(config)[1].startswith("a CPU affinity of 2 of ")


@pytest.mark.parametrize("script", ["train.py", "sample.py", "export_hf.py", "update_readme.py"])
def test_an_older_python_is_told_which_one_is_needed(script, monkeypatch, capsys):
    """It reads each file as a whole first: there must be no grammar that it does not know."""
    for path in (ROOT / script, ROOT / "parts/startup.py"):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 8, 18, "final", 0))
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.delitem(sys.modules, "parts.startup")
    monkeypatch.delattr("typing.Annotated")  # it came with Python 3.9
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    out, error = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and error.count("\n") == 1
    assert error.startswith(f"{script}: error: Python 3.11 or newer is needed, and this is ")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
def test_nobody_listens_to_stderr(tmp_path, text_file):
    """As under pythonw.exe: learning a vocabulary and encoding a text go on, and errors are
    told."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train\n"
        "print(train.main(['--input_file=nowhere.txt']))\n"
        "sys.exit(train.main(sys.argv[1:]))"
    )
    flags = [*TINY_FLAGS, f"--input_file={text_file}", "--out_dir=run", "--steps=2"]
    command = ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", sys.executable, "-c", program, *flags]
    pipes = dict(stdout=subprocess.PIPE, text=True, encoding="utf-8")
    ended = subprocess.run(command, cwd=tmp_path, **pipes)
    assert ended.returncode == 0 and ended.stdout.endswith("| Training complete.\n")
    error, answer, *_ = ended.stdout.splitlines()
    assert (
        error.startswith("train.py: error: --input_file nowhere.txt does not exist")
        and answer == "2"
    )
