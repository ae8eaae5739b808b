"""The small parts that models are built of, and their initialisation.

GemNet's Dense, Residual and ScaleFactor: Gasteiger, Becker, Guennemann, "GemNet: Universal Directional Graph Neural
Networks for Molecules" (NeurIPS 2021). DimeNet++'s Linear and BiasedResidual: Gasteiger, Giri, Margraf, Guennemann,
"Fast and Uncertainty-Aware Directional Message Passing for Non-Equilibrium Molecules" (2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from egnscale.models.remake import cheap

INV_SQRT_2 = 1 / math.sqrt(2)
#: A product with a matrix so many times wider than high costs about what reading its result costs.
NARROW = 16


class _SiLU(torch.autograd.Function):
    """x sigmoid(x). Keeps x; for forces that are trained, the incoming gradient besides.

    torch's own silu is taken apart for second derivatives, and keeps seven tensors in place of these two.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _SiLUSlope.apply(grad, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _SiLUSlope.apply(tangent, *ctx.saved_tensors)


class _SiLUSlope(torch.autograd.Function):
    """grad * silu'(x), differentiable in both."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.silu_backward(grad, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor]:
        grad, x = ctx.saved_tensors
        return _SiLUSlope.apply(outer, x), _times_silu_curvature(outer * grad, x)

    @staticmethod
    def jvp(ctx: Any, grad_tangent: Tensor, x_tangent: Tensor) -> Tensor:
        grad, x = ctx.saved_tensors
        return _SiLUSlope.apply(grad_tangent, x) + _times_silu_curvature(grad * x_tangent, x)


def _times_silu_curvature(y: Tensor, x: Tensor) -> Tensor:
    """y silu''(x) = y s (1 - s) (2 + x - 2 x s), s = sigmoid(x); in few passes over memory."""
    s = torch.sigmoid(x)
    y = torch.ops.aten.sigmoid_backward(y, s)
    return torch.add(y * torch.addcmul(x, x, s, value=-2), y, alpha=2)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x), with derivatives of every order that keep little."""
    return cheap(_SiLU.apply, x)


class _Linear(torch.autograd.Function):
    """x W^T + b on dual numbers: knows that weights have no tangent, and keeps W itself.

    A missing tangent, taken for zero, would cost a product with zeros. A view of W would keep a parameter in memory
    that ZeRO-3 has given back. Elsewhere torch's own product is better: it leaves out the gradient of W where only that
    of x is asked for, which a function of Python cannot know.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if grad is None:
            return None, None, None
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _Linear.apply(grad, weight.t(), None) if of_x else None,
            grad.t() @ x if of_weight else None,
            grad.sum(0) if of_bias else None,
        )

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, weight_tangent: Tensor | None, bias_tangent: Tensor | None) -> Any:
        x, weight = ctx.saved_tensors
        found = None if x_tangent is None else _Linear.apply(x_tangent, weight, None)
        if weight_tangent is not None:
            product = _Linear.apply(x, weight_tangent, bias_tangent)
            found = product if found is None else found + product
        elif bias_tangent is not None:
            found = bias_tangent.expand(len(x), -1) if found is None else found + bias_tangent
        return found


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. (N, in), (out, in), (out,) -> (N, out); cheap where x is much narrower than what is made of it."""
    if bias is None and NARROW * weight.shape[1] <= weight.shape[0]:
        return cheap(_product, x, weight)
    if bias is None:
        return _product(x, weight)
    return _Linear.apply(x, weight, bias) if _on_dual_numbers.get() else torch.addmm(bias, x, weight.t())


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return _Linear.apply(x, weight, None) if _on_dual_numbers.get() else x @ weight.t()


_on_dual_numbers: ContextVar[bool] = ContextVar("_on_dual_numbers", default=False)


@contextmanager
def dual_numbers() -> Iterator[None]:
    """A level of torch's forward-mode differentiation, in which only what depends on positions has tangents."""
    token = _on_dual_numbers.set(True)
    try:
        with torch.autograd.forward_ad.dual_level():
            yield
    finally:
        _on_dual_numbers.reset(token)


def scaled_silu(x: Tensor) -> Tensor:
    """SiLU(x) / 0.6, which keeps the variance of a unit normal input near one."""
    return cheap(_scaled_silu, x)


def _scaled_silu(x: Tensor) -> Tensor:
    return _SiLU.apply(x) * (1 / 0.6)


