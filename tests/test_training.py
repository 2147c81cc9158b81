"""A step is one update on the global batch; the numbers it reports are what they say."""

import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import log_text

import train
from parts.flags import VOCAB_SIZE
from parts.progress import Progress
from parts.recipe import decide
from parts.run.directory import RunDir
from parts.text.corpus import Corpus


@pytest.fixture
def corpus() -> Corpus:
    tokens = np.random.default_rng(0).integers(0, 500, 300).astype(np.uint16)
    return Corpus(tokens, "made up", len(tokens))


def gradients(trainer: train.Trainer) -> dict[str, torch.Tensor]:
    """What the optimizer is given in the first step, clipped."""
    seen = {}
    trainer.optimizers["adamw"].step = lambda: seen.update(
        {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    )
    trainer.update()
    return seen


def test_micro_batches_equal_one_large_batch(config, corpus):
    config = replace(config, clip_grad=0.0)
    whole = train.Trainer(replace(config, batch_size=8, grad_accum=1), corpus, None)
    parts = train.Trainer(replace(config, batch_size=2, grad_accum=4), corpus, None)
    expected, found = gradients(whole), gradients(parts)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7, msg=name)
    assert parts.progress.loss == pytest.approx(whole.progress.loss, abs=1e-5)


def test_the_loss_is_the_mean_over_the_global_batch_before_the_update(config, corpus):
    trainer = train.Trainer(replace(config, grad_accum=3), corpus, None)
    (slices,) = trainer.slices(1)
    with torch.no_grad():
        expected = trainer.model(slices[:, :-1], slices[:, 1:]).item()
    loss, _, _ = trainer.update()
    assert loss == pytest.approx(expected, abs=1e-5)
    assert abs(loss - math.log(VOCAB_SIZE)) < 0.3, (
        "not divided by grad_accum, not the last micro-batch"
    )


