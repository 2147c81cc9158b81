"""The stairs go down only: what each file of the project imports of the others."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# From the top of the stairs; a name without .py is a room, in which files may import each other.
FLOORS = [
    *("setup", "predecessor", "report", "text", "run", "compute"),
    *("commandline", "progress", "recipe", "flags", "startup"),
]
SCRIPTS = {
    "train": set(),
    "sample": {"train"},
    "export_hf": set(),
    "update_readme": set(),
}  # beside the parts
FILES = sorted(path for path in (ROOT / "parts").rglob("*.py") if path.name != "__init__.py")


def imported(path: Path) -> set[str]:
    """The project's own modules that a file imports, wherever the statement stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in SCRIPTS or file_of(name).is_file()}


def file_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def floor(path: Path) -> int:
    return FLOORS.index(path.relative_to(ROOT / "parts").parts[0].removesuffix(".py"))


def test_every_part_is_on_the_stairs():
    assert {floor(path) for path in FILES} == set(range(len(FLOORS)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_part_imports_what_lies_below_it(path):
    found = {file_of(name) for name in imported(path)}
    assert not {one for one in found if one.parent == ROOT}, "a script"
    same_room = {one for one in found if one.parent == path.parent != ROOT / "parts"}
    assert all(floor(one) > floor(path) for one in found - same_room)


def test_there_are_no_circles():
    TopologicalSorter(
        {path: {file_of(name) for name in imported(path)} for path in FILES}
    ).prepare()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_parts_and_few_scripts(name):
    """The one exception: train.py borrows the plot of update_readme.py when it draws, and not
    before."""
    scripts = {module.split(".")[0] for module in imported(ROOT / f"{name}.py")} & SCRIPTS.keys()
    assert scripts - ({"update_readme"} if name == "train" else set()) <= SCRIPTS[name]


def test_what_reports_runs_imports_no_torch():
    """A run is reported and compared where there is no PyTorch: update_readme.py reads files
    only."""
    parts = [path for path in FILES if path.parent.name == "report" or path.stem == "layout"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in parts]
    program = f"import sys, update_readme, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    assert result.returncode == 0 and {"parts.report.words", "parts.run.layout"} <= set(names)


def test_only_the_trainer_changes_the_progress():
    """Through methods of Progress that say what happened; nothing else assigns to its fields."""
    progress = ast.parse((ROOT / "parts" / "progress.py").read_text(encoding="utf-8"))
    (its_class,) = (one for one in progress.body if getattr(one, "name", "") == "Progress")
    changing = {
        method.name
        for method in its_class.body
        if isinstance(method, ast.FunctionDef) and any(assigned(method, "self"))
    }
    assert {"made_step", "validated", "found_best", "told"} <= changing
    fields = {one.target.id for one in its_class.body if isinstance(one, ast.AnnAssign)}
    for path in (*FILES, *(ROOT / f"{name}.py" for name in SCRIPTS)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.stem != "progress":
            found = [one for owner in ("p", "progress") for one in assigned(tree, owner)]
            assert not fields & set(found), path
        elsewhere = [one for one in tree.body if getattr(one, "name", "") != "Trainer"]
        for node in ast.walk(ast.Module(elsewhere, [])):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value).split(".")[-1]
                assert owner not in ("p", "progress") or node.func.attr not in changing, path


def assigned(tree: ast.AST, owner: str) -> Iterator[str]:
    """The attributes of a name, or of an attribute of this name, that are assigned to."""
    for node in ast.walk(tree):
        is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if is_set and ast.unparse(node.value).split(".")[-1] == owner:
            yield node.attr


def test_report_takes_plain_values():
    """It speaks of config, corpus and progress, never of the objects that run."""
    text = (ROOT / "parts" / "report" / "words.py").read_text(encoding="utf-8")
    words = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert not words & {"Trainer", "Setup", "Saver", "RunDir"}
