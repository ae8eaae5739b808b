"""Choice of the segment sum: native torch by default, torch_scatter on request."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from egnscale.models.graph import SegmentSum, segment_sum

BACKENDS = ("native", "torch_scatter")


def segment_sum_backend(name: str, *, conservative: bool = False) -> SegmentSum:
    """The function that sums edge rows into atoms.

    Args:
        name: "native" or "torch_scatter" (the extra `[scatter]`; it needs indices in ascending order, as edges are).
        conservative: whether forces are gradients of the energy.

    Raises:
        ValueError: for an unknown name; for torch_scatter with conservative forces; or where it is not installed.
    """
    if name == "native":
        return segment_sum
    if name != "torch_scatter":
        raise ValueError(f"segment_sum is {name!r}; choose one of {', '.join(BACKENDS)}")
    if conservative:
        raise ValueError(
            "segment_sum: torch_scatter cannot train conservative forces: the second derivative of its segment_csr is "
            "wrong without an error; use segment_sum: native"
        )
    try:
        from torch_scatter import segment_csr
    except ImportError as error:
        raise ValueError(
            "segment_sum: torch_scatter is not installed; `pip install egnscale[scatter]`, or use segment_sum: native"
        ) from error

    def scatter_sum(x: Tensor, index: Tensor, size: int) -> Tensor:
        if x.dtype in (torch.bfloat16, torch.float16):  # as in `segment_sum`
            x = x.float()
        first = pad(index.bincount(minlength=size).cumsum(0), (1, 0))
        return segment_csr(x, first)

    return scatter_sum
