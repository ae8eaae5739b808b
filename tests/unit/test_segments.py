"""The optional torch_scatter backend of the segment sum."""

from __future__ import annotations

import sys

import pytest
import torch

from egnscale.models.graph import segment_sum
from egnscale.models.segments import segment_sum_backend


def test_native_is_the_default_sum() -> None:
    assert segment_sum_backend("native") is segment_sum
    assert segment_sum_backend("native", conservative=True) is segment_sum


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="choose one of native, torch_scatter"):
        segment_sum_backend("scatter")


def test_torch_scatter_is_refused_for_conservative_forces() -> None:
    with pytest.raises(ValueError, match="second derivative of its segment_csr is wrong without an error"):
        segment_sum_backend("torch_scatter", conservative=True)


def test_a_missing_torch_scatter_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_scatter", None)
    with pytest.raises(ValueError, match=r"pip install egnscale\[scatter\]"):
        segment_sum_backend("torch_scatter")


def test_torch_scatter_gives_the_native_sums_and_gradients() -> None:
    pytest.importorskip("torch_scatter")
    index = torch.tensor([1, 1, 1, 2, 5, 5])  # 0, 3, 4 and 6 have no edge
    weight = torch.randn(7, 3, dtype=torch.float64)
    results = []
    for name in ("native", "torch_scatter"):
        x = torch.arange(18, dtype=torch.float64).view(6, 3).requires_grad_()
        sums = segment_sum_backend(name)(x, index, 7)
        results.append((sums, *torch.autograd.grad(sums, x, weight)))
    torch.testing.assert_close(results[1], results[0])
    assert not results[0][0][[0, 3, 4, 6]].any()
    half = segment_sum_backend("torch_scatter")(torch.ones(1000, 1, dtype=torch.bfloat16), torch.zeros(1000).long(), 1)
    assert half.item() == 1000
