"""The loss floor is what a perfect memoriser pays."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from parts.text.corpus import loss_floor, smallest_seq_len
from parts.text.files import read_text


def brute_force(tokens: list[int], T: int) -> float:
    """Mean over positions of the entropy of the next token given the slice so far, by counting."""
    starts = range(len(tokens) - T)
    total = 0.0
    for k in range(1, T + 1):
        following = defaultdict(Counter)
        for s in starts:
            following[tuple(tokens[s : s + k])][tokens[s + k]] += 1
        for counts in following.values():
            n = sum(counts.values())
            total -= sum(c * math.log(c / n) for c in counts.values()) / len(starts)
    return total / T


@pytest.mark.parametrize("T", [1, 2, 3, 4, 7, 8, 15, 40])
@pytest.mark.parametrize("alphabet", [1, 2, 5, 200])
def test_equals_brute_force(T, alphabet):
    tokens = np.random.default_rng(T).integers(0, alphabet, 120).astype(np.uint16)
    assert loss_floor(tokens, T) == pytest.approx(brute_force(tokens.tolist(), T), abs=1e-12)


def test_a_single_slice_costs_nothing():
    assert loss_floor(np.arange(17, dtype=np.uint16), 16) == 0


@pytest.mark.slow
def test_published_row_of_tiny_shakespeare(tiny_shakespeare, tokenizer):
    tokens = np.array(
        tokenizer.encode_ordinary(read_text(tiny_shakespeare, "--input_file")), dtype=np.uint16
    )
    assert len(tokens) == 338_025
    published = {32: 0.2005, 64: 0.1002, 128: 0.0501, 256: 0.0251, 512: 0.0125, 1024: 0.0063}
    floors = {T: loss_floor(tokens, T) for T in published}
    assert floors == pytest.approx(published, abs=5.1e-5)
    assert smallest_seq_len(tokens, 0.099999, 1024) == 65
    assert smallest_seq_len(tokens, 0.001, 1024) is None


def test_smallest_seq_len_is_the_first_that_reaches_the_target():
    tokens = np.random.default_rng(0).integers(0, 4, 400).astype(np.uint16)
    target = 0.3
    expected = next(T for T in range(1, 100) if loss_floor(tokens, T) <= target)
    assert smallest_seq_len(tokens, target, 100) == expected
