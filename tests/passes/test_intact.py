"""Layers that are deleted or replaced after the rewrite: an error that names them, whatever is asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lora_fx
from lora_fx import CaptureError, LoraConfig
from lora_fx.errors import CheckpointError, MergeError
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import Residual

IDS = torch.tensor([[1, 2, 3], [4, 5, 10]])


def adapted(**options) -> nn.Module:
    config = LoraConfig(
        **{"r": 2, "target_modules": ["up", "down"], "modules_to_save": ["head"], **options}
    )
    return randomize(lora_fx.rewrite(Residual(), config))


def delete_block(model: nn.Module) -> None:
    del model.blocks[1]


def delete_layer(model: nn.Module) -> None:
    del model.blocks[1].up


def replace_layer(model: nn.Module) -> None:
    model.blocks[1].up = nn.Linear(6, 10)


def replace_block(model: nn.Module) -> None:
    model.blocks[1] = nn.Identity()


def delete_factors(model: nn.Module) -> None:
    del model.blocks[1].up.lora_A


DAMAGES = [delete_block, delete_layer, replace_layer, replace_block, delete_factors]


def disabled(model: nn.Module, folder: Path) -> None:
    with lora_fx.disable_adapter(model):
        pass


def per_sample(model: nn.Module, folder: Path) -> None:
    with lora_fx.adapter_ids(model, [None, "spare"]):
        pass


VERBS: dict[str, Callable[[nn.Module, Path], object]] = {
    "merge": lambda model, folder: lora_fx.merge(model),
    "merge_into": lambda model, folder: lora_fx.merge(model, into=Residual()),
    "merge_one": lambda model, folder: lora_fx.merge(model, adapter_names="spare"),
    "save_adapter": lambda model, folder: lora_fx.save_adapter(model, folder / "new"),
    "load_adapter": lambda model, folder: lora_fx.load_adapter(model, folder / "saved"),
    "hotswap_adapter": lambda model, folder: lora_fx.hotswap_adapter(model, folder / "saved"),
    "prepare_hotswap": lambda model, folder: lora_fx.prepare_hotswap(model, 4, "spare"),
    "state_dict": lambda model, folder: lora_fx.adapter_state_dict(model),
    "set_adapter": lambda model, folder: lora_fx.set_adapter(model, "spare"),
    "set_no_adapter": lambda model, folder: lora_fx.set_adapter(model, []),
    "disable_adapter": disabled,
    "adapter_ids": per_sample,
    "add_adapter": lambda model, folder: lora_fx.add_adapter(
        model, LoraConfig(r=2, target_modules=["up"]), "new"
    ),
    "add_weighted_adapter": lambda model, folder: lora_fx.add_weighted_adapter(
        model, ["spare"], [1.0], "new"
    ),
    "delete_adapter": lambda model, folder: lora_fx.delete_adapter(model, "spare"),
    "status": lambda model, folder: lora_fx.status(model),
    "parameter_groups": lambda model, folder: lora_fx.parameter_groups(model, 1e-3),
    "export_onnx": lambda model, folder: lora_fx.export_onnx(model, folder / "x.onnx", (IDS,)),
    "export_inputs": lambda model, folder: lora_fx.export_onnx(
        model, folder / "x.onnx", (IDS,), adapters="inputs"
    ),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("verb", VERBS)
def test_what_is_lost_is_named(verb: str, damage: Callable, tmp_path: Path) -> None:
    model = adapted()
    spare = LoraConfig(r=2, target_modules=["up"])
    lora_fx.add_adapter(model, spare, "spare")
    lora_fx.save_adapter(model, tmp_path / "saved", "default")
    damage(model)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(
        CaptureError, match=r"blocks\.1\.up.*\n(?s:.*)Put the layers back"
    ) as caught:
        VERBS[verb](model, tmp_path)
    assert "rewrite that" in str(caught.value)
    assert_same_bits(model.state_dict(), state)


def test_it_goes_on_when_the_layer_is_put_back() -> None:
    model = adapted()
    running, layer = model(IDS), model.blocks[1].up
    replace_layer(model)
    with pytest.raises(CaptureError):
        lora_fx.merge(model)
    model.blocks[1].up = layer
    assert_close(lora_fx.merge(model)(IDS), running)


def test_a_layer_without_an_adapter_may_go() -> None:
    model = adapted(target_modules=["up"])
    model.blocks[1].down = nn.Linear(10, 6)
    with lora_fx.disable_adapter(model):
        model(IDS)
    assert_close(lora_fx.merge(model)(IDS), model(IDS))


def test_what_an_adapter_keeps_beside_a_module() -> None:
    model = adapted()
    lora_fx.set_adapter(model, [])
    model.head = nn.Linear(6, 4)
    with pytest.raises(CaptureError, match=r"head\.weight: adapter 'default' has its own value"):
        lora_fx.set_adapter(model, "default")


def test_rows_of_an_embedding() -> None:
    model = adapted(modules_to_save=None, trainable_token_indices={"embed": [1]})
    model.embed = nn.Embedding(11, 6)
    with pytest.raises(CaptureError, match="embed: it has no trained rows of adapter 'default'"):
        lora_fx.merge(model)


def test_many_are_counted() -> None:
    model = randomize(lora_fx.rewrite(Residual(8), LoraConfig(r=2, target_modules=["up", "down"])))
    del model.blocks[2:]
    with pytest.raises(CaptureError, match="and 7 more"):
        lora_fx.merge(model)


def test_a_block_ends_whatever_has_become_of_the_model() -> None:
    model = adapted()
    with pytest.raises(CaptureError, match=r"blocks\.1\.up"), lora_fx.disable_adapter(model):
        delete_layer(model)
    assert not vars(model)["_lora_fx"].blocks


def test_a_layer_that_moved_has_its_adapter_where_it_is() -> None:
    base, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4)
    config = LoraConfig(r=2, target_modules=["0"])
    model = randomize(lora_fx.rewrite(base, config, (x,), frontend="export"))
    merged = lora_fx.merge(model)
    for one in (model, merged):
        one.insert(0, nn.Softplus())
    assert_close(model(x), merged(x))
    with pytest.raises(CaptureError, match=r"0: its weight 0\.weight is not there"):
        lora_fx.merge(model)


class Graph(nn.Module):
    """Has buffers that are not strided."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("edges", torch.eye(3).to_sparse())

    def forward(self, x):
        return torch.sparse.mm(self.edges, self.fc(x))


