"""What the page needs can be installed beside what a run needs, and changes nothing of it."""

import importlib.util
from importlib.metadata import distribution

import pytest
from conftest import ROOT
from packaging.requirements import Requirement


def required(path: str) -> list[Requirement]:
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    words = [line.partition("#")[0].strip() for line in lines]
    return [Requirement(word) for word in words if word and not word.startswith("-")]


def test_what_is_pinned_in_turn_is_pinned_alike():
    constraints = {one.name: one.specifier for one in required("constraints.txt")}
    for path in ("requirements.txt", "requirements-dev.txt"):
        for one in required(path):
            assert constraints.get(one.name, one.specifier) == one.specifier, one
    assert {"regex", "filelock", "contourpy"} <= constraints.keys(), "what others stand on"


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
