"""The model is GPT-2: its size, its arithmetic, its start."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import train


def randomised(config: train.Config) -> train.GPT:
    """A model whose biases and LayerNorms are not the trivial ones of a fresh start."""
    model = train.GPT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def as_hugging_face(model: train.GPT, config: train.Config) -> GPT2LMHeadModel:
    """Hugging Face's GPT-2 with the same weights; its Conv1D stores matrices transposed."""
    reference = GPT2LMHeadModel(
        GPT2Config(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_positions=config.block_size,
            attn_implementation="eager",
        )
    )
    weights = {}
    for name, value in model.state_dict().items():
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weights["transformer." + name] = value.T if transposed else value
    weights["lm_head.weight"] = model.wte.weight
    reference.load_state_dict(weights)
    return reference.eval()


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("small", 44_909_056),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_parameter_count(preset, parameters, monkeypatch):
    config = train.Config(**train.PRESETS[preset])
    monkeypatch.setattr(train.GPT, "_initialise", lambda *_: None)  # shapes only: no memory, no random numbers
    with torch.device("meta"):
        model = train.GPT(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.n_params == parameters


def test_logits_and_loss_equal_hugging_face(config):
    config = replace(config, n_layer=3, n_embd=48, n_head=4)
    model = randomised(config).eval()
    reference = as_hugging_face(model, config)
    tokens = torch.randint(train.VOCAB_SIZE, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens[:, :-1])  # T = block_size
        expected = reference(tokens[:, :-1]).logits
        loss = model(tokens[:, :-2], tokens[:, 1:-1])
        labels = torch.cat([torch.full((3, 1), -100), tokens[:, 1:-1]], dim=1)  # the reference shifts by itself
        expected_loss = reference(tokens[:, :-1], labels=labels).loss
    assert expected.std() > 0.5, "the comparison needs logits that differ"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-4)


def test_attention_is_the_masked_formula(config):
    attention = train.CausalSelfAttention(config).eval()
    x = torch.randn(2, 9, config.n_embd, generator=torch.Generator().manual_seed(2))
    q, k, v = attention.c_attn(x).chunk(3, dim=-1)
    heads = []
    size = config.n_embd // config.n_head
    for head in range(config.n_head):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[..., part])
    expected = attention.c_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-6)


def test_later_tokens_do_not_change_earlier_logits(config):
    model = randomised(config).eval()
    tokens = torch.randint(train.VOCAB_SIZE, (1, 16), generator=torch.Generator().manual_seed(3))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % train.VOCAB_SIZE
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    assert (before[:, 9:] - after[:, 9:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize(("preset", "n_layer"), [("small", 6), ("gpt2", 2)])
def test_first_loss_is_ln_vocabulary(preset, n_layer):
    model = train.GPT(train.Config(**(train.PRESETS[preset] | {"n_layer": n_layer})))
    tokens = torch.randint(train.VOCAB_SIZE, (2, 65), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:]).item()
    assert abs(loss - math.log(train.VOCAB_SIZE)) < 0.3


def test_initial_weights_are_gpt2s():
    config = replace(train.Config(**train.PRESETS["small"]), n_layer=3)
    model = train.GPT(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(2 * 3) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(parameter.mean().item()) < expected / 50, name


def test_same_seed_same_weights(config):
    first, second, other = train.GPT(config), train.GPT(config), train.GPT(replace(config, seed=2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.wte.weight, other.wte.weight)


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_gives_the_mode_back(config, training):
    model = train.GPT(config).train(training)
    with train.evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
    assert model.training is training and torch.is_grad_enabled()
    with pytest.raises(KeyError), train.evaluating(model):
        raise KeyError
    assert model.training is training and model.h[0].attn.training is training


def test_dropout_acts_in_training_only(config):
    model = randomised(replace(config, dropout=0.5))
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        assert not torch.equal(model(tokens), model(tokens))
        model.eval()
        assert torch.equal(model(tokens), model(tokens))


def test_generation_sees_the_trained_context_only(config):
    """Greedy text equals the plain loop that crops to the last `context` tokens."""
    model = randomised(config)
    prompt = torch.arange(5)[None]
    arguments = dict(temperature=0.0, top_k=0, generator=torch.Generator())
    generated = train.generate(model, prompt, 20, context=8, **arguments)
    expected = prompt
    model.eval()
    for _ in range(20):
        with torch.no_grad():
            logits = model(expected[:, -8:])
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, expected)
    assert not torch.equal(generated, train.generate(model, prompt, 20, context=4, **arguments))


def test_top_k_and_temperature(config):
    model = randomised(config)
    prompt = torch.zeros(400, 1, dtype=torch.long)

    def drawn(**arguments) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        return train.generate(model, prompt, 1, context=16, generator=generator, **arguments)[:, 1]

    with torch.no_grad():
        likeliest = model.eval()(prompt[:1])[0, -1].topk(3).indices
    assert set(drawn(temperature=1.0, top_k=3).tolist()) == set(likeliest.tolist())
    assert set(drawn(temperature=0.0, top_k=0).tolist()) == {likeliest[0].item()}
    assert len(set(drawn(temperature=1.0, top_k=0).tolist())) > 20
    assert torch.equal(drawn(temperature=1.0, top_k=5), drawn(temperature=1.0, top_k=5))
