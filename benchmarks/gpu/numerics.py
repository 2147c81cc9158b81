"""The card computes what the CPU computes."""

import contextlib
import importlib.util
import io
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import train
from benchmarks.gpu.common import (
    FIXED_SCALE,
    ROOT,
    SMALL,
    LeftOut,
    Options,
    assert_equal,
    at_most,
    check,
    clones,
    command,
    distance,
    log_of,
    needs_card,
    run,
    started,
    trainer_of,
    wait_for,
    worst,
)
from benchmarks.torture import differences
from parts.commandline import parse_config
from parts.compute.device import choose_runtime
from parts.compute.kernels import HeadLoss
from parts.recipe import decide
from parts.run.checkpoint import SavedRun


@check("numerics", "what auto chooses for the default run")
def choices(options: Options, here: Path) -> str:
    config = choose_runtime(parse_config([f"--input_file={options.input_file}"]), None)
    chosen = {
        name: config.origins[name]
        for name in ("device", "amp", "compile", "threads", "micro_batch")
    }
    return "; ".join(
        f"{name} {getattr(config, name)} ({o.reason or o.source})" for name, o in chosen.items()
    )


@check("numerics", "fp32 logits of GPT-2 124M against the CPU's, largest difference")
def logits(options: Options, here: Path) -> str:
    torch.set_float32_matmul_precision("highest")
    model = train.GPT(decide({}))
    tokens = torch.randint(0, 50_257, (2, 512), generator=torch.Generator().manual_seed(0))
    with train.evaluating(model):
        expected = model(tokens)
        found = model.to(options.device)(tokens.to(options.device)).cpu()
    return at_most((found - expected).abs().max().item(), 1e-4)


def losses_of_eight_steps(options: Options, precision: str, amp: str) -> float:
    flags = [*SMALL, "--compile=off", "--steps=100"]
    expected = trainer_of(options, *flags, "--device=cpu", "--amp=off")
    wanted = [expected.update()[0] for _ in range(8)]
    trainer = trainer_of(options, *flags, f"--amp={amp}")
    torch.set_float32_matmul_precision(precision)
    return worst([trainer.update()[0] for _ in range(8)], wanted)


for title, precision, amp, limit in (
    ("fp32", "highest", "off", 5e-3),
    ("TF32", "high", "off", 5e-3),
    ("bf16", "high", "bf16", 0.1),
    ("fp16", "high", "fp16", 0.1),
):

    @check("numerics", f"losses of eight steps in {title} against the CPU's in fp32")
    def follows(options: Options, here: Path, precision=precision, amp=amp, limit=limit) -> str:
        return at_most(losses_of_eight_steps(options, precision, amp), limit)


@check("numerics", "loss and gradients of the head against F.cross_entropy, fp32 and bf16")
def head(options: Options, here: Path) -> str:
    torch.set_float32_matmul_precision("highest")
    generator = torch.Generator(options.device).manual_seed(0)
    made = dict(device=options.device, generator=generator)
    features, weight = torch.randn(3000, 768, **made), 0.02 * torch.randn(50_257, 768, **made)
    targets = torch.randint(0, 50_257, (3000,), **made)

    def there_and_back(loss_of: Callable, amp: bool) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (features, weight)]
        with torch.autocast(options.device, torch.bfloat16, enabled=amp):
            loss = loss_of(*leaves)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    expected = there_and_back(lambda f, w: F.cross_entropy((f @ w.T).float(), targets), amp=False)
    answers = []
    for amp, limit in ((False, 1e-5), (True, 2e-2)):
        found = there_and_back(lambda f, w: HeadLoss.apply(f, w, targets), amp)
        answers.append(
            at_most(max(distance(a, b) for a, b in zip(found, expected, strict=True)), limit)
        )
    return "; ".join(answers)


def gradients_of(trainer: train.Trainer, forward: torch.nn.Module) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad(set_to_none=True)
    trainer.accumulate(1, trainer.slices(1), forward)
    return {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}


for amp, limit in (("off", 1e-3), ("bf16", 0.05)):

    @check("numerics", f"each parameter's gradient, compiled against eager, --amp {amp}, worst")
    def compiled_gradients(options: Options, here: Path, amp=amp, limit=limit) -> str:
        trainer = trainer_of(options, "--n_layer=3", f"--amp={amp}", "--compile=off")
        torch.set_float32_matmul_precision("highest")
        eager = gradients_of(trainer, trainer.model)
        compiled = gradients_of(trainer, torch.compile(trainer.model, dynamic=False))
        largest = max(x.norm().item() for x in eager.values())
        # The gradients of the keys' biases are zero but for rounding.
        found = {
            name: distance(compiled[name], x)
            for name, x in eager.items()
            if x.norm() > 1e-3 * largest
        }
        name = max(found, key=found.get)
        return f"{at_most(found[name], limit)} ({name}, of {len(found)})"


@check("numerics", "graphs compiled anew in 20 steps, ten mixed and ten whole ones", seconds=240)
def recompilations(options: Options, here: Path) -> str:
    from torch._dynamo.utils import counters

    trainer = trainer_of(options, "--compile=on", "--mixed_steps=11")
    reason = trainer.compile()
    assert reason is None, reason
    trainer.update()
    before = counters["stats"]["unique_graphs"]
    for _ in range(20):
        trainer.update()
    return at_most(counters["stats"]["unique_graphs"] - before, 0)


