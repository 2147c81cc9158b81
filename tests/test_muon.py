"""Muon: orthogonal as an SVD says, each state what its definition says, the same whatever is worked
on together."""

import copy

import pytest
import torch

from parts.compute import muon

SHAPES = [
    (48, 16),
    (16, 16),
    (64, 16),
    (16, 64),
    (16, 20),
]  # high, square, wide, and hardly wider than high


def spectrum(shape: tuple[int, int], decades: float) -> torch.Tensor:
    """Two matrices whose singular values fall by so many powers of ten."""
    U, S, V = torch.linalg.svd(
        torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)), full_matrices=False
    )
    return U * 10 ** torch.linspace(0, -decades, S.shape[-1]) @ V


def polynomial(values: torch.Tensor) -> torch.Tensor:
    """What the iteration makes of singular values, one number at a time in float64."""
    for a, b, c in muon.POLAR_EXPRESS:
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decades", [0, 1, 3, 6])
def test_polar_factor_changes_singular_values_alone(shape, decades):
    """Singular vectors stay; values become what the polynomials make of them: the slow reference is
    an SVD."""
    matrices = spectrum(shape, decades)
    U, S, V = torch.linalg.svd(matrices.double(), full_matrices=False)
    S = S / torch.linalg.vector_norm(S, dim=-1, keepdim=True)
    expected = U * polynomial(S)[:, None] @ V
    found = muon.polar_factor(matrices, torch.float32)
    torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 192), (96, 64)], ids=str)
@pytest.mark.parametrize("decades", [0, 1.5, 3, 6])
def test_bf16_is_as_orthogonal_as_fp32(shape, decades):
    """Also where the singular values differ by more than bf16 can hold beside each other."""
    matrices = spectrum(shape, decades)
    U, _, V = torch.linalg.svd(matrices, full_matrices=False)

    def likeness(dtype: torch.dtype) -> float:
        found = muon.polar_factor(matrices, dtype).float()
        assert torch.linalg.svdvals(found).max() < 1.8
        return torch.nn.functional.cosine_similarity(
            found.flatten(), (U @ V).flatten(), dim=0
        ).item()

    assert likeness(torch.bfloat16) > likeness(torch.float32) - 0.02


def test_singular_values_above_a_hundredth_come_to_about_one():
    values = torch.logspace(-2, 0, 200, dtype=torch.float64)
    assert polynomial(values).min() > 0.4 and polynomial(values).max() < 1.6


def reference_step(weight, gradient, buffer, mean_square, *, lr, weight_decay, momentum, beta2):
    """One step as Jordan et al. and Li et al. write it, with an SVD-free polar factor of one matrix
    at a time."""
    buffer = momentum * buffer + (1 - momentum) * gradient
    direction = muon.polar_factor(
        (momentum * buffer + (1 - momentum) * gradient)[None], torch.float32
    )[0]
    mean_square = beta2 * mean_square + (1 - beta2) * direction.pow(2).mean(1, keepdim=True)
    direction = direction / mean_square.sqrt()
    direction = 0.2 * direction / direction.pow(2).mean().sqrt()
    return weight * (1 - lr * weight_decay) - lr * direction, buffer, mean_square


def made(count: int = 2) -> tuple[list[torch.nn.Parameter], muon.Muon]:
    generator = torch.Generator().manual_seed(2)
    matrices = [
        torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES * count
    ]
    return matrices, muon.Muon(
        matrices, lr=0.05, weight_decay=0.1, momentum=0.8, beta2=0.9, dtype=torch.float32
    )


