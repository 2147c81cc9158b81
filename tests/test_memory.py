"""When memory runs out the micro-batch shrinks, and nothing else changes."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import GPT2, ROOT, TINY_FLAGS, log_text, rows

import export_hf
import sample
import train
from parts.compute.device import choose_micro_batch
from parts.flags import Config
from parts.run.checkpoint import load_checkpoint

# From step 1 on the process may take so many MiB of addresses more: an allocation that fails, as on
# a full GPU.
LIMITED = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import train
accumulate, room, first = train.Trainer.accumulate, int(sys.argv.pop(1)) * 2**20, [None]
def limited(trainer, step, *rest):
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    if first[0] is None:
        first[0] = step
    if step == first[0]:
        resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
    try:
        return accumulate(trainer, step, *rest)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
train.Trainer.accumulate = limited
sys.exit(train.main(sys.argv[1:]))
"""
FLAGS = [
    *TINY_FLAGS,
    GPT2,
    "--mixed_steps=0",
    "--log_every=1",
    "--batch_size=48",
    "--amp=off",
    "--threads=1",
    "--num_prompts=0",
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_the_next_smaller_divisor_is_taken_recorded_and_kept(launch, tmp_path, text_file):
    def limited(room: int, *flags: str) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-c",
            LIMITED,
            str(room),
            *FLAGS,
            f"--input_file={text_file}",
            "--out_dir=run",
        ]
        return subprocess.run(
            [*command, *flags], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8"
        )

    assert launch("whole", *FLAGS) == 0
    result = limited(220, "--steps=4", "--decay_steps=8", "--warmup_steps=0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (
        "Out of memory with 48 slices in a micro-batch; from step 1 on with 24: the same"
        in result.stdout
    )
    fitting = int(re.findall(r"from step 1 on with (\d+): the same", result.stdout)[-1])
    assert fitting in (24, 16, 12, 8)
    assert (
        json.loads(Path("run/config.json").read_text(encoding="utf-8"))["config"]["micro_batch"]
        == fitting
    )
    assert (
        torch.load("run/checkpoints/last.pt", weights_only=True)["config"]["micro_batch"] == fitting
    )
    result = limited(330)  # a little more: what the heap holds already differs from start to start
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"From the memory: micro_batch {fitting} (as in the run so far)" in result.stdout
    assert "Out of memory" not in result.stdout, "resuming takes no more memory than the run did"
    expected, found = rows(Path("whole"), "loss"), rows(Path("run"), "loss")
    assert [float(x[0]) for x in found] == pytest.approx([float(x[0]) for x in expected], abs=1e-4)


@pytest.mark.slow
def test_other_flags_overrule_what_the_run_settled_on(launch):
    assert launch("run", "--batch_size=4", "--steps=4") == 0
    path = Path("run/checkpoints/last.pt")
    checkpoint = load_checkpoint(path)
    torch.save(checkpoint | {"config": checkpoint["config"] | {"micro_batch": 2}}, path)

    def micro_batch(*flags: str) -> int:
        assert launch("run", *flags) == 0
        return torch.load(path, weights_only=True)["config"]["micro_batch"]

    assert micro_batch("--batch_size=4", "--steps=6") == 2
    assert micro_batch("--batch_size=2", "--grad_accum=2", "--steps=8") == 4, (
        "another shape, chosen anew"
    )
    assert micro_batch("--batch_size=4", "--steps=10") == 8, (
        "twice the slices: --grad_accum is kept"
    )
    assert micro_batch("--batch_size=4", "--steps=12", "--micro_batch=1") == 1


@pytest.mark.parametrize(
    ("batch_size", "grad_accum", "seq_len", "expected"),
    [
        (8, 1, 256, 8),
        (8, 2, 128, 16),
        (8, 1, 1024, 2),
        (6, 1, 1024, 2),
        (5, 1, 1024, 1),
        (1, 8, 4096, 1),
    ],
)
def test_a_cpu_works_on_2048_tokens_at_once(batch_size, grad_accum, seq_len, expected):
    config = Config(
        batch_size=batch_size, grad_accum=grad_accum, seq_len=seq_len, block_size=4096, device="cpu"
    )
    assert choose_micro_batch(config)[0] == expected
    assert choose_micro_batch(replace(config, device="cuda")) == (batch_size, "--batch_size")


