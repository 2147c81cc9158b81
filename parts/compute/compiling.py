"""torch.compile, proven: what is compiled computes what the model computes, there and back."""

import math

import torch
from torch import nn

from parts.flags import Config


def loss_and_gradient_norms(model: nn.Module, loss: torch.Tensor) -> list[float]:
    """The loss, then the norm of each parameter's gradient; the gradients are gone afterwards."""
    norms = [
        parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None
    ]
    model.zero_grad(set_to_none=True)
    return torch.stack([loss, *norms]).tolist()


def check_compiled(
    compiled: list[float], expected: list[float], names: list[str], config: Config
) -> None:
    """Compare loss and gradient norms, `names` being those of the parameters.

    Raises ArithmeticError when they differ by more than rounding, or with dropout by more than
    its chance.
    """
    tolerance = 0.5 if config.dropout else 0.05
    largest = max(filter(math.isfinite, expected[1:]), default=0.0)
    noise = tolerance * largest / 5  # some gradients are nothing else
    labels = ["the loss", *(f"the gradient norm of {name}" for name in names)]
    for label, found, wanted in zip(labels, compiled, expected, strict=True):
        if config.amp == "fp16" and not math.isfinite(found):
            continue  # fp16 overflows earlier in larger pieces
        if math.isfinite(wanted) and not abs(found - wanted) <= tolerance * abs(wanted) + noise:
            raise ArithmeticError(f"{label} is {found:.6g} compiled and {wanted:.6g} otherwise")
