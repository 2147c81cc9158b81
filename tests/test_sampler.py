"""A batch is a pure function of (seed, step), and every start is equally likely."""

from dataclasses import replace

import numpy as np

import train
from parts.text.corpus import Corpus


def test_every_start_is_equally_likely():
    """Chi-squared over 50 starts and 200,000 draws: 49 degrees of freedom, 99.99 % below 95."""
    starts = np.concatenate([train.slice_starts(7, step, 100, 50) for step in range(1, 2001)])
    counts = np.bincount(starts, minlength=50)
    assert len(counts) == 50
    assert ((counts - 4000) ** 2 / 4000).sum() < 95


def test_every_start_of_the_covering_slices_is_equally_likely():
    """Over seeds: 20 starts, slices of 6, so that the ring does not divide evenly (19 degrees of
    freedom)."""
    for first in (0, 3, 4):
        starts = [train.covering_starts(seed, first, 1, 20, 6)[0] for seed in range(10_000)]
        assert ((np.bincount(starts, minlength=20) - 500) ** 2 / 500).sum() < 51


def test_a_pass_takes_all_of_the_text_but_its_ends_and_little_of_it_twice():
    n_starts, T = 1000, 30
    per_pass = 34  # 1000 / 30, rounded up
    for number in (0, 1, 7):
        starts = train.covering_starts(5, number * per_pass, per_pass, n_starts, T)
        targets = np.concatenate([start + 1 + np.arange(T) for start in starts])
        times = np.bincount(targets, minlength=n_starts + T)
        assert len(times) == n_starts + T, "within the text"
        assert times[starts.min() + 1 : starts.max() + T + 1].min() == 1, "no gap between its ends"
        assert (times[1:] == 0).sum() < T and (times == 2).sum() < T and times.max() == 2
        assert (np.diff(starts) != T).mean() > 0.8, "in random order"
    assert not np.array_equal(
        train.pass_starts(5, 0, n_starts, T), train.pass_starts(5, 1, n_starts, T)
    )
    assert not np.array_equal(
        train.pass_starts(5, 0, n_starts, T), train.pass_starts(6, 0, n_starts, T)
    )


def test_slices_do_not_depend_on_how_they_are_asked_for():
    """Step by step, a step over the seam of two passes, all at once: the same."""
    whole = train.covering_starts(3, 0, 60, 100, 7)
    for size in (1, 4, 9, 60):
        parts = [
            train.covering_starts(3, first, min(size, 60 - first), 100, 7)
            for first in range(0, 60, size)
        ]
        assert np.array_equal(np.concatenate(parts), whole)
    assert whole.dtype == np.int64 and whole.min() >= 0 and whole.max() <= 99


def test_first_and_last_start_are_drawn(config):
    """20 tokens, T = 16: starts 0, 1, 2, 3."""
    starts = train.covering_starts(1, 0, 200, 4, 16)
    slices = train.take_slices(np.arange(20, dtype=np.uint16), starts, 16)
    assert set(slices[:, 0].tolist()) == {0, 1, 2, 3}
    assert slices.max() == 19
    assert (slices.diff(dim=1) == 1).all()


def test_a_corpus_of_one_slice_has_one_start():
    assert set(train.covering_starts(1, 0, 5, 1, 16)) == {0}


def test_a_batch_depends_on_seed_and_step_alone(config):
    tokens = np.arange(1000, dtype=np.uint16)
    corpus = Corpus(tokens, "", len(tokens))
    trainer, other = (train.Trainer(replace(config, seed=seed), corpus, None) for seed in (1, 2))
    np.random.seed(0)
    first = trainer.slices(3)[0]
    np.random.seed(1)
    trainer.slices(9)
    assert first.equal(trainer.slices(3)[0])
    assert not first.equal(trainer.slices(4)[0]) and not first.equal(other.slices(3)[0])


def test_independent_slices_start_anywhere(config):
    """Uniform, with repetitions, a function of seed and step; shuffled ones repeat nothing within a
    pass."""
    corpus = Corpus(np.arange(1000, dtype=np.uint16), "", 1000)

    def starts(slices: str, seed: int = 1) -> list[int]:
        trainer = train.Trainer(
            replace(config, slices=slices, seed=seed, batch_size=8), corpus, None
        )
        return [start for step in range(1, 8) for start in trainer.slices(step)[0][:, 0].tolist()]

    assert starts("independent") == starts("independent") != starts("independent", seed=2)
    expected = [train.slice_starts(1, step, 8, 1000 - config.seq_len) for step in range(1, 8)]
    assert starts("independent") == np.concatenate(expected).tolist()

    def overlaps(found: list[int]) -> int:
        return sum(abs(a - b) < config.seq_len for i, a in enumerate(found) for b in found[:i])

    assert overlaps(starts("independent")) > 20 >= overlaps(starts("shuffled"))


def test_the_cut_into_micro_batches_changes_no_slice(config):
    tokens = np.arange(1000, dtype=np.uint16)
    corpus = Corpus(tokens, "", len(tokens))
    whole = train.Trainer(replace(config, batch_size=8, grad_accum=1), corpus, None).slices(5)[0]
    parts = train.Trainer(replace(config, batch_size=2, grad_accum=4), corpus, None).slices(5)[0]
    assert whole.equal(parts)


def test_neighbouring_steps_share_no_stream():
    """With the step in Philox's counter, step s + 1 would repeat the words of step s shifted by
    four."""
    words = np.concatenate([train.random_words(1337, step, 256) for step in range(1, 201)])
    assert len(np.unique(words)) == len(words)
    other_seed = np.concatenate([train.random_words(1338, step, 256) for step in range(1, 201)])
    assert not np.isin(words, other_seed).any()


def test_the_words_are_philox_as_published():
    """Random123's known answer for philox4x64-10 with counter and key zero; NumPy counts from
    one."""
    bits = np.random.Philox(
        counter=np.array([2**64 - 1] * 4, dtype=np.uint64), key=np.zeros(2, dtype=np.uint64)
    )
    assert [hex(word) for word in bits.random_raw(2).tolist()] == [
        "0x16554d9eca36314c",
        "0xdb20fe9d672d0fdc",
    ]
    assert (
        train.random_words(0, 0, 1)[0]
        == np.random.Philox(key=np.zeros(2, dtype=np.uint64)).random_raw()
    )


def test_large_words_stay_in_range():
    starts = train.slice_starts(2**63 - 1, 2**63, 10_000, 338_025 - 128)
    assert starts.dtype == np.int64 and starts.min() >= 0 and starts.max() < 338_025 - 128