def take_step(matrices: list[torch.nn.Parameter], optimizer: muon.Muon, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for matrix in matrices:
        matrix.grad = torch.randn(matrix.shape, generator=generator) * 10.0 ** (step % 3 - 1)
    optimizer.step()


def test_steps_and_states_are_those_of_the_definition():
    matrices, optimizer = made()
    states = [(m.detach().clone(), torch.zeros_like(m), torch.zeros(len(m), 1)) for m in matrices]
    for step in range(4):
        take_step(matrices, optimizer, step)
        for number, matrix in enumerate(matrices):
            settings = dict(lr=0.05, weight_decay=0.1, momentum=0.8, beta2=0.9)
            states[number] = reference_step(
                states[number][0], matrix.grad, *states[number][1:], **settings
            )
            found = (
                matrix,
                optimizer.state[matrix]["momentum_buffer"],
                optimizer.state[matrix]["row_mean_square"],
            )
            for expected, value in zip(states[number], found, strict=True):
                torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-3, atol=1e-4)


def test_every_update_is_as_large_as_the_rate_says():
    matrices, optimizer = made()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for step in range(3):
        before = [matrix.detach().clone() for matrix in matrices]
        take_step(matrices, optimizer, step)
        for matrix, old in zip(matrices, before, strict=True):
            assert (matrix - old).square().mean().sqrt().item() == pytest.approx(
                0.2 * 0.05, rel=1e-3
            )


def test_rows_of_an_update_become_alike():
    """A row that always moves less than the others is brought up to them."""
    matrix = torch.nn.Parameter(torch.zeros(32, 16))
    scales = torch.linspace(0.05, 1, 32)[:, None]

    def spread(beta2: float) -> float:
        optimizer = muon.Muon([matrix], lr=1.0, weight_decay=0.0, beta2=beta2, dtype=torch.float32)
        for step in range(20):
            old = matrix.detach().clone()
            matrix.grad = (
                torch.randn(32, 16, generator=torch.Generator().manual_seed(step)) * scales
            )
            optimizer.step()
        rows = (matrix - old).norm(dim=1)
        return (rows.max() / rows.min()).item()

    assert spread(0.9) < 3 and spread(1.0) > 2 * spread(0.9)


def test_matrices_worked_on_together_do_not_see_each_other(monkeypatch):
    together, optimizer = made(3)
    alone, other = made(3)
    for step in range(3):
        take_step(together, optimizer, step)
        with monkeypatch.context() as patch:
            patch.setattr(muon, "BATCH_ELEMENTS", 1)
            take_step(alone, other, step)
    for first, second in zip(together, alone, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_a_gradient_of_zero_only_decays_the_weights():
    matrices, optimizer = made()
    for matrix in matrices:
        matrix.grad = torch.zeros_like(matrix)
    before = [matrix.detach().clone() for matrix in matrices]
    optimizer.step()
    for matrix, old in zip(matrices, before, strict=True):
        torch.testing.assert_close(matrix.detach(), old * (1 - 0.05 * 0.1))


def test_a_matrix_without_a_gradient_is_left_alone():
    matrices, optimizer = made()
    matrices[0].grad = torch.ones_like(matrices[0])
    before = [matrix.detach().clone() for matrix in matrices]
    optimizer.step()
    assert not torch.equal(matrices[0], before[0])
    assert all(
        torch.equal(matrix, old) for matrix, old in zip(matrices[1:], before[1:], strict=True)
    )


def test_a_restored_state_continues_bit_for_bit():
    matrices, optimizer = made()
    for step in range(3):
        take_step(matrices, optimizer, step)
    copies = [torch.nn.Parameter(matrix.detach().clone()) for matrix in matrices]
    restored = muon.Muon(
        copies, lr=0.05, weight_decay=0.1, momentum=0.8, beta2=0.9, dtype=torch.float32
    )
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 5):
        take_step(matrices, optimizer, step)
        take_step(copies, restored, step)
    assert all(torch.equal(first, second) for first, second in zip(matrices, copies, strict=True))


def test_few_operations_however_many_layers():
    """Matrices of one shape cost as many products as one of them."""

    def products(count: int) -> int:
        matrices, optimizer = made(count)
        take_step(matrices, optimizer, 0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            take_step(matrices, optimizer, 1)
        return sum(
            event.count
            for event in profile.key_averages()
            if event.key in ("aten::bmm", "aten::baddbmm")
        )

    assert products(1) == products(6) <= 14 * len(SHAPES)
