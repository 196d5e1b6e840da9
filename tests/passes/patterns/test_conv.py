from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import lora_fx
from lora_fx.ir.graph import Region
from lora_fx.ir.site import Rejection
from lora_fx.passes.patterns.conv import ConvPattern
from lora_fx.passes.pipeline import plan_model
from tests import algebra
from tests.numerics import relative_error
from tests.zoo import Form, forms

CONV = forms(*(f"conv{kind}{dims}d" for kind in ("", "-transpose") for dims in (1, 2, 3)))
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("form", CONV)
def test_no_output_bit_changes_before_training(form: Form) -> None:
    algebra.check_untouched(form)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", CONV)
def test_the_adapted_output_is_the_formula(form: Form, dtype: torch.dtype) -> None:
    algebra.check_adapted(form, dtype)


@pytest.mark.parametrize("form", CONV)
def test_a_half_precision_base_computes_in_its_own_dtype(form: Form) -> None:
    layer, x = form.build(), form.x()
    exact = layer.double()(x.double())
    if relative_error(layer.bfloat16()(x.bfloat16()), exact) > 0.1:
        # 2.15 on some processors, where no part of the kernel reaches a place of the output.
        pytest.skip("PyTorch itself leaves out the bias")
    algebra.check_adapted(form, torch.bfloat16)


@pytest.mark.parametrize("form", CONV)
def test_gradients_are_those_of_the_formula(form: Form) -> None:
    algebra.check_gradients(form)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", CONV)
def test_merged_equals_adapted(form: Form, dtype: torch.dtype) -> None:
    algebra.check_merged(form, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", CONV)
def test_merged_half_weights_are_rounded_once(form: Form, dtype: torch.dtype) -> None:
    algebra.check_merged_half(form, dtype)


@given(
    groups=st.integers(1, 4),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    r=st.integers(1, 3),
    bias=st.booleans(),
)
def test_any_geometry(groups, channels, kernel, stride, dilation, padding, mode, r, bias) -> None:
    dims = len(kernel)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    form = Form(
        "any",
        lambda: conv(
            channels[0] * groups,
            channels[1] * groups,
            tuple(kernel),
            stride,
            padding,
            dilation,
            groups,
            bias,
            mode,
        ),
        lambda: torch.randn(2, channels[0] * groups, *(6 + i for i in range(dims))),
        "weight",
        "conv",
        f"conv{dims}d",
        groups,
    )
    model = form.model().double()
    adapted = algebra.randomize(algebra.adapt(form, model, r * groups))
    x = form.x(torch.float64)
    found, exact = adapted(x), algebra.reference(form, model, adapted)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lora_fx.merge(adapted)(x), found, rtol=1e-12, atol=1e-12)


@given(
    groups=st.integers(1, 4),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 1),
    more=st.integers(0, 2),
    r=st.integers(1, 3),
    bias=st.booleans(),
)
def test_any_transposed_geometry(
    groups, channels, kernel, stride, dilation, padding, more, r, bias
) -> None:
    dims = len(kernel)
    conv = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    # PyTorch wants less output padding than stride or dilation.
    more = min(more, max(stride, dilation) - 1)
    form = Form(
        "any",
        lambda: conv(
            channels[0] * groups,
            channels[1] * groups,
            tuple(kernel),
            stride,
            padding,
            more,
            groups,
            bias,
            dilation,
        ),
        lambda: torch.randn(2, channels[0] * groups, *(4 + i for i in range(dims))),
        "weight",
        "conv transposed",
        f"conv-transpose{dims}d",
        groups,
    )
    model = form.model().double()
    adapted = algebra.randomize(algebra.adapt(form, model, r * groups))
    x = form.x(torch.float64)
    found, exact = adapted(x), algebra.reference(form, model, adapted)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lora_fx.merge(adapted)(x), found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions_in_an_exported_graph(dims: int, groups: int) -> None:
    conv = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    model = nn.Sequential(conv(4, 6, 3, 2, 1, 1, groups), nn.Tanh())
    x = torch.randn(2, 4, *(5 + i for i in range(dims)))
    config = lora_fx.LoraConfig(r=2 * groups, target_modules=["0"], init_lora_weights=False)
    adapted = lora_fx.rewrite(model, config, x, frontend="export")
    (call, *_) = adapted._lora_fx.adapters["default"].sites[0].site.calls
    assert call.pattern == f"conv-transpose{dims}d"
    algebra.assert_close(lora_fx.merge(adapted)(x), adapted(x))
    assert (adapted(x) - model(x)).abs().max() > 1e-3


def test_the_branch_keeps_the_memory_format_of_the_base() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(target_modules=["0"]))
    assert model(x).is_contiguous(memory_format=torch.channels_last)
    assert adapted(x).is_contiguous(memory_format=torch.channels_last)
    algebra.assert_same_bits(adapted(x), model(x))


def test_groups_that_do_not_divide_the_rank_are_left_out_with_the_remedy() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=3), nn.Conv2d(6, 6, 3), nn.Flatten())
    plan = lora_fx.plan(model, lora_fx.LoraConfig(r=8, target_modules=["0", "1"]))
    assert [row.name for row in plan] == ["1"]
    (skipped,) = plan.skipped
    assert skipped.site.name == "0"
    assert "3 groups" in skipped.reason
    assert "rank_pattern" in skipped.reason
    config = lora_fx.LoraConfig(r=8, target_modules=["0", "1"], rank_pattern={"0": 6})
    assert [row.rank for row in lora_fx.plan(model, config)] == [6, 8]


@pytest.mark.parametrize(
    ("build", "name", "reason"),
    [],
)
def test_a_near_miss_is_refused_with_the_reason(build, name: str, reason: str) -> None:
    model = nn.Sequential()
    model.add_module("op", build())
    _, plan = plan_model(model, lora_fx.LoraConfig(target_modules=[]))
    assert not plan.skipped
    found = {rejection.name: rejection.reason for rejection in plan.rejections}
    assert reason in found[name]


def test_groups_that_depend_on_the_input_are_refused() -> None:
    # torch.fx records such a call where it traces it at all.
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("weight")
    groups = graph.call_method("size", (x, 1))
    node = graph.call_function(F.conv2d, (x, weight), {"groups": groups})
    graph.output(node)
    found = ConvPattern(2).match(node, Region("", nn.Conv2d(4, 4, 3, groups=4), graph))
    assert isinstance(found, Rejection)
    assert "groups depends on the input" in found.reason


def test_a_filter_that_is_no_parameter_is_not_mine() -> None:
    class Blur(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.ones(1, 1, 3, 3))
            self.conv = nn.Conv2d(1, 1, 3)

        def forward(self, x):
            return F.conv2d(self.conv(x), self.kernel)

    plan = lora_fx.plan(Blur(), lora_fx.LoraConfig(target_modules=["conv"]))
    assert [row.name for row in plan] == ["conv"]
