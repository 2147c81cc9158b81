"""torch.compile, proven: what is compiled computes what the model computes, there and back."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from parts.compute.device import is_out_of_memory, release_memory
from parts.flags import Config


def compile_proven(
    model: nn.Module, trial: Callable[..., torch.Tensor], steps: Iterable[int], config: Config
) -> Callable[..., torch.Tensor]:
    """The model compiled, for the shapes of these steps.

    `trial(step, forward, pieces)` computes loss and gradients of some slices of a step, in so many pieces. Raises
    ArithmeticError when the compiled model has others than the model itself, and whatever the compiler raises.
    """
    compiled = torch.compile(model, dynamic=False)
    for step in steps:
        found = measures(model, trial(step, compiled, 1))
        try:
            expected = measures(model, trial(step, model, 4))  # uncompiled it takes more memory
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            compare(found, expected, [name for name, _ in model.named_parameters()], config)
        model.zero_grad(set_to_none=True)
        release_memory(torch.device(config.device))
    return compiled


def measures(model: nn.Module, loss: torch.Tensor) -> list[float]:
    """The loss, then the norm of each parameter's gradient; the gradients are gone afterwards."""
    norms = [
        parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None
    ]
    model.zero_grad(set_to_none=True)
    return torch.stack([loss, *norms]).tolist()


def compare(found: list[float], expected: list[float], names: list[str], config: Config) -> None:
    """Raises ArithmeticError when they differ by more than rounding, or with dropout by more than its chance."""
    tolerance = 0.5 if config.dropout else 0.05
    noise = (
        tolerance * max(filter(math.isfinite, expected[1:]), default=0.0) / 5
    )  # some gradients are nothing else
    labels = ["the loss", *(f"the gradient norm of {name}" for name in names)]
    for label, compiled, otherwise in zip(labels, found, expected, strict=True):
        if config.amp == "fp16" and not math.isfinite(compiled):
            continue  # fp16 overflows earlier in larger pieces
        if (
            math.isfinite(otherwise)
            and not abs(compiled - otherwise) <= tolerance * abs(otherwise) + noise
        ):
            raise ArithmeticError(
                f"{label} is {compiled:.6g} compiled and {otherwise:.6g} otherwise"
            )