def test_grad_norm_is_that_before_clipping(config, corpus):
    trainer = train.Trainer(replace(config, clip_grad=0.01), corpus, None)
    clipped = {}
    trainer.optimizers["adamw"].step = lambda: clipped.update(
        {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    )
    _, grad_norm, _ = trainer.update()
    unclipped = gradients(train.Trainer(replace(config, clip_grad=0.0), corpus, None))

    def norm(grads):
        return torch.stack([g.norm() for g in grads.values()]).norm().item()

    assert grad_norm == pytest.approx(norm(unclipped), rel=1e-4) and grad_norm > 0.1
    assert norm(clipped) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_groups_cover_each_parameter_once(config, optimizer):
    model = train.GPT(config)
    config = replace(config, optimizer=optimizer, weight_decay=0.1)
    groups = [g for one in train.build_optimizers(model, config).values() for g in one.param_groups]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(
        id(p) for p in model.parameters()
    )
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        for name in (names[id(p)] for p in group["params"]):
            vector = name.endswith(".bias") or "ln_" in name
            assert group["weight_decay"] == (0 if vector else 0.1), name


def test_muon_has_the_matrices_of_the_blocks(config):
    model = train.GPT(config)
    optimizers = train.build_optimizers(model, replace(config, optimizer="muon"))
    held = {id(p) for p in optimizers["muon"].param_groups[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in held}
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == {f"h.{i}.{kind}.weight" for i in range(config.n_layer) for kind in kinds}


def test_a_muon_step_is_orthogonal_and_as_large_as_an_adamw_step(config, corpus):
    """Its singular values lie around one, as the Polar Express leaves them, scaled so that the RMS
    is 0.2 lr."""
    trainer = train.Trainer(
        replace(config, optimizer="muon", lr=0.1, weight_decay=0.0, clip_grad=0), corpus, None
    )
    before = trainer.model.h[0].mlp.c_fc.weight.detach().clone()
    _, _, lr = trainer.update()
    update = (before - trainer.model.h[0].mlp.c_fc.weight.detach()) / lr
    singular = torch.linalg.svdvals(update) / (0.2 * max(update.shape) ** 0.5)
    assert singular.max() < 1.7 and 0.5 < singular.median() < 1.4
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_shrinks_matrices_only(config, corpus, optimizer):
    """With zero gradients a weight moves by -lr * decay * weight and nothing else."""
    trainer = train.Trainer(
        replace(config, optimizer=optimizer, lr=0.1, weight_decay=0.5), corpus, None
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for one in trainer.optimizers.values():
        one.step()
    for name, parameter in trainer.model.named_parameters():
        factor = 0.95 if parameter.dim() >= 2 else 1.0
        torch.testing.assert_close(parameter, before[name] * factor, msg=name)


@pytest.mark.parametrize(("schedule", "quarter"), [("linear", 0.75), ("cosine", 0.8535534)])
def test_learning_rate_schedule(config, schedule, quarter):
    config = replace(
        config, lr=1e-3, min_lr=1e-4, warmup_steps=10, decay_steps=110, steps=200, schedule=schedule
    )
    rates = [train.learning_rate(step, config) for step in range(1, 201)]
    assert rates[0] == pytest.approx(1e-4) and rates[0] > 0
    assert rates[9] == max(rates) == 1e-3
    assert np.allclose(np.diff(rates[:10]), 1e-4)
    assert rates[34] == pytest.approx(1e-4 + quarter * 9e-4)
    assert rates[59] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates[109] == pytest.approx(1e-4) and set(rates[109:]) == {1e-4}
    assert (np.diff(rates[9:110]) < 0).all()


def test_learning_rate_without_warmup_starts_at_the_peak(config):
    flat = replace(config, lr=3e-4, min_lr=3e-4, warmup_steps=0, decay_steps=100)
    assert {train.learning_rate(step, flat) for step in range(1, 201)} == {3e-4}


def test_default_warmup_is_a_small_part_of_the_run():
    for steps, muon, adamw in ((5, 0, 0), (100, 3, 10), (3_000, 100, 300)):
        for optimizer, warmup in (("muon", muon), ("adamw", adamw)):
            assert decide(dict(steps=steps, optimizer=optimizer)).warmup_steps == warmup


def test_the_rate_moves_once_per_step_whatever_the_accumulation(config, corpus):
    seen = []
    for grad_accum in (1, 4):
        trainer = train.Trainer(
            replace(config, grad_accum=grad_accum, warmup_steps=2, lr=1e-3), corpus, None
        )
        seen.append([trainer.update()[2] for _ in range(4)])
        for optimizer in trainer.optimizers.values():
            assert optimizer.param_groups[0]["lr"] == seen[-1][-1]
    assert (
        seen[0] == seen[1] == [train.learning_rate(step, trainer.config) for step in (1, 2, 3, 4)]
    )


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_follows_fp32(config, corpus, amp):
    expected = train.Trainer(replace(config, lr=1e-2), corpus, None)
    found = train.Trainer(replace(config, lr=1e-2, amp=amp), corpus, None)
    assert found.scaler.is_enabled() is (amp == "fp16")
    for _ in range(8):
        loss, _, _ = expected.update()
        half_loss, _, _ = found.update()
        assert half_loss == pytest.approx(loss, abs=0.1)
    assert found.progress.skipped_steps <= 2
    assert all(p.dtype == torch.float32 for p in found.model.parameters())
    assert found.progress.loss < 10.7


def test_an_fp16_overflow_skips_the_step_and_halves_the_scale(config, corpus):
    trainer = train.Trainer(replace(config, amp="fp16"), corpus, None)
    trainer.update()
    trainer.scaler.update(2.0**40)  # any gradient overflows
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    moments = {
        k: v["exp_avg"].clone()
        for k, v in trainer.optimizers["adamw"].state_dict()["state"].items()
    }
    trainer.update()
    assert trainer.progress.skipped_steps == 1 and trainer.progress.step == 2
    assert trainer.scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    after = trainer.optimizers["adamw"].state_dict()["state"]
    assert all(torch.equal(after[k]["exp_avg"], v) for k, v in moments.items())


def test_a_non_finite_loss_never_reaches_the_weights(config, corpus):
    trainer = train.Trainer(config, corpus, None)
    with torch.no_grad():
        trainer.model.ln_f.weight[0] = math.nan
    others = {
        n: p.detach().clone() for n, p in trainer.model.named_parameters() if n != "ln_f.weight"
    }
    for _ in range(train.MAX_SKIPPED_IN_A_ROW - 1):
        loss, _, _ = trainer.update()
    assert math.isnan(loss)
    with pytest.raises(
        train.TrainingFailed, match=r"20 steps in a row, the last being step 20: .*--lr"
    ):
        trainer.update()
    assert all(
        torch.equal(p, others[n]) for n, p in trainer.model.named_parameters() if n in others
    )
    assert trainer.progress.recent_losses == []


def test_window_loss_needs_a_full_window(config):
    progress = Progress(recent_losses=[3.0, 2.0])
    assert progress.window_loss(config) is None
    progress.recent_losses.append(1.0)
    assert progress.window_loss(config) == 2.0


@pytest.mark.parametrize(
    ("window", "losses", "step", "measured", "reason"),
    [
        (3, [0.25, 0.0, 0.5], 5, {}, None),
        (3, [0.25, 0.0, 0.5], 5, {"corpus_step": 4, "corpus_loss": 0.2}, None),
        (3, [0.25, 0.0, 0.5], 5, {"corpus_step": 5, "corpus_loss": 0.26}, None),
        (3, [0.25, 0.0, 0.5], 5, {"corpus_step": 5, "corpus_loss": 0.25}, "target"),
        (3, [0.0, 0.0, 0.0], 8, {}, "steps"),
        (3, [0.5, 0.5, 0.5], 8, {"corpus_step": 8, "corpus_loss": 0.25}, "target"),
        (3, [0.5, 0.5, 0.5], 8, {"corpus_step": 8, "corpus_loss": 0.26}, "steps"),
        (1, [0.25], 5, {}, "target"),
        (1, [0.26], 5, {}, None),
    ],
)
def test_stop_reason(config, window, losses, step, measured, reason):
    """Random slices decide; with a window of one step, that step."""
    config = replace(config, target_loss=0.25, target_window=window, steps=8)
    progress = Progress(step=step, recent_losses=losses, **measured)
    assert progress.stop_reason(config) == reason


def test_best_is_the_lowest_window_with_the_weights_after_its_step(config, corpus, tmp_path):
    trainer = train.Trainer(replace(config, lr=1e-2), corpus, None)
    saver = train.Saver(RunDir(tmp_path / "run"), trainer, {}, 0)
    for _ in range(6):
        trainer.update()
    saver.consider_window_loss()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    best_loss = trainer.progress.best_loss
    assert (
        best_loss == trainer.progress.window_loss(trainer.config)
        and trainer.progress.best_step == 6
    )
    trainer.update()
    trainer.progress.recent_losses = [99.0] * 3
    saver.consider_window_loss(at_end=True)
    assert (trainer.progress.best_loss, trainer.progress.best_step) == (best_loss, 6)
    assert all(
        torch.equal(saver.best.found["model"][name], value) for name, value in weights.items()
    )


def test_corpus_loss_is_the_mean_over_slices_with_its_standard_error(config, corpus):
    model = train.GPT(config)
    n_starts = len(corpus.tokens) - config.seq_len
    starts = train.slice_starts(config.seed, train.EVALUATION_STREAM + 5, 7, n_starts)
    slices = train.take_slices(corpus.tokens, starts, config.seq_len)
    with torch.no_grad():
        each = torch.stack([model(s[None, :-1], s[None, 1:]) for s in slices]).double()
    parts = [
        train.corpus_losses(model, corpus.tokens, config, 5, *ends) for ends in ((0, 4), (4, 7))
    ]
    mean, error = train.mean_and_error(torch.cat(parts))
    assert mean == pytest.approx(each.mean().item(), abs=1e-5)
    assert error == pytest.approx(each.std().item() / 7**0.5, rel=1e-2)


def test_dropout_is_a_function_of_seed_and_step(config, corpus):
    """A run resumed at step 2 draws the masks of step 3, whatever was drawn in between."""
    config = replace(config, dropout=0.3)
    losses = []
    for disturbance in (0, 17):
        trainer = train.Trainer(config, corpus, None)
        trainer.update()
        torch.rand(disturbance)
        trainer.update()
        losses.append(trainer.update()[0])
    assert losses[0] == losses[1]


def test_progress_is_plain_values():
    """Checkpoints hold nothing that would need a pickle to execute code."""
    assert all(isinstance(value, int | float | list) for value in asdict(Progress()).values())


@pytest.mark.cuda
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_cuda_follows_the_cpu(config, corpus, amp):
    reference = train.Trainer(config, corpus, None)
    trainer = train.Trainer(replace(config, device="cuda", amp=amp), corpus, None)
    for _ in range(8):
        expected, found = reference.update()[0], trainer.update()[0]
        assert found == pytest.approx(expected, abs=0.1 if amp != "off" else 5e-3)


@pytest.mark.cuda
def test_one_host_read_per_step_on_cuda(config, corpus):
    """PyTorch's sync debug mode warns at each synchronisation; the step's single .tolist() is
    one."""
    trainer = train.Trainer(replace(config, device="cuda", amp="bf16", grad_accum=4), corpus, None)
    trainer.update()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as warnings:
            trainer.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in warnings if "synchroniz" in str(w.message)]) == 1


def test_the_eta_leaves_out_the_first_step_of_a_start(launch, monkeypatch):
    """On a GPU it takes seconds, the others some hundredths of one."""
    clock, update = [0.0], train.Trainer.update

    def timed(trainer: train.Trainer) -> tuple[float, float, float]:
        clock[0] += 1000 if trainer.progress.step == 0 else 1
        return update(trainer)

    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(train.Trainer, "update", timed)
    assert launch("run", "--steps=30", "--save_every=1000") == 0
    told = re.findall(r"step (\d+)/30 [^\n]*\n[^\n]*ETA (\S+) \(", log_text(Path("run")))
    assert told == [("2", "0:00:28"), ("10", "0:00:20")], (
        "after the second step, and with ten to go by"
    )
