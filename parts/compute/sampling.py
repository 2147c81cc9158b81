"""The next token by its scores.

Reference: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", arXiv 1904.09751
(top-p sampling)
"""

import math

import torch


def choose(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """A token by its logits (V,), with a (CPU) generator of its own.

    Temperature 0 takes the likeliest; top_k 0 samples among all, top_p among the likeliest that
    make up this probability.
    """
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        lowest = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    # In float64, however low the temperature.
    probabilities = ((logits - logits.max()).double() / temperature).softmax(-1)
    if top_p < 1:
        largest, order = probabilities.sort(descending=True)
        before = largest.cumsum(-1) - largest  # the probability of all likelier ones
        kept = largest.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(0, order, kept)
    return int(torch.multinomial(probabilities, 1, generator=generator))
