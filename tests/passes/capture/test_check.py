"""With example inputs, a capture is compared with the model that it was made from."""

from __future__ import annotations

import dataclasses
import logging
from collections import namedtuple

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import CaptureError
from lora_fx.ir.graph import Region
from lora_fx.passes.capture.auto import capture as capture_model
from lora_fx.passes.capture.check import check_unchanged, relative_difference, run_reference
from lora_fx.passes.capture.synthesis import normalize
from lora_fx.passes.graph import is_region
from tests import zoo
from tests.numerics import assert_same_bits
from tests.zoo import sample, seeded

Pair = namedtuple("Pair", "left right")


def broken(capture, edit):
    """The capture with its root's graph edited."""
    region = capture.regions[""]
    edit(region.graph)
    return dataclasses.replace(capture, regions={**capture.regions, "": region})


def scale_output(factor):
    def edit(graph):
        output = next(n for n in graph.nodes if n.op == "output")
        with graph.inserting_before(output):
            scaled = graph.call_function(torch.mul, (output.args[0], factor))
        output.args = (scaled,)

    return edit


def test_equal_bits_are_no_difference():
    model = seeded(zoo.Mlp)()
    assert check_unchanged(model, capture_model(model), sample(3, 5)) == 0.0


def test_another_result_is_refused():
    model = seeded(zoo.Mlp)()
    capture = broken(capture_model(model), scale_output(1.01))
    with pytest.raises(CaptureError, match=r"\(symbolic\) computes something else.*0\.01"):
        check_unchanged(model, capture, sample(3, 5))


def test_an_infinite_value_hides_no_other_difference():
    expected = torch.tensor([1.0, -torch.inf, torch.nan, 2.0])
    assert relative_difference([expected], [expected]) == 0.0
    assert relative_difference([expected + 0.5], [expected]) == 0.25
    assert relative_difference([expected.nan_to_num()], [expected]) == torch.inf
    turned = torch.tensor([1 + 2j]), torch.tensor([1 + 4j])
    assert relative_difference(turned[:1], turned[1:]) == 0.5
    assert relative_difference([expected], [expected[:2]]) == torch.inf


def test_rounding_is_let_pass_and_said(caplog):
    model = seeded(zoo.Mlp)()
    capture = broken(capture_model(model), scale_output(1 + 3e-7))
    with caplog.at_level(logging.INFO, "lora_fx"):
        difference = check_unchanged(model, capture, sample(3, 5))
    assert 0 < difference <= 1e-6
    assert "rounds differently" in caplog.text


@pytest.mark.parametrize(
    "edit",
    [
        lambda y: torch.full_like(y, float("nan")),
        lambda y: y[:1],
        lambda y: y.double(),
        lambda y: (y, y),
        lambda y: None,
    ],
)
def test_other_shapes_dtypes_and_structures_are_refused(edit):
    model = seeded(zoo.Mlp)()
    capture = capture_model(model)

    def change(graph):
        output = next(n for n in graph.nodes if n.op == "output")
        with graph.inserting_before(output):
            output.args = (graph.call_function(edit, (output.args[0],)),)

    change(capture.regions[""].graph)
    with pytest.raises(CaptureError):
        check_unchanged(model, capture, sample(3, 5))


def test_nan_is_equal_to_nan():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].bias[0] = float("nan")
    assert check_unchanged(model, capture_model(model), sample(2, 4)) == 0.0


def test_the_check_leaves_everything_as_it_was():
    model = seeded(zoo.Mlp)().train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    capture = capture_model(model)
    capture.model.train()
    generator = torch.get_rng_state()
    check_unchanged(model, capture, sample(3, 5))
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training
    assert capture.model.training
    assert not any(is_region(m) for m in capture.model.modules())
    assert_same_bits(model.state_dict(), state)
    assert_same_bits(capture.model.state_dict(), state)


def test_inputs_that_a_forward_writes_to_are_left_alone():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, seen):
            seen["calls"] += 1
            x += 1
            return self.fc(x) * seen["calls"]

    x, seen = torch.zeros(2, 4), {"calls": 0}
    lora_fx.rewrite(
        nn.Sequential(Writes(), nn.Linear(4, 4))[0],
        lora_fx.LoraConfig(r=2, target_modules=["fc"]),
        (x, seen),
    )
    assert x.sum() == 0
    assert seen == {"calls": 0}


def test_a_model_that_draws_numbers_is_compared_on_the_same_ones():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x + torch.randn_like(x))

    model = Noisy()
    assert check_unchanged(model, capture_model(model), sample(2, 4)) == 0.0


def test_inputs_that_do_not_fit_are_refused_in_words():
    model = seeded(zoo.Mlp)()
    with pytest.raises(CaptureError, match=r"does not run on the example inputs.*forward takes"):
        lora_fx.rewrite(model, lora_fx.LoraConfig(r=2), sample(3, 4))
    with pytest.raises(CaptureError, match="does not run on the example inputs"):
        run_reference(model, (sample(3, 5), 1))
    with pytest.raises(CaptureError, match=r"must be a tuple.*found int"):
        lora_fx.rewrite(model, lora_fx.LoraConfig(r=2), 3)


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (torch.ones(1), 1, []),
        ((torch.ones(1), 2), 2, []),
        ([torch.ones(1)], 1, []),
        ({"x": 1}, 0, ["x"]),
        ({}, 0, []),
    ],
)
def test_ways_of_giving_inputs(given, args, kwargs):
    found_args, found_kwargs = normalize(given)
    assert len(found_args) == args
    assert list(found_kwargs) == kwargs


def test_a_batch_encoding_is_taken_for_a_dict():
    transformers = pytest.importorskip("transformers")
    encoding = transformers.BatchEncoding({"input_ids": torch.ones(1, 2)})
    assert list(normalize(encoding)[1]) == ["input_ids"]


def test_named_tuples_are_arguments():
    # A NamedTuple of inputs is a tuple of inputs.
    args, _ = normalize(Pair(1, 2))
    assert tuple(args) == (1, 2)


def test_a_graph_that_fails_to_run_is_not_swallowed():
    model = seeded(zoo.Mlp)()
    capture = capture_model(model)
    region = capture.regions[""]
    assert isinstance(region, Region)
    node = next(n for n in region.graph.nodes if n.op == "call_function")
    node.args = ("nonsense",)
    with pytest.raises(Exception, match=r"nonsense|str"):
        check_unchanged(model, capture, sample(3, 5))
