"""Attention in shifted windows, bit for bit against torchvision's own functions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lora_fx.runtime.attention import (
    attend_in_windows,
    fitted_window,
    partition,
    reverse,
    without_key_bias,
)

pytest.importorskip("torchvision")

HEADS, WIDTH = 2, 8


def weights(dtype: torch.dtype = torch.float32, bias: bool = True) -> dict[str, Any]:
    shapes = {"qkv_weight": (3 * WIDTH, WIDTH), "proj_weight": (WIDTH, WIDTH)}
    if bias:
        shapes |= {"qkv_bias": (3 * WIDTH,), "proj_bias": (WIDTH,)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def written_out(x: torch.Tensor, position: torch.Tensor, window: Any, shift: Any, **rest: Any):
    """What the graph of a layer does."""
    how, scale = {"training": False, "attention_dropout": 0.0, **rest}, rest.get("logit_scale")
    bias = rest.get("qkv_bias")
    bias = bias if scale is None else without_key_bias(bias)
    qkv = F.linear(partition(x, window, shift), rest["qkv_weight"], bias)
    out = attend_in_windows(
        qkv,
        position,
        scale,
        x,
        window,
        shift,
        HEADS,
        how["attention_dropout"],
        how["training"],
    )
    out = F.linear(out, rest["proj_weight"], rest.get("proj_bias"))
    out = F.dropout(out, rest.get("dropout", 0.0), how["training"])
    return reverse(out, x, window, shift)


def theirs(x: torch.Tensor, position: torch.Tensor, window: Any, shift: Any, **rest: Any):
    from torchvision.models.swin_transformer import shifted_window_attention as flat
    from torchvision.models.video.swin_transformer import shifted_window_attention_3d as video

    how: dict[str, Any] = {"training": False, **rest}
    function = flat if len(window) == 2 else video
    shift = [0 if w >= s else by for w, s, by in zip(window, x.shape[1:], shift, strict=False)]
    return function(x, how.pop("qkv_weight"), how.pop("proj_weight"), position, list(window), HEADS,
                    shift_size=shift, **how)  # fmt: skip


def case(sizes: tuple[int, ...], window: tuple[int, ...], dtype: torch.dtype = torch.float32):
    volume = torch.Size(window).numel()
    position = torch.randn(1, HEADS, volume, volume).to(dtype)
    return torch.randn(2, *sizes, WIDTH).to(dtype), position


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("cosine", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize(
    ("window", "shift"), [((4, 4), (2, 2)), ((4, 3), (0, 0)), ((3, 5), (1, 0)), ((2, 3), (0, 1))]
)
def test_it_is_that_of_torchvision(window, shift, cosine: bool, bias: bool) -> None:
    torch.manual_seed(0)
    for sizes, training in itertools.product([(8, 8), (7, 9), (4, 12), (3, 2)], [True, False]):
        x, position = case(sizes, window)
        how = {**weights(bias=bias), "training": training, "attention_dropout": 0.4, "dropout": 0.3}
        if cosine:
            how["logit_scale"] = 5 * torch.randn(HEADS, 1, 1)
        torch.manual_seed(1)
        expected = theirs(x, position, window, shift, **how)
        torch.manual_seed(1)
        assert torch.equal(written_out(x, position, window, shift, **how), expected), sizes


@pytest.mark.parametrize("shift", [(1, 1, 1), (0, 0, 0), (1, 0, 2)])
def test_it_is_that_of_torchvision_for_video(shift) -> None:
    torch.manual_seed(0)
    for sizes in [(4, 6, 6), (3, 7, 5), (1, 6, 4), (2, 3, 9)]:
        window = fitted_window(torch.empty(1, *sizes, 1), (2, 4, 4))
        assert window == [min(*pair) for pair in zip(sizes, (2, 4, 4), strict=True)]
        x, position = case(sizes, tuple(window))
        how = weights()
        found = written_out(x, position, window, shift, **how)
        assert torch.equal(found, theirs(x, position, window, shift, **how)), sizes


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    x, position = case((7, 9), (4, 4), dtype)
    how = weights(dtype)
    with torch.autocast("cpu", enabled=autocast):
        found = written_out(x, position, (4, 4), (2, 2), **how)
        expected = theirs(x, position, (4, 4), (2, 2), **how)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("cosine", [False, True], ids=["v1", "v2"])
def test_gradients_are_those_of_torchvision(cosine: bool) -> None:
    torch.manual_seed(0)
    x, position = case((7, 9), (4, 4), torch.float64)
    how = weights(torch.float64)
    if cosine:
        how["logit_scale"] = torch.randn(HEADS, 1, 1, dtype=torch.float64)
    leaves = [x, position, *how.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    found, expected = (
        torch.autograd.grad(run(x, position, (4, 4), (2, 2), **how).square().sum(), leaves)
        for run in (written_out, theirs)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_partition_is_reversed() -> None:
    x = torch.randn(2, 7, 9, 3)
    for shift in ((0, 0), (1, 2), (2, 0)):
        assert torch.equal(reverse(partition(x, (4, 3), shift), x, (4, 3), shift), x)