def test_a_sparse_buffer(tmp_path: Path) -> None:
    base, x = Graph(), torch.randn(3, 4)
    model = randomize(lora_fx.rewrite(base, LoraConfig(r=2, target_modules=["fc"])))
    assert_close(lora_fx.merge(model)(x), model(x))
    lora_fx.save_adapter(model, tmp_path / "one")
    assert_close(lora_fx.load_adapter(base, tmp_path / "one")(x), model(x))
    model.edges = (torch.eye(3) * 2).to_sparse()
    with pytest.raises(CheckpointError, match=r"edges has other values .* and it is sparse"):
        lora_fx.save_adapter(model, tmp_path / "two")


def test_a_weight_that_was_parametrized_since() -> None:
    model = randomize(lora_fx.rewrite(Residual(), LoraConfig(r=2, target_modules=["up"])))
    layer = model.blocks[0].up
    wanted = model(IDS)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert_close(model(IDS), wanted)
    with pytest.raises(MergeError, match=r"up\.weight is computed .*remove_parametrizations"):
        lora_fx.merge(model)
    words = r"up\.weight is computed by a parametrization .*remove_parametrizations"
    with pytest.raises(CaptureError, match=words), lora_fx.disable_adapter(model):
        pass
    parametrize.remove_parametrizations(layer, "weight")
    assert_close(model(IDS), wanted)
    assert_close(lora_fx.merge(model)(IDS), wanted)


@pytest.mark.parametrize("kind", ["use_dora", "lora_bias"])
def test_a_bias_that_was_taken_off_since(kind: str) -> None:
    base, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    model = randomize(lora_fx.rewrite(base, LoraConfig(r=2, target_modules=["0"], **{kind: True})))
    model[0].bias = None
    if kind == "use_dora":
        assert_close(lora_fx.merge(model)(x), model(x))
    else:
        with pytest.raises(MergeError, match="has none that could take it"):
            lora_fx.merge(model)