@check(
    "numerics",
    "an infinite gradient under fp16 changes nothing but the scale, and twenty end the run",
)
def infinite_gradients(options: Options, here: Path) -> str:
    trainer = trainer_of(options, *SMALL, "--amp=fp16", "--compile=off")
    for _ in range(3):
        trainer.update()
    before = clones({"model": trainer.state()["model"], "optimizer": trainer.state()["optimizer"]})
    trainer.model.ln_f.weight.register_hook(lambda gradient: gradient * math.inf)
    trainer.update()
    count = assert_equal(
        {"model": trainer.state()["model"], "optimizer": trainer.state()["optimizer"]}, before
    )
    scale = trainer.scaler.get_scale()
    assert scale == FIXED_SCALE / 2, f"the scale is {scale}"
    with contextlib.suppress(train.TrainingFailed):
        for _ in range(30):
            trainer.update()
    in_a_row = trainer.progress.skipped_in_a_row
    assert in_a_row == train.MAX_SKIPPED_IN_A_ROW, f"{in_a_row} steps were skipped in a row"
    return f"{count} tensors the same, scale {FIXED_SCALE:g} to {scale:g}, ended after {in_a_row}"


@check("numerics", "the scale of fp16 after a resume")
def scale_resumes(options: Options, here: Path) -> str:
    trainer = trainer_of(options, *SMALL, "--amp=fp16", "--compile=off")
    trainer.update()
    file = io.BytesIO()
    torch.save(trainer.state(), file)
    file.seek(0)
    saved = SavedRun(Path("last.pt"), torch.load(file, weights_only=True))
    again = train.Trainer(trainer.config, trainer.corpus, saved)
    found, expected = again.scaler.get_scale(), trainer.scaler.get_scale()
    assert found == expected == FIXED_SCALE, f"{found}, not {expected}"
    return f"{found:g}"


@check("numerics", "synchronisations of host and card in a step of four micro-batches")
def synchronisations(options: Options, here: Path) -> str:
    needs_card(options)
    trainer = trainer_of(options, *SMALL, "--grad_accum=4", "--micro_batch=8", "--compile=off")
    trainer.update()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.update()
    torch.cuda.set_sync_debug_mode("default")
    count = sum("synchroniz" in str(one.message) for one in caught)
    assert count == 1, f"{count}, not 1"
    return "1"


@check("numerics", "--deterministic: two runs, and a killed one, bit for bit")
def deterministic(options: Options, here: Path) -> str:
    flags = [
        *SMALL,
        f"--device={options.device}",
        "--deterministic",
        "--steps=400",
        "--save_every=20",
        "--log_every=1",
    ]
    flags += ["--target_loss=0"]
    run(options, here / "whole", *flags)
    run(options, here / "again", *flags)
    with started(command(options, here / "killed", *flags)) as process:
        wait_for(lambda: "step 150/" in log_of(here / "killed"), process)
        process.kill()
    said = run(options, here / "killed", *flags)
    assert "Resuming from step" in said, "it was killed too late"
    for name in ("again", "killed"):
        different = {
            what: value for what, value in differences(here / "whole", here / name).items() if value
        }
        assert not different, f"{name}: {different}"
    return re.search(r"Resuming from step \d+", said)[0] + ", nothing differs"


@check("numerics", "greedy text with and without the cache")
def greedy(options: Options, here: Path) -> str:
    torch.set_float32_matmul_precision("highest")
    model = train.GPT(decide({})).to(options.device)
    tokens = torch.randint(0, 50_257, (2, 8), generator=torch.Generator().manual_seed(0))
    (found, _) = train.generate(
        model,
        tokens.tolist(),
        100,
        context=1024,
        temperature=0.0,
        top_k=0,
        generators=[torch.Generator()] * 2,
    )
    expected = tokens[:1].to(options.device)
    with train.evaluating(model):
        for _ in range(100):
            expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    same = sum(a == b for a, b in zip(found, expected[0].tolist(), strict=True))
    assert same == len(found), f"{same} of {len(found)} tokens"
    return f"{same - 8} tokens the same"


@check("numerics", "the tests marked cuda, each in a process of its own", seconds=240)
def marked_tests(options: Options, here: Path) -> str:
    needs_card(options)
    if not all(importlib.util.find_spec(name) for name in ("pytest", "xdist")):
        raise LeftOut("needs the packages of requirements-dev.txt")
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
    ]  # pyproject.toml has one -q
    listed = subprocess.run(
        [*pytest, "-m", "cuda", "--collect-only"], cwd=ROOT, capture_output=True, text=True
    )
    names = re.findall(r"^\S+::\S.*$", listed.stdout, re.MULTILINE)
    assert names, listed.stdout[-500:] + listed.stderr[-500:]
    failed = []
    for name in names:
        done = subprocess.run([*pytest, name], cwd=ROOT, capture_output=True, text=True)
        if done.returncode or "1 passed" not in done.stdout:
            failed.append(name)
            print(done.stdout[-3000:], file=sys.stderr)
    assert not failed, f"{len(failed)} of {len(names)} failed: {', '.join(failed)}"
    return f"{len(names)} passed"
