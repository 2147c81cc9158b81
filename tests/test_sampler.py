"""A batch is a pure function of (seed, step), and every start is equally likely."""

from dataclasses import replace

import numpy as np

import train


def test_every_start_is_equally_likely():
    """Chi-squared over 50 starts and 200,000 draws: 49 degrees of freedom, 99.99 % below 95."""
    starts = np.concatenate([train.slice_starts(7, step, 100, 50) for step in range(1, 2001)])
    counts = np.bincount(starts, minlength=50)
    assert len(counts) == 50
    assert ((counts - 4000) ** 2 / 4000).sum() < 95


def test_first_and_last_start_are_drawn(config):
    tokens = np.arange(20, dtype=np.uint16)
    slices = train.draw_slices(tokens, config, stream=1, count=200)  # T = 16: starts 0, 1, 2, 3
    assert set(slices[:, 0].tolist()) == {0, 1, 2, 3}
    assert slices.max() == 19
    assert (slices.diff(dim=1) == 1).all()


def test_a_corpus_of_one_slice_has_one_start(config):
    slices = train.draw_slices(np.arange(17, dtype=np.uint16), config, stream=1, count=5)
    assert (slices == slices[0]).all() and slices[0, 0] == 0


def test_a_batch_depends_on_seed_and_step_alone(config):
    tokens = np.arange(1000, dtype=np.uint16)
    np.random.seed(0)
    first = train.draw_slices(tokens, config, stream=3, count=8)
    np.random.seed(1)
    train.draw_slices(tokens, config, stream=9, count=8)
    assert first.equal(train.draw_slices(tokens, config, stream=3, count=8))
    assert not first.equal(train.draw_slices(tokens, config, stream=4, count=8))
    assert not first.equal(train.draw_slices(tokens, replace(config, seed=0), stream=3, count=8))


def test_the_cut_into_micro_batches_changes_no_slice(config):
    tokens = np.arange(1000, dtype=np.uint16)
    corpus = train.Corpus(tokens, "", len(tokens))
    whole = train.Trainer(replace(config, batch_size=8, grad_accum=1), corpus, None).slices(5)
    parts = train.Trainer(replace(config, batch_size=2, grad_accum=4), corpus, None).slices(5)
    assert whole.equal(parts)


def test_neighbouring_steps_share_no_stream():
    """With the step in Philox's counter, step s + 1 would repeat the words of step s shifted by four."""
    words = np.concatenate([train.random_words(1337, step, 256) for step in range(1, 201)])
    assert len(np.unique(words)) == len(words)
    other_seed = np.concatenate([train.random_words(1338, step, 256) for step in range(1, 201)])
    assert not np.isin(words, other_seed).any()


def test_the_words_are_philox_as_published():
    """Random123's known answer for philox4x64-10 with counter and key zero; NumPy counts from one."""
    bits = np.random.Philox(counter=np.array([2**64 - 1] * 4, dtype=np.uint64), key=np.zeros(2, dtype=np.uint64))
    assert [hex(word) for word in bits.random_raw(2).tolist()] == ["0x16554d9eca36314c", "0xdb20fe9d672d0fdc"]
    assert train.random_words(0, 0, 1)[0] == np.random.Philox(key=np.zeros(2, dtype=np.uint64)).random_raw()


def test_large_words_stay_in_range():
    starts = train.slice_starts(2**63 - 1, 2**63, 10_000, 338_025 - 128)
    assert starts.dtype == np.int64 and starts.min() >= 0 and starts.max() < 338_025 - 128
