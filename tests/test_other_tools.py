"""benchmarks/other_tools.py: what its own side of the comparison says."""

import math

import torch
import torch.nn.functional as F
from conftest import TINY_FLAGS

import sample
import train
from benchmarks.other_tools import compare, rolling_bits_per_byte


def test_bits_per_byte_measure_each_token_once(tmp_path, text_file):
    run = tmp_path / "run"
    assert train.main([*TINY_FLAGS, f"--input_file={text_file}", f"--out_dir={run}"]) == 0
    sampler = sample.Sampler(run / "checkpoints/best.pt", "cpu", "off")
    text = "Line 5: two windows and a part of one, é."
    ids = [sampler.tokenizer.eot_token, *sampler.tokenizer.encode_ordinary(text)]
    context = sampler.context
    assert 2 * context < len(ids) - 1 < 3 * context, "two whole windows and a part"
    nats = 0.0
    for target in range(1, len(ids)):
        whole = (target - 1) // context * context
        first = whole if whole + context < len(ids) else len(ids) - 1 - context
        with torch.no_grad():
            logits = sampler.model(torch.tensor([ids[first:target]]))[0, -1]
        nats += F.cross_entropy(logits.double(), torch.tensor(ids[target])).item()
    expected = nats / math.log(2) / len(text.encode())
    assert math.isclose(rolling_bits_per_byte(sampler, text), expected, rel_tol=1e-6)


def test_what_differs_is_said():
    own = {"ids": [1, 2], "log_probs": [-1.0], "greedy": "ab", "bits_per_byte": 2.0}
    same = compare(own | {"version": "1"}, own)
    assert same["ids"] == same["greedy"] == "equal" and same["log_prob_off"] == 0.0
    other = {"version": "1", "ids": [1, 3], "log_probs": [-1.5], "greedy": "ac"}
    found = compare(other, own)
    assert (found["ids"], found["log_prob_off"], found["greedy"]) == ("differ", 0.5, "differs")
    assert "bits_per_byte_off" not in found
