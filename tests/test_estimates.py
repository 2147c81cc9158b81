"""The arithmetic for cards counts what the code has: parameters, optimizer, activations,
products."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from benchmarks import cards

WIDE = dict(
    n_embd=128, n_head=2, n_layer=2, block_size=512, vocab_size=512, seq_len=512, amp="bf16"
)


def trained_once(config) -> tuple[train.GPT, dict[str, torch.optim.Optimizer]]:
    """A model with gradients and optimizers after a step."""
    model = train.GPT(config)
    optimizers = train.build_optimizers(model, config)
    model(
        torch.zeros(1, 9, dtype=torch.long)[:, :-1], torch.zeros(1, 8, dtype=torch.long)
    ).backward()
    for optimizer in optimizers.values():
        optimizer.step()
    return model, optimizers


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_weights_gradients_and_optimizer(config, optimizer):
    config = replace(config, **WIDE, optimizer=optimizer)
    model, optimizers = trained_once(config)
    counted = cards.memory(config)
    assert counted["weights"] == sum(p.nbytes for p in model.parameters())
    assert counted["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    states = [state for found in optimizers.values() for state in found.state.values()]
    held = sum(value.nbytes for state in states for value in state.values())
    assert counted["optimizer"] == pytest.approx(held, rel=0.01), (
        "less Muon's number for each row, and step counts"
    )


def test_activations(config):
    """By what a longer batch keeps more, attention in PyTorch's kernel as on a card."""
    config = replace(config, **WIDE)
    model = train.GPT(config)

    def kept(slices: int) -> int:
        found: dict[int, int] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        tokens = torch.zeros(slices, config.seq_len + 1, dtype=torch.long)
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
            torch.autocast("cpu", torch.bfloat16),
        ):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        del loss
        return sum(found.values())

    per_token = (kept(3) - kept(1)) / (2 * config.seq_len)
    assert cards.activations_per_token(config) == pytest.approx(per_token, rel=0.02)


def test_products_of_model_and_muon(config):
    short = dict(
        seq_len=16, block_size=16, amp="off"
    )  # so that attention's own products weigh little
    config = replace(config, **WIDE | short, batch_size=8, optimizer="muon")
    model = train.GPT(config)
    optimizers = train.build_optimizers(model, config)
    tokens = torch.zeros(config.batch_size, config.seq_len + 1, dtype=torch.long)
    with FlopCounterMode(display=False) as of_model:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    with FlopCounterMode(display=False) as of_muon:
        optimizers["muon"].step()
    assert of_muon.get_total_flops() == config.n_layer * cards.muon_flop_per_block(config.n_embd)
    both = of_model.get_total_flops() + of_muon.get_total_flops()
    assert cards.step_flop(config) == pytest.approx(both, rel=0.02)


def test_peaks_are_those_of_the_whitepapers():
    peaks = {card.name: card.peak / 1e12 for card in cards.CARDS}
    assert peaks["RTX 3090"] == pytest.approx(71, rel=0.01) and peaks["RTX 4090"] == pytest.approx(
        165.2, rel=0.01
    )


def test_what_is_said_to_fit_leaves_room_and_what_is_larger_does_not():
    for card in cards.CARDS:
        chosen, limit = cards.largest_that_fits(card), cards.ROOM * card.gib * 2**30
        assert cards.total(chosen) <= limit
        larger = [
            preset for preset in cards.PRESETS if cards.config_of(preset).n_params > chosen.n_params
        ]
        assert all(cards.total(cards.config_of(preset, 8)) > limit for preset in larger)
