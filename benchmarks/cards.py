"""What a preset should need on a graphics card, in memory and in time: arithmetic, not a
measurement.

`benchmarks/summary.py` makes the tables of it. The parts are counted from the model's shape;
tests/test_estimates.py holds each of them against the code. What is assumed and not counted stands
in capitals.

References:
- Kaplan et al. 2020, "Scaling Laws for Neural Language Models", arXiv 2001.08361 (6 FLOP a
  parameter and token)
- NVIDIA, "Ampere GA102 GPU Architecture" and "Ada GPU Architecture" (peaks of the RTX 3090 and
  4090)
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from parts.flags import PRESETS, Config
from parts.recipe import decide

BESIDES = 1e9  # bytes: CUDA's own memory, the kernels, and blocks that the allocator cannot fill
ACHIEVED = (0.4, 0.2)  # of a card's peak
ROOM = 0.8  # of a card's memory; the rest is for the screen and for what the sum leaves out
TOKENS = decide({}).steps * 32 * 128  # all steps of the default run
HEAD_ROWS = 1024  # HeadLoss.ROWS


@dataclass(frozen=True)
class Card:
    """A card as NVIDIA's product page has it."""

    name: str
    gib: int
    cuda_cores: int
    boost_ghz: float

    @property
    def peak(self) -> float:
        """FLOP a second of dense bf16 products with sums in fp32: 4 a CUDA core and cycle, twice
        the rate in fp32."""
        return 4 * self.cuda_cores * self.boost_ghz * 1e9


CARDS = [
    Card("RTX 4060", 8, 3072, 2.46),
    Card("RTX 3060", 12, 3584, 1.78),
    Card("RTX 4060 Ti", 16, 4352, 2.54),
    Card("RTX 3090", 24, 10496, 1.70),
    Card("RTX 4090", 24, 16384, 2.52),
]


def config_of(preset: str, micro_batch: int = 32) -> Config:
    """A preset's default run, with so many of its slices worked on at once."""
    return decide(dict(preset=preset, micro_batch=micro_batch, amp="bf16"))


def matrices(config: Config) -> int:
    """Parameters in the matrices of the blocks, Muon's."""
    return 12 * config.n_embd**2 * config.n_layer


def memory(config: Config) -> dict[str, float]:
    """Bytes of each part, as if all were there at the same time, in bf16 and uncompiled."""
    C, V = config.n_embd, config.vocab_size
    of_muon = matrices(config) if config.optimizer == "muon" else 0
    tokens = config.micro_batch * config.seq_len
    return {
        "weights": 4 * config.n_params,
        "gradients": 4 * config.n_params,
        "optimizer": 4 * of_muon + 8 * (config.n_params - of_muon),
        "bf16 copies": 2 * matrices(config),
        # The head's weight in bf16, once more padded, its gradient in bf16 and in fp32; logits in
        # bf16 and in fp32.
        "head": 10 * V * C + 6 * HEAD_ROWS * V,
        "activations": activations_per_token(config) * tokens,
    }


def activations_per_token(config: Config) -> int:
    """Bytes that the forward pass keeps for the backward pass: a block keeps two sums of the
    residual stream in fp32 (8 C), and in bf16 both normalised inputs (4 C), q, k and v (6 C),
    attention's output (2 C) and the MLP's hidden layer before and after GELU (16 C); the end of the
    model one sum and the gradient at the head (6 C)."""
    return config.n_embd * (36 * config.n_layer + 6)


def step_flop(config: Config) -> float:
    """Of one step: 6 a parameter and token, and those of Muon's products."""
    muon = config.n_layer * muon_flop_per_block(config.n_embd) if config.optimizer == "muon" else 0
    return 6 * config.n_params * config.tokens_per_step + muon


def muon_flop_per_block(C: int) -> int:
    """FLOP to bring the four matrices of a block near their polar factors, as parts/compute/muon.py
    does it.

    Where a matrix (C, n) is much wider than C, a pair of steps takes two products with it and five
    of (C, C); where it is square, each of the four steps takes three products.
    """
    wide = sum(2 * (2 * 2 * C**2 * n + 5 * 2 * C**3) for n in (3 * C, 4 * C, 4 * C))
    return wide + 4 * 3 * 2 * C**3


def seconds(card: Card, config: Config, achieved: float, tokens: float = TOKENS) -> float:
    """Time for so many tokens at this part of the card's peak; saves and samples not counted."""
    return tokens / config.tokens_per_step * step_flop(config) / (achieved * card.peak)


def total(config: Config) -> float:
    """Bytes on a card."""
    return sum(memory(config).values()) + BESIDES


def largest_that_fits(card: Card) -> Config:
    """The largest preset, and of its micro-batches the largest, that leaves room on the card; no
    fewer than 1,024 tokens at once, since a card that works on less stands idle most of the
    time."""
    presets = sorted(set(PRESETS) - {"demo", "write"}, key=lambda name: config_of(name).n_params)
    fits = [
        config
        for preset in presets
        for micro_batch in (8, 16, 32)
        if total(config := config_of(preset, micro_batch)) <= ROOM * card.gib * 2**30
    ]
    return fits[-1]
