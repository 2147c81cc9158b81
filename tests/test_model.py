"""The model is GPT-2: its size, its arithmetic, its start."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import train
from parts.compute.kernels import HeadLoss, causal_attention, linear
from parts.flags import PRESETS, VOCAB_SIZE, Config


def randomised(config: Config) -> train.GPT:
    """A model whose biases and LayerNorms are not the trivial ones of a fresh start."""
    model = train.GPT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def as_hugging_face(model: train.GPT, config: Config) -> GPT2LMHeadModel:
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
    config = Config(**PRESETS[preset])
    monkeypatch.setattr(
        train.GPT, "_initialise", lambda *_: None
    )  # shapes only: no memory, no random numbers
    with torch.device("meta"):
        model = train.GPT(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.n_params == parameters


def test_logits_and_loss_equal_hugging_face(config):
    config = replace(config, n_layer=3, n_embd=48, n_head=4)
    model = randomised(config).eval()
    reference = as_hugging_face(model, config)
    tokens = torch.randint(VOCAB_SIZE, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens[:, :-1])  # T = block_size
        expected = reference(tokens[:, :-1]).logits
        loss = model(tokens[:, :-2], tokens[:, 1:-1])
        labels = torch.cat(
            [torch.full((3, 1), -100), tokens[:, 1:-1]], dim=1
        )  # the reference shifts by itself
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
    tokens = torch.randint(VOCAB_SIZE, (1, 16), generator=torch.Generator().manual_seed(3))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % VOCAB_SIZE
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    assert (before[:, 9:] - after[:, 9:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize(("preset", "n_layer"), [("small", 6), ("gpt2", 2)])
def test_first_loss_is_ln_vocabulary(preset, n_layer):
    model = train.GPT(Config(**(PRESETS[preset] | {"n_layer": n_layer})))
    tokens = torch.randint(VOCAB_SIZE, (2, 65), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:]).item()
    assert abs(loss - math.log(VOCAB_SIZE)) < 0.3


def test_initial_weights_are_gpt2s():
    config = replace(Config(**PRESETS["small"]), n_layer=3)
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
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
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


def greedy(
    model: train.GPT, prompts: list[list[int]], new_tokens: int, context: int
) -> list[list[int]]:
    generators = [torch.Generator() for _ in prompts]
    return train.generate(
        model, prompts, new_tokens, context=context, temperature=0.0, top_k=0, generators=generators
    )


def without_cache(model: train.GPT, prompt: list[int], new_tokens: int, context: int) -> list[int]:
    """The plain loop: the last `context` tokens, computed anew each time."""
    tokens = torch.tensor([prompt])
    with train.evaluating(model):
        for _ in range(new_tokens):
            tokens = torch.cat(
                [tokens, model(tokens[:, -context:])[:, -1].argmax(-1, keepdim=True)], dim=1
            )
    return tokens[0].tolist()


@pytest.mark.parametrize(
    ("length", "context"), [(5, 16), (5, 8), (5, 5), (12, 8), (1, 16), (16, 16)]
)
def test_generation_with_a_cache_equals_generation_without(config, length, context):
    """Also where text grows beyond the context, or the prompt already is longer."""
    model = randomised(config)
    prompt = list(range(100, 100 + length))
    expected = without_cache(model, prompt, 20, context)
    assert greedy(model, [prompt], 20, context) == [expected]
    assert len(set(expected[length:])) > 3, "text that could not differ proves nothing"
    if context == 8:
        assert without_cache(model, prompt, 20, 4) != expected


def test_prompts_share_a_batch_and_nothing_else(config):
    model = randomised(config)
    prompts = [list(range(start, start + 11)) for start in (0, 50, 9, 200)]
    assert greedy(model, prompts, 12, 16) == [
        without_cache(model, prompt, 12, 16) for prompt in prompts
    ]

    def drawn(prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return train.generate(
            model, prompts, 12, context=16, temperature=1.0, top_k=9, generators=generators
        )

    together = drawn(prompts, [1, 2, 3, 4])
    assert together == [
        drawn([prompt], [seed])[0] for prompt, seed in zip(prompts, [1, 2, 3, 4], strict=True)
    ]


def test_tokens_come_one_by_one(config):
    prompts, generators = [[1, 2], [3, 4]], [torch.Generator(), torch.Generator()]
    options = dict(context=16, temperature=0.0, top_k=0, generators=generators)
    model = randomised(config)
    told = list(train.continuations(model, prompts, 6, **options))
    rows = train.generate(model, prompts, 6, **options)
    assert [list(new) for new in zip(*told, strict=True)] == [rows[0][2:], rows[1][2:]]


def test_top_p_leaves_the_likeliest_that_make_it_up():
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log()

    def drawn(top_p: float) -> set[int]:
        return {
            train.choose(logits, 1.0, 0, top_p, torch.Generator().manual_seed(seed))
            for seed in range(400)
        }

    assert drawn(1e-6) == drawn(0.4) == {1}
    assert (
        drawn(0.41) == drawn(0.69) == {1, 3}
        and drawn(0.8) == {1, 3, 4}
        and drawn(1.0) == {0, 1, 2, 3, 4}
    )


@pytest.mark.parametrize("rows", [1, 5, 130, 2100])
def test_the_head_loss_is_cross_entropy_and_so_is_its_gradient(rows):
    """One row, a part of a block, more than a block, more than a chunk; a vocabulary no multiple of
    64."""
    torch.manual_seed(0)
    features, weight = torch.randn(rows, 24), torch.randn(389, 24) * 0.3
    targets = torch.randint(0, 389, (rows,))
    found = [features.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = [features.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = HeadLoss.apply(*found, targets)
    reference = F.cross_entropy(F.linear(*expected), targets)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    (3 * loss).backward()
    (3 * reference).backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_loss_in_half_precision_keeps_its_sums_in_fp32(dtype):
    torch.manual_seed(0)
    features, weight, targets = (
        torch.randn(512, 64),
        torch.randn(1000, 64) * 0.1,
        torch.randint(0, 1000, (512,)),
    )
    found = [features.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = [features.double().requires_grad_(), weight.double().requires_grad_()]
    with torch.autocast("cpu", dtype):
        loss = HeadLoss.apply(*found, targets)
    reference = F.cross_entropy(F.linear(*expected), targets)
    loss.backward()
    reference.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(reference.item(), abs=1e-3)
    for one, other in zip(found, expected, strict=True):
        error = (one.grad - other.grad).norm() / other.grad.norm()
        assert error < (0.01 if dtype == torch.bfloat16 else 0.002)


@pytest.mark.parametrize("T", [1, 7, 64, 256, 257])
def test_causal_attention_equals_the_fused_kernel(T):
    """Up to 4 * head_dim positions by the formula, beyond by PyTorch's kernel: values and
    gradients."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, T, 64, requires_grad=True) for _ in range(3)]
    others = [x.detach().clone().requires_grad_() for x in inputs]
    found = causal_attention(*inputs, 0.0)
    expected = F.scaled_dot_product_attention(*others, is_causal=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(inputs, others, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4, 16, 17])
def test_linear_is_linear_with_few_rows_too(rows):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 96), torch.randn(200, 96), torch.randn(200)
    with torch.no_grad():
        torch.testing.assert_close(
            linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_top_k_and_temperature(config):
    model = randomised(replace(config, vocab_size=300))

    def drawn(**arguments) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(400)]
        rows = train.generate(model, [[0]] * 400, 1, context=16, generators=generators, **arguments)
        return torch.tensor(rows)[:, 1]

    with torch.no_grad():
        likeliest = model.eval()(torch.tensor([[0]]))[0, -1].topk(3).indices
    assert set(drawn(temperature=1.0, top_k=3).tolist()) == set(likeliest.tolist())
    assert set(drawn(temperature=0.0, top_k=0).tolist()) == {likeliest[0].item()}
    assert len(set(drawn(temperature=1.0, top_k=0).tolist())) > 20
    assert torch.equal(drawn(temperature=1.0, top_k=5), drawn(temperature=1.0, top_k=5))
