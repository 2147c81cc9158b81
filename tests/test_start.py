"""Threads that wait sleep soon, unless the user has decided about them."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from parts.start import SPINS

pytestmark = pytest.mark.slow


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
    return subprocess.run(command, env=clean | environment, cwd=ROOT, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("script", ["train", "sample", "export_hf"])
def test_every_script_decides_before_pytorch_is_loaded(script):
    assert spin_count(script) == SPINS


def test_what_the_user_has_set_stays():
    assert spin_count("train", GOMP_SPINCOUNT="7") == "7"
    assert spin_count("train", OMP_WAIT_POLICY="ACTIVE") == "None"
