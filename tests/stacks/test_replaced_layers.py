"""Libraries that replace layers of a rewritten model: every verb names the layer and what is there now."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import CaptureError, LoraConfig
from tests.stacks.models import IDS, adapted


def float8(model: nn.Module) -> None:
    convert = pytest.importorskip("torchao.float8").convert_to_float8_training
    convert(model, module_filter_fn=lambda _, fqn: fqn.endswith("layers.1.self_attn.q_proj"))


def qat(model: nn.Module) -> None:
    qat = pytest.importorskip("torchao.quantization.qat")
    config = qat.QATConfig(
        weight_config=qat.IntxFakeQuantizeConfig(torch.int8, "per_channel"), step="prepare"
    )
    quantize = pytest.importorskip("torchao.quantization").quantize_
    quantize(model, config, lambda _, fqn: fqn.endswith("layers.1.self_attn.q_proj"))


def resize(model: nn.Module) -> None:
    model.resize_token_embeddings(80, mean_resizing=False)


LIBRARIES = {
    "torchao float8": (float8, "model.layers.1.self_attn.q_proj", "Float8Linear"),
    "torchao QAT": (qat, "model.layers.1.self_attn.q_proj", "FakeQuantizedLinear"),
    "transformers resize": (resize, "lm_head", "torch.nn.modules.linear.Linear"),
}


def disable(model: nn.Module, folder: Path) -> None:
    with lora_fx.disable_adapter(model):
        pass


VERBS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "status": lambda model, folder: lora_fx.status(model),
    "save_adapter": lambda model, folder: lora_fx.save_adapter(model, folder / "new"),
    "merge": lambda model, folder: lora_fx.merge(model),
    "set_adapter": lambda model, folder: lora_fx.set_adapter(model, "default"),
    "disable_adapter": disable,
    "delete_adapter": lambda model, folder: lora_fx.delete_adapter(model, "default"),
    "hotswap_adapter": lora_fx.hotswap_adapter,
    "trainable_parameters": lambda model, folder: lora_fx.trainable_parameters(model),
    "print_trainable_parameters": lambda model, folder: lora_fx.print_trainable_parameters(model),
    "parameter_groups": lambda model, folder: lora_fx.parameter_groups(model, 1e-3),
}


@pytest.mark.parametrize(
    "library",
    [
        pytest.param(
            name,
            marks=pytest.mark.feature(
                f"{name} after the rewrite", "save", "switch", "merge", refused=True
            ),
        )
        for name in LIBRARIES
    ],
)
def test_every_verb_names_the_layer_and_what_is_there_now(library: str, tmp_path: Path) -> None:
    replace, site, found = LIBRARIES[library]
    model = adapted(LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    replace(model)
    for verb, call in VERBS.items():
        with pytest.raises(CaptureError) as caught:
            call(model, tmp_path)
        words = str(caught.value)
        assert f"{site}: it has no lora_A of adapter 'default' ({site} is a " in words, verb
        assert f"{found} now)" in words, verb
        assert "rewrite that" in words, verb


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_call_that_was_watched_before_is_refused(library: str) -> None:
    replace, site, _ = LIBRARIES[library]
    model = adapted(LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    model(IDS)
    replace(model)
    with pytest.raises(CaptureError, match=site):
        model(IDS)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
        heads = nn.functional.scaled_dot_product_attention(q, q, q)
        return self.out(nn.functional.gelu(heads.transpose(1, 2).flatten(2)))


REPLACED = [
    (Attention, "scaled_dot_product_attention"),
    (Attention, "gelu"),
    (functools.partial(nn.MultiheadAttention, 8, 2), "scaled_dot_product_attention"),
]


@pytest.mark.parametrize(("make", "name"), REPLACED)
def test_a_function_of_torch_that_a_library_replaces(
    make: Callable[[], nn.Module], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As context parallelism and SageAttention replace the attention, after the rewrite."""
    base = make()
    model = lora_fx.rewrite(base, LoraConfig(r=2, target_modules=["q", "q_proj", "out_proj"]))
    x = torch.randn(2, 3, 8)
    inputs = (x,) if isinstance(base, Attention) else (x, x, x, None, False)
    original, expected = getattr(nn.functional, name), base(*inputs)
    monkeypatch.setattr(nn.functional, name, lambda *args, **kwargs: original(*args, **kwargs) * 2)
    torch.testing.assert_close(model(*inputs), base(*inputs))
    monkeypatch.undo()
    torch.testing.assert_close(model(*inputs), expected)


class OwnWeight(nn.Module):
    """Attention with a weight of its own, so that the graph of each adapter calls the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(24, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = nn.functional.linear(x, self.qkv).split(8, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


_attention = nn.functional.scaled_dot_product_attention


def doubled(*args: Any, **kwargs: Any) -> torch.Tensor:
    """A replacement that a trace could follow, since it reads no variable around it."""
    return _attention(*args, **kwargs) * 2


def _drawn(seed: int) -> LoraConfig:
    return LoraConfig(r=2, target_parameters=["qkv"], init_lora_weights=False, seed=seed)


def _switched(model: Any) -> Any:
    lora_fx.add_adapter(model, _drawn(1), "second")
    lora_fx.set_adapter(model, ["default", "second"])
    return model


def _combined(model: Any) -> Any:
    lora_fx.add_adapter(model, _drawn(1), "second")
    lora_fx.add_weighted_adapter(model, ["default", "second"], [1.0, 0.5], "both", "cat")
    lora_fx.set_adapter(model, "both")
    return model


GENERATING: dict[str, Callable[[Any], Any]] = {
    "switched": _switched,
    "combined": _combined,
    "unpickled": lambda model: pickle.loads(pickle.dumps(model)),
    "rewritten": lambda _: lora_fx.rewrite(OwnWeight(), _drawn(0)),
}


@pytest.mark.parametrize("generate", GENERATING.values(), ids=GENERATING)
def test_code_that_is_generated_while_a_function_is_replaced(
    generate: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the context of context parallelism, which ends, and begins again for the next step."""
    model, x = lora_fx.rewrite(OwnWeight(), _drawn(0)), torch.randn(2, 3, 8)
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", doubled)
        model = generate(model)
        exact = lora_fx.merge(model)
        inside = model(x)
        torch.testing.assert_close(inside, exact(x))
    torch.testing.assert_close(model(x), exact(x))
    torch.testing.assert_close(inside, exact(x) * 2)
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", doubled)
        torch.testing.assert_close(model(x), exact(x))


def test_a_trace_follows_no_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", doubled)
    region = lora_fx.capture(OwnWeight()).regions[""]
    assert not region.not_run
    assert [node.target for node in region.graph.nodes][-2] is _attention
    assert nn.functional.scaled_dot_product_attention is doubled


class Branching(nn.Linear):
    """A layer whose forward does not trace, so that the product reads the effective weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias) if x.sum() < 1e9 else x


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("layer", [nn.Linear, Branching])
def test_a_linear_that_a_profiler_has_wrapped(
    layer: type[nn.Linear], optimize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = nn.Sequential(layer(8, 8), nn.GELU(), layer(8, 8))
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    lora_fx.rewrite(base, config)  # lora-fx itself has been imported before
    calls, product = [], nn.functional.linear

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        return product(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "linear", counted)
    model, x = lora_fx.rewrite(base, config, optimize=optimize), torch.randn(3, 8)
    out = model(x)
    assert len(calls) >= 2
    monkeypatch.undo()
    torch.testing.assert_close(out, lora_fx.merge(model)(x))
