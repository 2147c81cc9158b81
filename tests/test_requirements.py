"""What the page needs can be installed beside what a run needs, and changes nothing of it."""

import importlib.util
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement


def required(path: str, folder: Path = ROOT) -> list[Requirement]:
    lines = (folder / path).read_text(encoding="utf-8").splitlines()
    words = [line.partition("#")[0].strip() for line in lines]
    return [Requirement(word) for word in words if word and not word.startswith("-")]


def assert_pinned_alike(folder: Path) -> None:
    constraints = {one.name: one.specifier for one in required("constraints.txt", folder)}
    for path in ("requirements.txt", "requirements-dev.txt"):
        for one in required(path, folder):
            assert constraints.get(one.name, one.specifier) == one.specifier, one
    assert {"regex", "filelock", "contourpy"} <= constraints.keys(), "what others stand on"


def test_what_is_pinned_in_turn_is_pinned_alike():
    assert_pinned_alike(ROOT)


@pytest.mark.skipif(sys.platform != "linux", reason="the job runs on Ubuntu, with GNU sed")
def test_the_job_on_the_oldest_pytorch_pins_it_alike(tmp_path):
    """pip installs nothing where a requirement and its constraint differ."""
    for path in ("requirements.txt", "requirements-dev.txt", "constraints.txt"):
        shutil.copy(ROOT / path, tmp_path)
    jobs = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    (command,) = re.findall(r"^ +(sed -i .*)$", jobs, re.MULTILINE)
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    assert str(required("requirements.txt", tmp_path)[0]) == "torch==2.11.0"
    assert_pinned_alike(tmp_path)


def test_what_the_space_needs_changes_nothing_in_the_environment_of_training():
    """Each version that requirements.txt pins is one that the Space and all it stands on accept;
    Pillow's is pinned, since gradio does not take the newest."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("needs gradio (space/requirements.txt)")
    pinned = {
        one.name: str(one.specifier).removeprefix("==") for one in required("requirements.txt")
    }
    assert "pillow" in pinned
    waiting, seen = required("space/requirements.txt"), set()
    while waiting:
        one = waiting.pop()
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            assert one.name not in pinned or one.specifier.contains(pinned[one.name]), one
            if one.name not in seen:
                waiting += map(Requirement, distribution(one.name).requires or [])
            seen.add(one.name)
    assert {"pillow", "torch", "tokenizers"} <= seen
