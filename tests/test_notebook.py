"""docs/train.ipynb: all its cells run one after the other, it installs what is missing alone, and
Stop saves."""

import ast
import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import ROOT, TINY_FLAGS
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

import sample

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Colab and Kaggle run Linux")
NOTEBOOK = ROOT / "docs" / "train.ipynb"
CELLS = {cell.id: cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells}


def assignments(**values: object) -> str:
    """Source that gives the notebook's parameters other values."""
    names = {node.targets[0].id for node in ast.parse(CELLS["parameters"].source).body}
    assert values.keys() <= names | {"PYTHON"}, "a parameter that the notebook does not have"
    return "\n".join(f"{name} = {value!r}" for name, value in values.items())


def said(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.fixture
def code(tmp_path) -> Path:
    """The files of a clone that the notebook needs, as they are now."""
    folder = tmp_path / "code"
    shutil.copytree(ROOT / "parts", folder / "parts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("docs/train.ipynb", "data/README.md", "requirements.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    return folder


@pytest.fixture
def quiet_jupyter(tmp_path, monkeypatch):
    """Kernels leave nothing in the home directory, and pip asks no index."""
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def test_it_is_a_notebook_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (
            cell.outputs == [] and cell.execution_count is None
        ), cell.id
    assert CELLS["parameters"].metadata.tags == ["parameters"], "what papermill looks for"


@pytest.mark.slow
def test_all_cells_run_in_a_clone_that_the_notebook_makes(
    tmp_path, code, text_file, capsys, quiet_jupyter
):
    """As on a machine that has the packages: a clone, the demo cut short, a text of one's own,
    samples, the export."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "code"]):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *command],
            cwd=code,
            check=True,
        )
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    values = assignments(
        REPOSITORY=code.as_uri(),
        TEXT=str(text_file),
        UPLOAD=True,
        DRIVE=True,
        EXPORT=True,
        FLAGS=TINY_FLAGS,
        DEMO_FLAGS=["--steps=4", "--max_new_tokens=20", "--device=cpu"],
        PROMPT="Line 7:",
    )
    position = [cell.id for cell in notebook.cells].index("parameters")
    notebook.cells.insert(position + 1, nbformat.v4.new_code_cell(values))
    place = tmp_path / "content"
    place.mkdir()
    NotebookClient(
        notebook, timeout=400, startup_timeout=400, resources={"metadata": {"path": str(place)}}
    ).execute()
    cells, clone = {cell.id: cell for cell in notebook.cells}, place / "gpt2"
    assert f"The code is in {clone}" in said(cells["code"])
    assert f"PyTorch {torch.__version__} " in said(cells["packages"])
    assert not (clone / ".venv-notebook").exists(), "nothing was missing"
    assert "step 4/4 |" in said(cells["demo"]) and "step 8/8 |" in said(cells["train"])
    for run, steps, look in (("demo", 4, "demo-look"), ("mine", 8, "train-look")):
        results = json.loads((clone / "out" / run / "results.json").read_text(encoding="utf-8"))
        assert (results["final_step"], results["stop_reason"]) == (steps, "steps")
        (image,) = [
            output.data["image/png"]
            for output in cells[look].outputs
            if output.output_type == "display_data"
        ]
        assert base64.b64decode(image) == (clone / "out" / run / "logs/loss_curve.png").read_bytes()
        samples = (clone / "out" / run / "samples/samples.txt").read_text(encoding="utf-8")
        block = said(cells[look])
        assert f"STEP {steps}\n" in block and "OUTPUT:\n" in block and block.strip() in samples
    assert (clone / "out/mine/checkpoints/last.pt").is_file(), "DRIVE does nothing outside Colab"
    best = clone / "out/mine/checkpoints/best.pt"
    capsys.readouterr()
    assert sample.main(["--checkpoint", str(best), "--prompt=Line 7:", "--num_samples", "2"]) == 0
    for text in capsys.readouterr().out.split(sample.SEPARATOR):
        assert text.strip().startswith("Line 7:") and text.strip() in said(cells["sample"])
    assert (clone / "out/mine/hf/model.safetensors").is_file()


def test_a_clone_around_it_is_used(code, monkeypatch, capsys):
    for folder in (code / "docs", code):
        monkeypatch.chdir(folder)
        exec(CELLS["code"].source, {"REPOSITORY": "nowhere"})
        assert Path.cwd() == code and f"The code is in {code}" in capsys.readouterr().out


def test_without_code_and_address_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="REPOSITORY is empty"):
        exec(CELLS["code"].source, {"REPOSITORY": ""})


@pytest.mark.slow
def test_what_is_missing_goes_into_an_environment_of_its_own(
    tmp_path, code, monkeypatch, capfd, quiet_jupyter
):
    """The PyTorch outside it stays and is seen, whatever requirements.txt says of it; Python itself
    gets nothing."""
    if not metadata.packages_distributions().get(
        "pip"
    ):  # importing it would take setuptools' distutils from PyTorch
        pytest.skip("needs pip")
    with zipfile.ZipFile(tmp_path / "missing_here-1.2-py3-none-any.whl", "w") as wheel:
        about = "missing_here-1.2.dist-info"
        wheel.writestr("missing_here.py", "answer = 42\n")
        wheel.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: missing-here\nVersion: 1.2\n"
        )
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")
    pins = "torch==0.0  # not this one\nmissing-here==1.2  # but this\n"
    (code / "requirements.txt").write_text(pins, encoding="utf-8")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv(
        "PYTHONPATH", sysconfig.get_path("purelib")
    )  # where the machine's own packages are
    monkeypatch.chdir(code)
    names = {"REPOSITORY": ""}
    for cell in ("code", "packages"):
        exec(CELLS[cell].source, names)
    assert f"PyTorch {torch.__version__} " in capfd.readouterr().out
    program = "import missing_here; print(missing_here.answer)"
    assert subprocess.check_output([names["PYTHON"], "-c", program]) == b"42\n"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 1


@pytest.mark.slow
@pytest.mark.xdist_group("kills")
def test_stop_reaches_the_training_which_saves(tmp_path, code, text_file, quiet_jupyter):
    """The lines come while it runs; the button sends a signal to the kernel, which passes it on."""
    flags = [
        *TINY_FLAGS,
        "--log_every=1",
        "--save_every=100000",
        "--sample_every=100000",
        "--steps=100000",
    ]
    values = assignments(TEXT=str(text_file), OUT="out/mine", FLAGS=flags, PYTHON=sys.executable)
    manager, client = start_new_kernel(startup_timeout=400, cwd=str(code))
    heard = []

    def hear(message: dict) -> None:
        heard.append(message["content"].get("text", ""))
        if "step 3/" in "".join(heard) and "pressed" not in heard:
            heard.append("pressed")
            os.kill(
                manager.provisioner.pid, signal.SIGINT
            )  # and not its whole group, as some front ends do

    try:
        client.execute_interactive(values, timeout=400)
        client.execute_interactive(CELLS["code"].source, timeout=400)
        reply = client.execute_interactive(CELLS["train"].source, output_hook=hear, timeout=400)
        assert reply["content"]["status"] == "error" and reply["content"]["ename"] == "SystemExit"
        assert "code 130" in reply["content"]["evalue"]
        assert "Saved checkpoint" in "".join(heard).partition("pressed")[2]
        assert (code / "out/mine/checkpoints/last.pt").is_file()
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
