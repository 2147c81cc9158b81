"""The model's products, each as its device computes it fastest: linear layers, attention, the loss.

References:
- Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762 (scaled dot-product attention)
- Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989 (loss and gradient of the head in chunks)
"""

import math
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear; for a few rows in fp32 on a CPU oneDNN's, which reads the weight twice as fast."""
    few_rows = x.device.type == "cpu" and x.numel() <= 16 * x.shape[-1]
    plain = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if few_rows and plain and not torch.is_grad_enabled():
        with suppress(AttributeError):  # a PyTorch built without oneDNN
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float
) -> torch.Tensor:
    """softmax(q k' / sqrt(head_dim)) v, where each position sees itself and those before it; all
    (B, n_head, T, head_dim).

    By PyTorch's fused kernel, with two exceptions. On a CPU its backward pass takes four times as
    long as the formula, which is used while its (T, T) scores take no more memory than the MLP's
    hidden layer. On an Apple GPU it has been wrong (PyTorch issues 181133 and 195910).
    """
    T, head_dim = q.shape[-2:]
    if q.device.type == "mps" or (q.device.type == "cpu" and 4 * head_dim >= T):
        return attention(q, k, v, q.new_ones(T, T, dtype=torch.bool).triu(1), dropout)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, unseen: torch.Tensor, dropout: float = 0.0
) -> torch.Tensor:
    """The formula itself; `unseen` (..., queries, keys) is true where a query must not look."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, n_head, queries, keys)
    weights = scores.masked_fill(unseen, -math.inf).softmax(-1, dtype=torch.float32).to(v.dtype)
    return F.dropout(weights, dropout) @ v


@dataclass
class KVCache:
    """Keys and values of the tokens that one attention layer has seen, from position 0 on."""

    slots: int
    length: int = 0  # slots in use
    keys: torch.Tensor | None = None  # (B, n_head, slots, head_dim)
    values: torch.Tensor | None = None

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store k and v behind what is there; q sees all up to its own position.

        All are (B, n_head, T, head_dim).
        """
        if self.keys is None or self.values is None:
            B, n_head, _, head_dim = k.shape
            self.keys = k.new_zeros(B, n_head, self.slots, head_dim)
            self.values = torch.zeros_like(self.keys)
        first = self.length
        end = self.length = first + k.shape[2]
        self.keys[:, :, first:end] = k
        self.values[:, :, first:end] = v
        unseen = torch.ones(k.shape[2], end, dtype=torch.bool, device=q.device).triu(first + 1)
        return attention(q, self.keys[:, :, :end], self.values[:, :, :end], unseen)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the head's logits, a scalar in nats, for features (N, C), weight (V, C)
    and targets (N,), N = B * T.

    The gradient is formed at once, so that logits need not be kept: they live `ROWS` rows at a time
    and in the precision of the products; softmax and sums are in fp32.
    """

    ROWS = 1024  # as many as keep the products fast; 100 MB in bf16
    BLOCK = 128  # rows whose softmax in fp32 stays in a CPU's caches; a GPU takes all at once

    @staticmethod
    def forward(
        ctx, features: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        kind = features.device.type
        N = len(features)
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            features, weight = features.to(dtype), weight.to(dtype)
        V = len(weight)
        weight = F.pad(weight, (0, 0, 0, -V % 64))  # odd widths slow the products down
        loss = torch.zeros((), device=features.device)
        d_features, d_weight = torch.empty_like(features), None
        with torch.autocast(kind, enabled=False):
            for start in range(0, N, HeadLoss.ROWS):
                rows = slice(start, start + HeadLoss.ROWS)
                logits = F.linear(features[rows], weight)  # (ROWS, V and the padding)
                height = HeadLoss.BLOCK if kind == "cpu" else HeadLoss.ROWS
                blocks = logits[:, :V].split(height), targets[rows, None].split(height)
                for block, target in zip(*blocks, strict=True):
                    log_p = F.log_softmax(block, -1, dtype=torch.float32)
                    loss -= log_p.gather(1, target).sum()
                    minus_one = -torch.ones_like(target, dtype=torch.float32)
                    block.copy_(log_p.exp_().scatter_add_(1, target, minus_one))
                # The logits are their gradient by now; that of the padding is zero.
                d_features[rows] = logits @ weight
                part = (logits.T @ features[rows])[:V]
                d_weight = part.float() if d_weight is None else d_weight.add_(part)
        ctx.save_for_backward(d_features, d_weight)
        return loss / N

    @staticmethod
    def backward(ctx, d_loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        d_features, d_weight = ctx.saved_tensors
        scale = d_loss / len(d_features)
        return d_features.mul_(scale), d_weight.mul_(scale), None
