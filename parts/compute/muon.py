"""Muon, the optimizer of the matrices: momentum, made orthogonal, its rows brought to one scale.

Matrices of one shape are worked on together, so that a step is a few dozen large operations.

References:
- Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
- Amsel et al. 2025, "The Polar Express", arXiv 2505.16932 (the coefficients)
- Li et al. 2025, "NorMuon", arXiv 2510.05491 (the mean square of each row)
- Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv 2502.16982 (the size of updates)
"""

import torch

# Step by step, p(x) = a x + b x^3 + c x^5 brings singular values between 0.001 and 1 to about 1
# (Amsel et al.). Above 1 it would grow fast: values are taken as 2 % smaller, as room to round.
MARGIN = 1.02
POLAR_EXPRESS = tuple(
    (a / MARGIN, b / MARGIN**3, c / MARGIN**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196736706015, -2.488488024314874, 0.51004894012372),
    )
)
# Of an update, in learning rates: about AdamW's, so that one rate suits both (Liu et al.).
UPDATE_RMS = 0.2
BATCH_ELEMENTS = 2**26  # of the matrices worked on at once; bounds the memory of a step
TINY = 1e-20


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, then divided by the root mean square of each row so far.

    `params` are matrices (m, n). An update's root mean square is 0.2 `lr`; `weight_decay` is
    decoupled, times `lr`; `momentum` and `beta2` are the decays of the mean gradient and of the
    rows' mean squares; `dtype` is the precision of the orthogonalisation. State of a matrix:
    `momentum_buffer` (m, n) and `row_mean_square` (m, 1). A state of `torch.optim.Muon`, which has
    the first alone, can be continued.
    """

    def __init__(
        self,
        params,
        lr: float,
        weight_decay: float,
        momentum: float = 0.9,
        beta2: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ):
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2)
        super().__init__(params, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure: the gradients are there
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    same_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in same_shape.items():
                at_once = max(1, BATCH_ELEMENTS // shape.numel())
                for start in range(0, len(matrices), at_once):
                    self._update(matrices[start : start + at_once], group)

    def _update(self, matrices: list[torch.Tensor], group: dict) -> None:
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        buffers, row_mean_squares = [], []
        for matrix in matrices:
            state = self.state[matrix]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            if "row_mean_square" not in state:  # a state of torch.optim.Muon has none either
                state["row_mean_square"] = matrix.new_zeros(len(matrix), 1)
            buffers.append(state["momentum_buffer"])
            row_mean_squares.append(state["row_mean_square"])
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        looking_ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
        update = polar_factor(torch.stack(looking_ahead), self.dtype).float()  # (matrices, m, n)
        norms = torch.linalg.vector_norm(update, dim=-1, keepdim=True)
        squares = norms.square() / update.shape[-1]  # (matrices, m, 1)
        torch._foreach_lerp_(row_mean_squares, list(squares), 1 - group["beta2"])
        # The mean squares begin at zero, too small by one factor for all rows; `mean` has it too.
        scale = torch.stack(row_mean_squares).clamp(min=TINY).rsqrt()
        mean = (squares * scale.square()).mean(-2, keepdim=True)
        scale *= UPDATE_RMS * mean.clamp(min=TINY).rsqrt()
        update *= scale
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(update), alpha=-group["lr"])


def polar_factor(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """About U V' of the singular value decompositions U S V' of matrices (k, m, n): four steps of
    the Polar Express.

    A step is X <- (a I + b G + c G^2) X with G = X X', or for tall X the same from the right with
    G = X' X. Where one side is much longer, two steps at a time are taken on the small G, and X is
    multiplied once, by the product of both factors. Not all four: what bf16 rounds off the smallest
    eigenvalues of G grows a^2-fold in each step, and would pass 1 in the third. For the same reason
    the multiple of I is kept apart: on the diagonal it would be rounded to 1/16.
    """
    m, n = matrices.shape[-2:]
    tall = m > n
    x = (matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=TINY)).to(dtype)
    at_once = 2 if 2 * max(m, n) > 3 * min(m, n) else 1
    for first in range(0, len(POLAR_EXPRESS), at_once):
        gram = x.mT @ x if tall else x @ x.mT  # square, as high as the shorter side
        (scale, b, c), *more = POLAR_EXPRESS[first : first + at_once]
        # The steps so far multiply X by scale I + rest.
        rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        for a, b, c in more:
            square = torch.baddbmm(rest, rest, rest, beta=2 * scale)  # of that, less scale^2 I
            gram = torch.baddbmm(gram, square, gram, beta=scale**2)
            step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            rest = torch.baddbmm(a * rest + scale * step, step, rest)
            scale *= a
        x = torch.baddbmm(x, x, rest, beta=scale) if tall else torch.baddbmm(x, rest, x, beta=scale)
    return x
