"""The stairs go down only: what each file of the project imports of the others."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PARTS = {
    "start": set(),
    "config": set(),
    "recipe": {"config"},
    "samples": set(),
    "screen": set(),
    "files": {"samples"},
    "muon": set(),
    "kernels": set(),
    "runs": {"samples"},
    "waiting": set(),
    "readme": {"files"},
    "comparison": {"runs", "readme"},
    "background": {"files", "machine"},
    "tensorboard": {"files", "samples", "config"},
    "foreign": set(),
    "text": {"files", "foreign", "waiting", "config"},
    "machine": {"config", "start"},
    "compiling": {"machine", "config"},
    "environment": {"config"},
    "corpus": {"text", "files", "waiting", "config"},
    "checkpoint": {"files", "machine", "text", "config"},
    "commandline": {"recipe", "config"},
    "report": {"checkpoint", "machine", "corpus", "environment", "files", "recipe", "config"},
    "verdict": {"report", "checkpoint", "commandline", "config"},
    "steplog": {"report", "checkpoint", "corpus", "files", "waiting", "config"},
    "setup": {"report", "checkpoint", "corpus", "text", "machine", "files", "commandline", "recipe", "config"},
}
SCRIPTS = {"train": set(), "sample": {"train"}, "export_hf": set(), "update_readme": set()}  # beside the parts


def imported(path: Path) -> set[str]:
    """Names of the project's own modules in the import statements of a file, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in {"parts", *SCRIPTS}}


def test_every_part_is_on_the_stairs():
    assert {path.stem for path in (ROOT / "parts").glob("*.py")} == {"__init__", *PARTS}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_imports_what_lies_below_it(name):
    found = imported(ROOT / "parts" / f"{name}.py")
    assert {module.split(".")[1] for module in found if "." in module} & PARTS.keys() <= PARTS[name]
    assert not {module for module in found if module.split(".")[0] in SCRIPTS}, "a script"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_parts_and_few_scripts(name):
    """The one exception: train.py borrows the plot of update_readme.py when it draws, and not before."""
    scripts = {module.split(".")[0] for module in imported(ROOT / f"{name}.py")} & SCRIPTS.keys()
    assert scripts - ({"update_readme"} if name == "train" else set()) <= SCRIPTS[name]


def test_what_reports_runs_imports_no_torch():
    """A run is reported and compared where there is no PyTorch: neither update_readme.py nor what it stands on."""
    waiting, known = [ROOT / "update_readme.py"], set()
    while waiting:
        path = waiting.pop()
        text = path.read_text(encoding="utf-8")
        assert "import torch" not in text and "from torch" not in text, path.name
        found = {ROOT / "parts" / f"{name.split('.')[1]}.py" for name in imported(path) if name.startswith("parts.")}
        waiting += found - known
        known |= found
    assert {path.stem for path in known} >= {"runs", "comparison", "readme", "config"}


def test_report_takes_plain_values():
    """It speaks of config, corpus and progress, never of the objects that run."""
    for name in ("report", "verdict"):
        text = (ROOT / "parts" / f"{name}.py").read_text(encoding="utf-8")
        words = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        assert not words & {"Trainer", "Setup", "Saver", "RunDir"}