@torch.no_grad()
def he_orthogonal_(weight: Tensor) -> Tensor:
    """Initialise in place: random (semi-)orthogonal, then each output row to zero mean and variance 1 / fan_in.

    A 2-D weight is (out, in). A 3-D weight (in0, in1, out) has fan_in = in0 * in1. Does nothing on the meta device.
    """
    if weight.is_meta:
        return weight
    nn.init.orthogonal_(weight)
    axes, fan_in = ((0, 1), weight.shape[0] * weight.shape[1]) if weight.dim() == 3 else ((1,), weight.shape[1])
    if fan_in > 1:
        variance, mean = torch.var_mean(weight, dim=axes, unbiased=True, keepdim=True)
        weight.sub_(mean).div_((variance + 1e-6).sqrt())
    return weight.mul_(fan_in**-0.5)


class Dense(nn.Module):
    """y = act(x W^T): linear without bias, optionally followed by the scaled SiLU. (N, in) -> (N, out).

    The product runs in the weight's precision.
    """

    def __init__(self, in_features: int, out_features: int, *, activation: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(he_orthogonal_(torch.empty(out_features, in_features)))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x.to(self.weight.dtype), self.weight)
        return scaled_silu(y) if self.activation else y

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}{', scaled_silu' if self.activation else ''}"


class Residual(nn.Module):
    """(x + Dense(Dense(x))) / sqrt(2), both activated. (N, F) -> (N, F)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Dense(features, features, activation=True) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.layers(x)) * INV_SQRT_2


def residuals(count: int, features: int) -> nn.Sequential:
    return nn.Sequential(*(Residual(features) for _ in range(count)))


class ScaleFactor(nn.Module):
    """y * alpha, a fixed number that keeps activations at unit variance through sums and products.

    alpha is fitted once before training (`egnscale.models.scale_factors`) and stored with the weights; zero means
    "not fitted" and acts as one. It stays in fp32 or fp64 whatever precision the module is converted to.
    """

    scale_factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale_factor", torch.zeros(()))
        #: Set while this factor is being fitted: called with (output, reference).
        self.observer: Callable[[Tensor, Tensor], None] | None = None

    @property
    def fitted(self) -> bool:
        return bool(self.scale_factor != 0)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        before = self.scale_factor
        super()._apply(fn, recurse)
        if self.scale_factor.dtype in (torch.bfloat16, torch.float16):
            self.scale_factor = before.to(self.scale_factor.device)
        return self

    def forward(self, y: Tensor, reference: Tensor) -> Tensor:
        """Scale `y`; `reference` is what its variance should match, read only while fitting."""
        if self.observer is not None:
            self.observer(y, reference)
        return cheap(torch.mul, y, self.alpha.to(y.dtype))

    @property
    def alpha(self) -> Tensor:
        """() the factor in force: one where none is fitted. Without a branch, so that no device is waited for."""
        return torch.where(self.scale_factor == 0, torch.ones_like(self.scale_factor), self.scale_factor)


@torch.no_grad()
def glorot_orthogonal_(weight: Tensor, scale: float = 2.0) -> Tensor:
    """Initialise (out, in) in place: random (semi-)orthogonal, of variance scale / (in + out). Nothing on meta."""
    if weight.is_meta:
        return weight
    nn.init.orthogonal_(weight)
    return weight.mul_((scale / (sum(weight.shape) * weight.var().clamp(min=1e-12))).sqrt())


class Linear(nn.Module):
    """y = act(x W^T + b), with the plain SiLU where it is activated. (N, in) -> (N, out).

    The product runs in the weight's precision.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, activation: bool = False, glorot: bool = True
    ) -> None:
        """`glorot`: initialise orthogonally with zero bias; otherwise uniformly, as `torch.nn.Linear` does."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.activation = activation
        if glorot:
            glorot_orthogonal_(self.weight)
        elif not self.weight.is_meta:
            limit = in_features**-0.5
            nn.init.uniform_(self.weight, -limit, limit)
            if self.bias is not None:
                nn.init.uniform_(self.bias, -limit, limit)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x.to(self.weight.dtype), self.weight, self.bias)
        return silu(y) if self.activation else y

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}{', silu' if self.activation else ''}"


class BiasedResidual(nn.Module):
    """x + Linear(Linear(x)), both activated. (N, F) -> (N, F)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.lin1 = Linear(features, features, activation=True)
        self.lin2 = Linear(features, features, activation=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lin2(self.lin1(x))
