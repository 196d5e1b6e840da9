from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.tools.draw.painting import INPUT, OUTPUT, Calls, calls_of
from tests.tools.pictures import Untraceable

X = torch.randn(2, 8)


def calls(model: nn.Module, example_inputs: object = X) -> Calls:
    found = calls_of(model, example_inputs)
    assert isinstance(found, Calls), found
    return found


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        self.seen += 1
        hidden = self.up(self.norm(x)).relu_()
        if scale is not None:
            hidden = hidden * scale
        x = x + self.down(hidden)
        return x[:, :4]


def test_what_one_gives_and_another_takes_is_an_edge() -> None:
    assert set(calls(Residual()).edges[""]) == {
        (f"{INPUT}x", "norm"),
        ("norm", "up"),
        ("up", "down"),
        (f"{INPUT}x", OUTPUT),
        ("down", OUTPUT),
    }


def test_arguments_are_ends_by_name() -> None:
    edges = calls(Residual(), {"x": X, "scale": torch.ones(8)}).edges[""]
    assert (f"{INPUT}scale", "down") in edges


def test_shapes_are_told() -> None:
    assert calls(Residual()).shapes["up"] == ("2×8 float32", "2×8 float32")
    assert calls(Residual()).shapes[""] == ("2×8 float32", "2×4 float32")


def test_items_of_a_list_are_connected_in_it() -> None:
    # The forward asks a tensor for its value, which one without data does not have.
    edges = calls(Untraceable(depth=3)).edges
    assert edges[""] == ((f"{INPUT}x", "layers"), ("layers", OUTPUT))
    assert edges["layers"] == (("0", "1"), ("1", "2"))


def test_what_is_called_again_goes_on_in_time() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = self.b(self.a(x))
            return x

    assert ("b", "a") not in calls(Loop()).edges[""]
    assert ("a", "b") in calls(Loop()).edges[""]


def test_the_model_is_not_touched() -> None:
    model = Residual()
    fired: list[object] = []
    model.up.register_forward_hook(lambda *given: fired.append(given))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(r=2))
    before = lora_fx.status(adapted)
    calls(model)
    calls(adapted)
    assert lora_fx.status(adapted) == before
    assert not fired
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert model.training


def test_a_call_that_fails_is_told_in_words() -> None:
    class Numpy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no data here\nand more")

    found = calls_of(Numpy(), X)
    assert found == "a call without data failed: RuntimeError: no data here"
    assert isinstance(calls_of(Residual()), str)


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_models_of_transformers_say_what_they_take(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    settings = getattr(transformers, f"{name}Config")(**sizes, **heads)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(settings)
    found = calls_of(model)
    assert isinstance(found, Calls)
    assert ("self_attn", "post_attention_layernorm") in found.edges["model.layers.1"]
