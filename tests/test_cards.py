"""What a graphics card needs, as far as a CPU can show it: faked cards, refused memory, a compiler
that is wrong."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import log_text, rows

import train
from parts.compute import device as machine
from parts.compute.device import (
    choose_compile,
    choose_runtime,
    configure_torch,
    device_problem,
    driver_spills,
    release_memory,
)
from parts.compute.kernels import causal_attention
from parts.compute.ranks import Ranks
from parts.recipe import decide
from parts.run.background import Snapshot
from parts.text.corpus import load_corpus


@pytest.fixture
def cards(monkeypatch):
    """As if there were two NVIDIA cards; what they are told and asked is noted."""
    noted = []
    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "set_device": lambda device: noted.append(f"set {device}"),
        "is_bf16_supported": lambda including_emulation: noted.append("bf16?") or True,
        "mem_get_info": lambda: (6 * 2**30, 16 * 2**30),
        "memory_reserved": lambda: 2 * 2**30,
        "set_per_process_memory_fraction": lambda fraction: noted.append(f"fraction {fraction}"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return noted


@pytest.fixture
def settings():
    """PyTorch's own are put back."""
    precision, same_bits = (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(same_bits)


# Which card, and how many processes


def test_a_card_is_made_the_current_one_before_it_is_asked(config, cards):
    """Streams, too, belong to the current device: copies for a save would be waited for on another
    card."""
    chosen = choose_runtime(replace(config, device="cuda:1", amp="auto"), None)
    assert cards == ["set cuda:1", "bf16?"] and (chosen.device, chosen.amp) == ("cuda:1", "bf16")
    again = choose_runtime(replace(config, device="auto"), chosen)
    assert cards[2:] == ["set cuda:1"] and again.device == "cuda:1", (
        "a resumed run asks the same card"
    )


@pytest.mark.parametrize(
    ("device", "processes", "problem"),
    [
        (
            "cuda:1",
            2,
            "--device cuda:1: each of the 2 processes takes a card of its own; use --device cuda",
        ),
        (
            "cuda",
            3,
            "--device cuda: 3 processes on a machine with 2 CUDA devices; start one process for "
            "each",
        ),
        ("mps", 2, "--device mps: one process alone can use Apple's GPU, not 2; use --device cpu"),
        ("cuda", 2, None),
        ("cuda:1", 1, None),
        ("cpu", 9, None),
    ],
)
def test_processes_and_devices_fit_together(monkeypatch, cards, device, processes, problem):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    found = device_problem(device, processes)
    assert found is None if problem is None else found.startswith(problem)


def test_processes_are_counted_on_each_machine(monkeypatch, cards):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device_problem("cuda", 4) is None, "two machines with two cards each"


@pytest.mark.parametrize(("nccl", "backends"), [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_tensors_of_both_kinds_can_travel(monkeypatch, cards, nccl, backends):
    """The largest of the ranks' numbers is a tensor of the CPU, whatever the gradients are."""
    found = []
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    for name, value in dict(
        RANK=1, LOCAL_RANK=1, MASTER_ADDR="x", MASTER_PORT=1, WORLD_SIZE=2
    ).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(dist, "rendezvous", lambda *_address, timeout: iter([(object(), 1, 2)]))
    monkeypatch.setattr(
        dist, "init_process_group", lambda backends, **_others: found.append(backends)
    )
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", lambda timeout: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert Ranks.join() == Ranks(1, 2)
    assert found == [backends] and cards == ["set 1"]


def test_a_lost_connection_names_its_cause():
    gone = r"process of this run is gone \(Connection closed by peer\)"
    with pytest.raises(ConnectionError, match=gone):  # noqa: SIM117
        with Ranks(0, 2).connected():
            raise RuntimeError("[/src/gloo/pair.cc:538] Connection closed by peer. And so\non")


# Memory


def test_where_the_driver_spills_the_share_of_the_card_is_capped_at_what_is_free(
    config, cards, settings, monkeypatch
):
    monkeypatch.setattr(machine, "driver_spills", lambda: True)
    configure_torch(replace(config, device="cuda"))
    assert cards == ["fraction 0.46875"], "half a GiB stays for kernels"


@pytest.mark.parametrize(
    ("release", "spills"),
    [("5.15.167.4-microsoft-standard-WSL2", True), ("6.18.44-generic", os.name == "nt")],
)
def test_windows_spills_also_below_wsl(monkeypatch, release, spills):
    monkeypatch.setattr("platform.release", lambda: release)
    assert driver_spills() is spills


def test_each_kind_of_card_gives_back_what_it_keeps(monkeypatch):
    released = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append("cuda"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: released.append("mps"))
    for device in ("mps", "cuda", "cpu"):
        release_memory(torch.device(device))
    assert released == ["mps", "cuda"]


class OnCard(torch.Tensor):
    """A tensor that says it lies on an NVIDIA card."""

    is_cuda = property(lambda tensor: True)


@pytest.mark.skipif(
    torch.accelerator.is_available(), reason="page-locked memory is refused where there is no GPU"
)
def test_refused_page_locked_memory_costs_speed_only(monkeypatch, caplog):
    monkeypatch.setattr(Snapshot, "page_locked", True)
    values = {"a": torch.arange(4.0).as_subclass(OnCard), "b": torch.ones(3).as_subclass(OnCard)}
    copies = Snapshot().take(values)
    assert copies["a"].tolist() == [0, 1, 2, 3] and copies["b"].tolist() == [1, 1, 1]
    (line,) = caplog.messages
    assert line.startswith("Saves will be slower: the system refused page-locked memory (")


# Kernels and compilers


class OnApple(torch.Tensor):
    """A tensor that says it lies on an Apple GPU."""

    device = property(lambda tensor: torch.device("mps"))


def test_on_an_apple_gpu_attention_is_the_formula(monkeypatch):
    q, k, v = torch.randn(3, 1, 2, 64, 8)  # long enough that a CPU would take the fused kernel
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    found = causal_attention(*(x.as_subclass(OnApple) for x in (q, k, v)), 0.0)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)


def test_the_same_bits_are_asked_for_where_they_are_wanted_and_not_after(
    config, cards, settings, monkeypatch
):
    monkeypatch.setattr(machine, "driver_spills", lambda: False)
    for device, deterministic, same_bits in (
        ("cpu", False, True),
        ("cuda", False, False),
        ("cuda", True, True),
    ):
        configure_torch(replace(config, device=device, deterministic=deterministic))
        assert torch.are_deterministic_algorithms_enabled() is same_bits


def test_a_card_has_to_train_for_longer_before_compiling_pays(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    default = decide(dict(device="cuda"))
    assert choose_compile(default) == ("off", "the run is too short to repay the compilation")
    assert choose_compile(replace(default, steps=10_000))[0] == "on"


@pytest.mark.parametrize(
    ("forward", "difference"),
    [
        (
            lambda model: lambda x, y: 2 * (loss := model(x, y)) - loss.detach(),
            "the gradient norm of wte.weight is ",
        ),
        (lambda model: lambda x, y: model(x, y) + 1, "the loss is "),
        (lambda model: lambda x, y: model(x, y) * torch.nan, "the loss is nan compiled"),
    ],
)
def test_a_compiler_that_computes_something_else_is_done_without(
    launch, monkeypatch, forward, difference
):
    assert launch("eager") == 0
    monkeypatch.setattr(torch, "compile", lambda model, **_options: forward(model))
    assert launch("run", "--compile=on") == 0
    log = log_text(Path("run"))
    assert (
        f"torch.compile failed, going on without: ArithmeticError: {difference}" in log
        and " otherwise\n" in log
    )
    assert rows(Path("run")) == rows(Path("eager"))
    config = json.loads(Path("run/config.json").read_text(encoding="utf-8"))
    assert config["config"]["compile"] == "off"
    assert config["origins"]["compile"] == {
        "from": "this machine",
        "why": "torch.compile failed, see the log",
    }


def test_a_comparison_that_does_not_fit_is_left_out(launch, monkeypatch):
    """Uncompiled, a pass takes more memory: what fits compiled is not given up for that."""
    add_gradients = train.Trainer.add_gradients

    def refuse(trainer, step, slices, forward, at_once):
        if forward is trainer.model:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return add_gradients(trainer, step, slices, forward, at_once)

    monkeypatch.setattr(train.Trainer, "add_gradients", refuse)
    monkeypatch.setattr(torch, "compile", lambda model, **_options: lambda x, y: model(x, y))
    assert launch("run", "--compile=on") == 0
    assert "Compiled in" in log_text(Path("run")) and "memory" not in log_text(Path("run"))


# Files


@pytest.mark.parametrize("held", [3, 99])
def test_token_ids_that_another_process_maps_are_replaced_when_it_lets_go(
    tmp_path, text_file, tokenizer, config, monkeypatch, held
):
    """As under Windows, where a mapped file cannot be replaced. If it keeps them, that is told."""
    move, refusals = os.replace, []

    def refuse(source, target):
        if len(refusals) < held:
            refusals.append(target)
            raise PermissionError(
                13, "The process cannot access the file because it is being used", str(target)
            )
        move(source, target)

    monkeypatch.setattr("parts.text.corpus.SMALL_TEXT", 100)
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    config = replace(config, input_file=(text_file,), cache_dir=tmp_path / "cache")
    expected = tokenizer.encode_ordinary(text_file.read_text(encoding="utf-8"))
    if held == 99:
        with pytest.raises(
            OSError, match=r"^--cache_dir .*: wait for it, or choose another --cache"
        ):
            load_corpus(config, tokenizer)
        assert not list((tmp_path / "cache").glob("*.t*"))
        return
    assert np.array_equal(load_corpus(config, tokenizer).tokens, expected) and len(refusals) == 3
