"""Automatic choices come with a reason; what a machine lacks is said with the remedy."""

import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import train
from parts.compute.device import (
    choose_compile,
    choose_runtime,
    cpu_only_hint,
    device_problem,
    for_sampling,
    largest_divisor,
)
from parts.flags import Config, From
from parts.recipe import decide
from parts.report.provenance import launch_words
from parts.report.words import plan_warnings, sample_line
from parts.setup import Setup
from parts.text.corpus import Corpus

cpu_only = pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A machine with an NVIDIA driver: its tool is on the PATH."""
    tool = tmp_path / ("nvidia-smi.exe" if os.name == "nt" else "nvidia-smi")
    tool.write_bytes(b"")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


@cpu_only
def test_a_cpu_only_pytorch_beside_an_nvidia_card(nvidia_smi, text_file, tmp_path, capsys):
    hint = cpu_only_hint()
    assert "CPU-only build: pip install" in hint and "/whl/cu" in hint
    assert "CPU-only build" in device_problem("cuda")
    flags = [
        "--n_layer=1",
        "--n_head=1",
        "--n_embd=8",
        "--block_size=8",
        "--seq_len=8",
        "--steps=1",
        "--num_prompts=0",
    ]
    out_dir = tmp_path / "run"
    assert (
        train.main([*flags, "--device=auto", f"--input_file={text_file}", f"--out_dir={out_dir}"])
        == 0
    )
    assert re.search(
        r"WARNING \| an NVIDIA card is here, but PyTorch .* is a CPU-only build: pip",
        capsys.readouterr().out,
    )


@cpu_only
def test_without_an_nvidia_card_there_is_no_hint(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpu_only_hint() is None
    assert "no usable NVIDIA driver" in device_problem("cuda:0")


def test_every_automatic_choice_has_a_value_and_a_reason(config):
    asked = replace(
        config, device="auto", amp="auto", compile="auto", threads=None, micro_batch=None
    )
    chosen = choose_runtime(asked, None)
    reasons = {name: o.reason for name, o in chosen.origins.items() if o.source == From.MACHINE}
    assert set(reasons) == {"device", "amp", "compile", "threads", "micro_batch"} and all(
        reasons.values()
    )
    assert chosen.device in ("cuda", "mps", "cpu") and chosen.amp in ("off", "bf16", "fp16")
    assert chosen.compile in ("on", "off") and chosen.threads >= 1


def test_flags_overrule_and_earlier_choices_stand(config):
    asked = replace(config, device="cpu", amp="auto", compile="off", threads=None)
    earlier = replace(config, device="cpu", amp="fp16", compile="on", threads=7)
    chosen = choose_runtime(asked, earlier)
    assert (chosen.amp, chosen.compile, chosen.threads) == ("fp16", "off", 7)
    assert (
        chosen.origins["compile"].source == From.TYPED and chosen.origins["amp"].source == From.RUN
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_run_that_moves_to_a_machine_without_its_device_says_so(config):
    asked = replace(config, device="auto", amp="auto", compile="off", threads=None)
    earlier = replace(config, device="cuda", amp="bf16", compile="on", threads=4)
    chosen = choose_runtime(asked, earlier)
    assert chosen.device != "cuda"
    assert (
        "the run so far used cuda, so results agree to rounding only"
        in chosen.origins["device"].reason
    )


def test_on_a_cpu_compilation_is_for_who_asks(config):
    """However long the run: the record says 1.034 times as fast, and two to three minutes of
    compiling."""
    long = decide(dict(device="cpu", compile="auto", n_embd=768, steps=10**6))
    answer, reason = choose_compile(long)
    assert answer == "off"
    assert "takes minutes and gains about 3 %" in reason
    assert "--compile on" in reason
    asked = decide(
        dict(device="cpu", compile="on", n_embd=768, steps=10**6), machine=choose_runtime
    )
    assert (asked.compile, asked.origins["compile"].source) == ("on", From.TYPED)


def test_the_124m_preset_on_a_cpu_is_warned_of(config):
    corpus = Corpus(np.arange(2000, dtype=np.uint16), "made up", 2000)
    gpt2 = replace(decide(dict(target_loss=0)), device="cpu", amp="off", compile="off", threads=2)
    (warning,) = plan_warnings(gpt2, corpus, 0.01)
    assert (
        warning.startswith("124M parameters take hours to days on a CPU")
        and "--preset write" in warning
    )
    assert plan_warnings(replace(gpt2, n_layer=4), corpus, 0.01) == []


@pytest.mark.parametrize(
    ("amp", "one_at_a_time", "answer"),
    [("bf16", True, "fp16"), ("bf16", False, "bf16"), ("off", True, "off")],
)
def test_text_is_sampled_in_the_precision_that_is_fast_for_it(config, amp, one_at_a_time, answer):
    """On a CPU, weights in fp16 are the faster for one token and ten times slower for a whole
    context."""
    assert for_sampling(replace(config, amp=amp), one_at_a_time).amp == answer
    assert for_sampling(replace(config, amp=amp, device="cuda"), one_at_a_time).amp == amp


@pytest.mark.parametrize(
    ("number", "at_most", "answer"), [(64, 5, 4), (64, 64, 64), (7, 6, 1), (12, 100, 12)]
)
def test_the_micro_batch_divides_the_global_batch(number, at_most, answer):
    assert largest_divisor(number, at_most) == answer


def test_the_recorded_command_names_torchrun(monkeypatch):
    def launch_command(argv: list[str], config: Config) -> str:
        return " ".join(launch_words(argv, config))

    assert launch_command(["--steps", "5"], Config()) == "python train.py --steps 5"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    two, four = (replace(Config(), processes=n) for n in (2, 4))
    assert launch_command([], two) == "torchrun --standalone --nproc_per_node=2 train.py"
    assert (
        launch_command(["--steps", "5"], four)
        == "torchrun --nnodes=2 --nproc_per_node=2 train.py --steps 5"
    )


def test_machines_may_choose_threads_and_compilation_for_themselves(config):
    corpus = Corpus(np.zeros(100, dtype=np.uint16), "made up", 100)

    def shared(**flags) -> dict:
        setup = Setup([], replace(config, **flags), corpus, None, None, None, None)
        return setup.shared_facts()

    assert shared() == shared(threads=7, compile="on", micro_batch=1)
    assert shared() != shared(amp="bf16") and shared() != shared(lr=1.0)


def test_a_sample_is_told_on_one_line():
    assert (
        sample_line(20, "ROMEO:\n", "ROMEO:\n\n \n")
        == "Sample at step 20: ROMEO: (then white space only)"
    )
    assert sample_line(20, "ROMEO:\n", "ROMEO:\nO, speak\n") == "Sample at step 20: ROMEO: O, speak"
    assert sample_line(20, "", "a " * 150) == f"Sample at step 20: {'a ' * 100} ..."