def test_when_one_slice_is_too_much_it_is_one_line_with_a_remedy(launch, monkeypatch):
    sizes = []

    def refuse(_model, tokens, _targets=None):
        sizes.append(len(tokens))
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(train.GPT, "forward", refuse)
    assert launch("run", "--batch_size=6", "--grad_accum=2", "--mixed_steps=0") == 1
    assert sizes == [12, 6, 4, 3, 2, 1]
    assert "Out of memory: choose a smaller --seq_len or --preset. (tried to" in log_text(
        Path("run")
    )
    results = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    assert results["stop_reason"] == "failed"


@pytest.mark.parametrize(
    "words", ["could not create a primitive", "std::bad_alloc", "can't start new thread"]
)
def test_what_is_said_where_memory_is_short_is_one_line(launch, monkeypatch, capsys, words):
    """By oneDNN, C++ and Python: in training a smaller micro-batch, elsewhere the remedy."""

    def refuse(_model, tokens, _targets=None):
        if len(tokens) > 1:
            raise RuntimeError(words)
        return forward(_model, tokens, _targets)

    forward = train.GPT.forward
    with monkeypatch.context() as patch:
        patch.setattr(train.GPT, "forward", refuse)
        assert launch("run", "--steps=2", "--num_prompts=0") == 0
        assert "Out of memory with 2 slices in a micro-batch; from step 1" in log_text(Path("run"))

    def fail(*_arguments):
        raise RuntimeError(words)

    capsys.readouterr()
    for place, flags in ((train.GPT, ["--dry_run"]), (train.Trainer, [])):
        with monkeypatch.context() as patch:
            patch.setattr(place, "forward" if flags else "__init__", fail)
            assert launch("other", *flags) == 1
        assert capsys.readouterr().err == f"train.py: error: {train.OUT_OF_MEMORY % words}\n"
    assert not Path("other").exists()
    for program, part in ((sample, sample.Sampler), (export_hf, export_hf)):
        with monkeypatch.context() as patch:
            patch.setattr(part, "__init__" if part is sample.Sampler else "hf_weights", fail)
            assert program.main(["--checkpoint=run", *["--out=hf"] * (program is export_hf)]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"{program.__name__}.py: error: out of memory: close other programs")
        assert said.endswith(f"({words})")


WIDE = [
    GPT2,
    "--batch_size=16384",
    "--amp=off",
    "--seq_len=16",
    "--log_every=1",
    "--steps=4",
]  # 262,144 tokens at once


def kept_for_the_way_back(slices: int, config: Config) -> int:
    """Bytes that a forward pass keeps for the backward pass, the model's own left out."""
    model = train.GPT(config)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in own:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        tokens = torch.zeros(slices, 17, dtype=torch.long)
        loss = model(tokens[:, :-1], tokens[:, 1:])
    del loss
    return sum(found.values())


def test_what_half_of_the_slices_saves_is_worth_capping(config):
    """What the next test needs: its memory is that of the slices, and not that of the head, which
    takes 1,024 rows at a time however many there are."""
    config = replace(config, vocab_size=50_257)
    few, more = (kept_for_the_way_back(n, config) for n in (64, 128))
    assert (more - few) / 64 * 8192 > 0.5e9, "half of the 16,384 slices"


@pytest.mark.cuda
def test_on_cuda(launch, monkeypatch):
    """A cap on this process's share of the card, between what all slices take and what half of them
    do, stands in for a smaller card."""

    def peak(name: str, *flags: str) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        assert launch(name, "--device=cuda", *WIDE, *flags) == 0
        return torch.cuda.max_memory_reserved()

    whole, half = peak("whole"), peak("half", "--micro_batch=8192")
    assert whole > 1.2 * half
    monkeypatch.setattr(
        "parts.compute.device.driver_spills", lambda: False
    )  # or Windows would set a cap of its own
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        (whole + half) / 2 / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        assert launch("run", "--device=cuda", *WIDE) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Out of memory with 16384 slices in a micro-batch; from step 1 on with 8192" in log_text(
        Path("run")
    )
    expected, found = rows(Path("whole"), "loss"), rows(Path("run"), "loss")
    assert [float(x[0]) for x in found] == pytest.approx([float(x[0]) for x in expected], abs=1e-3)
