"""Training for a storage: the forward rounds, the merge and the file have the same codes and scales."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import ConfigError, LoraConfig, LoraFxError, MergeError
from lora_fx.formats import dense, format_of, quantization_of, storage, stored
from lora_fx.passes.parameters import base_parameters
from lora_fx.runtime import base_parameter
from tests.quantized import IDS, SCHEMES, llama, quantized

FORMATS = ["int4", "int8", "nf4", "bf16"]
# Schemes of tests.quantized with the names of their formats
BASES = {
    "nf4": "nf4",
    "nf4 double": "nf4",
    "int8 bitsandbytes": "int8",
    "int8 torchao": "int8",
    "int4 torchao": "int4",
}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = (
            nn.Linear(64, 96),
            nn.Linear(96, 64, bias=False),
            nn.Linear(64, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(x + self.down(torch.relu(self.up(x))))
        return y


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


def inputs() -> torch.Tensor:
    return torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(1))


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, "seed": 0} | fields)


def arrays(weight: nn.Parameter) -> dict[str, torch.Tensor]:
    """The codes and scales of a weight, or its values if it is dense."""
    if quantization_of(weight) is None:
        return {"values": weight.detach()}
    known, held = format_of(weight), cast("Any", weight)
    assert known is not None
    if type(weight).__name__ == "Int8Params":
        return {"codes": held.data, "scales": held.row_scales}
    return known.take_apart(weight)[0]


def assert_same_storage(one: nn.Parameter, other: nn.Parameter) -> None:
    left, right = arrays(one), arrays(other)
    assert left.keys() == right.keys()
    for name, values in left.items():
        assert torch.equal(values, right[name]), name


def adapted_values(model: nn.Module, name: str) -> torch.Tensor:
    """``W + s·BA`` in fp64, computed without lora_fx."""
    layer: Any = model.get_submodule(name)
    base = dense(base_parameter(layer, "weight"), torch.float32).detach().double()
    a, b = layer.lora_A.default.detach().double(), layer.lora_B.default.detach().double()
    values: torch.Tensor = base + 2.0 * (b @ a)
    return values


def expected_storage(model: nn.Module, name: str, deploy: str) -> nn.Parameter:
    """The weight that the library makes of ``W + s·BA``."""
    values = adapted_values(model, name).float()
    if deploy == "bf16":
        return nn.Parameter(values.to(torch.bfloat16).float(), False)
    return stored(values, storage(deploy))


@pytest.mark.parametrize("deploy", [*FORMATS, "fp4", "fp16"])
def test_a_dense_mlp_is_merged_to_what_it_was_trained_as(deploy: str) -> None:
    model = lora_fx.rewrite(mlp(), config(), deploy=deploy).eval()
    merged, report = lora_fx.merge(model, return_report=True)
    for name in ("up", "down"):
        if deploy != "fp16":
            assert_same_storage(
                merged.get_submodule(name).weight, expected_storage(model, name, deploy)
            )
    assert {site.deployed for site in report.sites} == {deploy}
    assert f"2 stored as {deploy}, for which they were trained" in str(report)
    with torch.no_grad():
        outputs = model(inputs())
        assert torch.equal(outputs, merged(inputs()))
    assert not torch.allclose(outputs, lora_fx.rewrite(mlp(), config())(inputs()), atol=1e-6)


def straight_through_gradients(
    model: nn.Module, merged: nn.Module, x: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Gradients in fp64 of the straight-through estimator: autograd over ``W' + (Q(W') - W')``."""
    layers = {}
    leaves: dict[str, torch.Tensor] = {}
    for name in ("up", "down"):
        layer: Any = model.get_submodule(name)
        base = dense(base_parameter(layer, "weight"), torch.float32).detach().double()
        a = layer.lora_A.default.detach().double().requires_grad_()
        b = layer.lora_B.default.detach().double().requires_grad_()
        leaves |= {f"{name}.lora_A.default": a, f"{name}.lora_B.default": b}
        exact = base + 2.0 * (b @ a)
        values = dense(merged.get_submodule(name).weight, torch.float64)
        layers[name] = exact + (values - exact).detach()
    head: Any = model.get_submodule("head")
    up: Any = model.get_submodule("up")
    wide = x.detach().double().requires_grad_()
    leaves["x"] = wide
    hidden = torch.relu(wide @ layers["up"].T + up.bias.detach().double())
    out = (wide + hidden @ layers["down"].T) @ head.weight.detach().double().T
    out = out + head.bias.detach().double()
    out.square().sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("frozen", ["", "lora_A", "lora_B"])
@pytest.mark.parametrize("deploy", FORMATS)
def test_gradients_are_those_of_the_straight_through_estimator(deploy: str, frozen: str) -> None:
    model = lora_fx.rewrite(mlp(), config(), deploy=deploy)
    for name, parameter in model.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)
    x = inputs().requires_grad_()
    model(x).square().sum().backward()
    expected = straight_through_gradients(model, lora_fx.merge(model), x)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {
        "x": x.grad
    }
    assert found.keys() == {name for name in expected if not frozen or frozen not in name}
    for name, gradient in found.items():
        assert gradient is not None
        torch.testing.assert_close(gradient.double(), expected[name], rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("deploy", FORMATS)
def test_a_llama_is_merged_to_what_it_was_trained_as(deploy: str) -> None:
    model = lora_fx.rewrite(llama(), config(), deploy=deploy).eval()
    merged = lora_fx.merge(model)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        assert_same_storage(
            merged.get_submodule(name).weight, expected_storage(model, name, deploy)
        )
    merged.train()  # in eval mode, a layer of bitsandbytes packs its weight for a kernel of the CPU
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, merged(IDS).logits)


@pytest.mark.parametrize("scheme", BASES)
def test_a_quantized_base_is_deployed_to_its_own_format(scheme: str) -> None:
    base = quantized(llama(1), scheme).train()
    before = base(IDS).logits.detach()
    start = lora_fx.rewrite(base, config(init_lora_weights=True), deploy=BASES[scheme]).train()
    if "double" not in scheme:  # whose scales are rounded again
        # The scales of LLM.int8() may change by a unit in the last place.
        close = 1e-6 if scheme == "int8 bitsandbytes" else 0
        torch.testing.assert_close(start(IDS).logits, before, rtol=0, atol=close)
    model = lora_fx.rewrite(base, config(), deploy=BASES[scheme]).train()
    outputs = model(IDS).logits
    merged = lora_fx.merge(model).train()
    assert torch.equal(merged(IDS).logits, outputs)
    again = lora_fx.merge(lora_fx.rewrite(base, config()), requantize=True)
    for name, parameter in merged.named_parameters():
        # The fold sums in fp64 and this function rounds to fp32: the same codes here.
        assert_same_storage(parameter, again.get_parameter(name))
    outputs.square().sum().backward()


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme not in BASES])
def test_other_formats_are_deployed_as_they_are_merged(scheme: str) -> None:
    base = quantized(llama(1), scheme).train()
    plan = lora_fx.plan(base, config())
    names = {row.site.quantized.scheme for row in plan.sites if row.site.quantized}
    model = lora_fx.rewrite(base, config(), deploy=names.pop()).train()
    merged = lora_fx.merge(model).train()
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
    again = lora_fx.merge(lora_fx.rewrite(base, config()), requantize=True)
    for name, parameter in merged.named_parameters():
        assert_same_storage(parameter, again.get_parameter(name))


@pytest.mark.parametrize("deploy", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision(dtype: torch.dtype, deploy: str) -> None:
    model = lora_fx.rewrite(llama(1).to(dtype), config(), deploy=deploy).train()
    outputs = model(IDS).logits
    outputs.float().square().sum().backward()
    merged = lora_fx.merge(model).train()
    assert outputs.dtype == dtype
    assert torch.equal(merged(IDS).logits, outputs)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora" in name)


@pytest.mark.parametrize("deploy", ["int4", "int8", "bf16"])
def test_autocast(deploy: str) -> None:
    model = lora_fx.rewrite(llama(1), config(), deploy=deploy).train()
    merged = lora_fx.merge(model).train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs, expected = model(IDS).logits, merged(IDS).logits
    assert outputs.dtype == torch.bfloat16
    assert torch.equal(outputs, expected)
    outputs.float().square().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_autocast_of_nf4_differs_by_the_dtype_of_the_layer() -> None:
    """A layer of bitsandbytes computes in the dtype of its first input, which is fp32 here."""
    model = lora_fx.rewrite(llama(1), config(), deploy="nf4").train()
    merged = lora_fx.merge(model).train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs, expected = model(IDS).logits, merged(IDS).logits
    torch.testing.assert_close(outputs.float(), expected.float(), atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    "options", [{"optimize": False}, {"memory": "balanced"}, {"memory": "least"}]
)
def test_other_ways_of_a_step_give_the_same_gradients(options: dict[str, Any]) -> None:
    gradients = []
    for own in ({}, options):
        model = lora_fx.rewrite(llama(), config(), deploy="int4", **own).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, other = gradients
    assert plain.keys() == other.keys()
    assert len(plain) == 28
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, other[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("deploy", FORMATS)
def test_code_that_reads_the_weight_gets_the_rounded_one(deploy: str) -> None:
    model = lora_fx.rewrite(mlp(), config(), deploy=deploy)
    merged = lora_fx.merge(model)
    weight = model.up.weight.clone()
    assert torch.equal(weight, dense(merged.up.weight, torch.float32))
    weight.square().sum().backward()
    layer: Any = model.up
    gradient = 2 * weight.detach().double()
    torch.testing.assert_close(
        layer.lora_B.default.grad.double(),
        2 * gradient @ layer.lora_A.default.double().T,
        atol=1e-4,
        rtol=1e-5,
    )


def test_conv1d_is_rounded_to_a_dtype_and_over_a_quantized_base() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    drops = dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    base = GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=97, **drops, **ends)
    )
    with pytest.raises(ConfigError, match=r"c_attn.*it is no nn.Linear.*lora_fx.quantize"):
        lora_fx.rewrite(base, config(), deploy="int4")
    for model in (
        lora_fx.rewrite(base, config(), deploy="bf16"),
        lora_fx.rewrite(lora_fx.quantize(base, "int4"), config(), deploy="int4"),
    ):
        merged = lora_fx.merge(model)
        assert torch.equal(model(IDS).logits, merged(IDS).logits)


def test_biases_and_weights_that_are_trained_as_well() -> None:
    model = lora_fx.rewrite(mlp(), config(bias="lora_only"), deploy="int4")
    model.up.weight.requires_grad_(True)
    before = base_parameters(model)["up.weight"].detach().clone()
    optimizer = torch.optim.SGD(lora_fx.trainable_parameters(model), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs()).square().sum().backward()
        optimizer.step()
    assert not torch.equal(base_parameters(model)["up.weight"], before)
    merged = lora_fx.merge(model)
    assert not torch.equal(merged.up.bias, mlp().up.bias)
    assert torch.equal(model(inputs()), merged(inputs()))


def test_training_lowers_the_loss_and_the_merged_model_is_as_accurate() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(256, 64, generator=generator)
    labels = (x @ torch.randn(64, 3, generator=generator)).argmax(1)
    model = lora_fx.rewrite(mlp(), config(r=8), deploy="int4")
    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(model), 1e-2)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    merged = lora_fx.merge(model)
    with torch.no_grad():
        outputs, stored_outputs = model(x), merged(x)
    assert torch.equal(outputs, stored_outputs)
    assert (stored_outputs.argmax(1) == labels).float().mean() > 0.9


def kept(model: nn.Module, ids: torch.Tensor) -> int:
    from lora_fx.passes.kept import saved_storages

    own = (*model.parameters(), *model.buffers())
    storages = saved_storages(own, lambda: model(input_ids=ids, labels=ids))
    return sum(storage.nbytes() for _, storage in storages)


def test_a_step_keeps_no_weight() -> None:
    ids = torch.randint(0, 97, (1, 64), generator=torch.Generator().manual_seed(0))
    plain = lora_fx.rewrite(llama(), config()).train()
    model = lora_fx.rewrite(llama(), config(), deploy="int4").train()
    assert kept(model, ids) <= kept(plain, ids)
    batch = {"input_ids": ids, "labels": ids}
    plans = [lora_fx.plan(llama(), config(), batch, deploy=own) for own in ("int4", None)]
    deployed, other = (plan.kept.adapted["fast"] if plan.kept else 0 for plan in plans)
    assert 0 < deployed <= other


def test_the_plan_shows_the_format() -> None:
    plan = lora_fx.plan(mlp(), config(), deploy="nf4")
    assert "trained for nf4, which merges and exports store: 2 site(s)" in str(plan)
    assert plan.why("up")["up"].endswith("for nf4")
    assert [site["deploy"] for site in plan.to_dict()["sites"]] == ["nf4", "nf4"]
    plan.to_json()
    assert [row.deploy.block_size for row in plan.sites if row.deploy] == [64, 32]


class Kinds(nn.Module):
    """Operations that cannot be trained for a format, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 32)
        self.conv = nn.Conv1d(32, 32, 3)
        self.odd, self.fit = nn.Linear(32, 50), nn.Linear(50, 32)
        self.part = nn.Parameter(torch.randn(64, 32))
        self.head = nn.Linear(32, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.table(ids).mT).mT
        x = self.fit(self.odd(x)) + nn.functional.linear(x, self.part[:32])
        y: torch.Tensor = self.head(x)
        return y


@pytest.mark.parametrize(
    ("deploy", "targets", "message"),
    [
        ("int4", ["conv"], r"conv: it is a convolution"),
        ("bf16", ["table"], r"table: it is a lookup"),
        ("int4", ["odd", "fit"], r"exclude_modules=\['fit'\].*fit: blocks of 32 do not divide"),
        ("bf16", ["part"], r"part.*: it applies only some rows"),
    ],
)
def test_a_site_that_cannot_have_the_format_is_named(
    deploy: str, targets: list[str], message: str
) -> None:
    model = Kinds()
    before = copy.deepcopy(model.state_dict())
    members = {name: vars(module).keys() for name, module in model.named_modules()}
    config_of = config(target_modules=targets)
    if targets == ["part"]:
        config_of = config(target_parameters=targets)
    with pytest.raises(ConfigError, match=f"(?s)deploy='{deploy}'.*nothing was changed.*{message}"):
        lora_fx.rewrite(model, config_of, deploy=deploy)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        lora_fx.plan(model, config_of, deploy=deploy)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert members == {name: vars(module).keys() for name, module in model.named_modules()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 .*set lora_dropout=0"),
        ({"use_dora": True}, "use_dora=True changes more"),
        ({"lora_bias": True}, "lora_bias=True changes more"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes them"),
    ],
)
def test_a_configuration_that_excludes_it_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lora_fx.rewrite(mlp(), config(**fields), deploy="int4")


@pytest.mark.parametrize("deploy", ["int5", "", 4])
def test_a_storage_that_does_not_exist_is_refused(deploy: Any) -> None:
    with pytest.raises(ConfigError, match=r"deploy=.*'bf16', 'fp16', 'nf4', 'fp4', 'int8', 'int4'"):
        lora_fx.rewrite(mlp(), config(), deploy=deploy)


def test_another_format_than_that_of_the_base_is_refused() -> None:
    base = quantized(llama(1), "nf4")
    with pytest.raises(ConfigError, match=r"(?s)7 of the 7 sites.*deploy='nf4' trains for"):
        lora_fx.rewrite(base, config(), deploy="int4")


def test_tied_weights_and_experts_are_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tied = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    with pytest.raises(ConfigError, match=r"lm_head: its weight is tied to model.embed_tokens"):
        lora_fx.rewrite(tied, config(target_modules=["lm_head"]), deploy="bf16")
    mixture = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=2))
    with pytest.raises(ConfigError, match=r"experts.down_proj: its weight has a matrix for each"):
        lora_fx.rewrite(mixture, config(), deploy="int8")


def test_what_would_not_be_the_trained_model_is_refused() -> None:
    model = lora_fx.rewrite(mlp(), config(), deploy="int4")
    with pytest.raises(ConfigError, match="'two' would be a second one"):
        lora_fx.add_adapter(model, config(), "two")
    with pytest.raises(ConfigError, match="samples of a batch cannot have different ones"):
        lora_fx.set_adapter(model, ["default"], per_sample=True)
    with pytest.raises(MergeError, match="into has other weights"):
        lora_fx.merge(model, into=mlp())
    with pytest.raises(MergeError, match="trained for int4, and would be rounded again"):
        lora_fx.merge(model, dtype=torch.bfloat16)
    with pytest.raises(LoraFxError, match=r"torch.func cannot run"):
        torch.func.jacrev(model)(inputs())
    x = inputs().requires_grad_()
    with pytest.raises(LoraFxError, match="no second derivative"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


def test_dtypes_of_a_merge_that_keep_every_bit() -> None:
    model = lora_fx.rewrite(mlp(), config(), deploy="bf16")
    merged, half = lora_fx.merge(model), lora_fx.merge(model, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.up.weight.float(), merged.up.weight)
    with pytest.raises(MergeError, match="trained for bf16, and would be rounded again"):
        lora_fx.merge(model, dtype=torch.float16)


def test_values_that_the_storage_cannot_hold_are_refused_by_name() -> None:
    model = lora_fx.rewrite(mlp(), config(), deploy="fp16")
    with torch.no_grad():
        model.up.lora_B.default.mul_(1e7)
    with pytest.raises(MergeError, match="up: fp16 cannot hold the merged weight"):
        lora_fx.merge(model)


def test_without_the_adapter_the_base_runs_unrounded() -> None:
    base = mlp()
    model = lora_fx.rewrite(base, config(), deploy="int4")
    with lora_fx.disable_adapter(model):
        assert torch.equal(model(inputs()), base(inputs()))
    assert torch.equal(lora_fx.merge(model, adapter_names=[])(inputs()), base(inputs()))
    assert torch.equal(model(inputs()), lora_fx.merge(model)(inputs()))


def test_a_check_compares_with_the_stored_weights() -> None:
    for scheme, deploy in ((None, "int4"), ("nf4", "nf4")):
        base = llama(1) if scheme is None else quantized(llama(1), scheme)
        model = lora_fx.rewrite(base, config(), IDS, deploy=deploy)
        assert lora_fx.check(model, IDS).error < 1e-6
    _, report = lora_fx.merge(model, example_inputs=IDS, return_report=True)
    assert report.outputs is not None
    assert report.outputs.relative_error < 1e-6


@pytest.mark.parametrize("deploy", FORMATS)
def test_a_compiler_gets_the_whole_graph(deploy: str) -> None:
    torch._dynamo.reset()
    model = lora_fx.rewrite(mlp(), config(), deploy=deploy)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for own in (compiled, plain):
        own(inputs()).square().sum().backward()
    torch.testing.assert_close(compiled(inputs()), plain(inputs()))
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs()), plain(inputs()))


def test_a_compiler_leaves_products_over_a_quantized_base_out() -> None:
    torch._dynamo.reset()
    model = lora_fx.rewrite(lora_fx.quantize(mlp(), "nf4"), config(), deploy="nf4")
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    for own in (compiled, plain):
        own(inputs()).square().sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="the format of a quantized base rounds its weight"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(inputs())


# --- folders, the Trainer, files ------------------------------------------------------------------


def test_a_folder_restores_the_storage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = lora_fx.rewrite(llama(1), config(), deploy="int4")
    lora_fx.save_adapter(model, tmp_path)
    loaded = lora_fx.load_adapter(llama(1), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    plain = lora_fx.load_adapter(llama(1), tmp_path, deploy=None)
    assert not torch.equal(plain(IDS).logits, model(IDS).logits)
    other = lora_fx.merge(lora_fx.load_adapter(llama(1), tmp_path, deploy="int8"))
    assert "Int8Tensor" in type(other.model.layers[0].mlp.up_proj.weight.data).__name__
    with pytest.raises(ConfigError, match="deploy='nf4' trains for that") as error:
        lora_fx.load_adapter(quantized(llama(1), "nf4"), tmp_path)
    assert any("load_adapter(..., deploy=None)" in note for note in error.value.__notes__)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lora_fx"):
        lora_fx.load_adapter(loaded, tmp_path)
        assert not caplog.messages
        lora_fx.load_adapter(lora_fx.rewrite(llama(1), config()), tmp_path)
    (message,) = caplog.messages
    assert "was trained for int4, and the model does not round its weights" in message
    with pytest.raises(ConfigError, match="the model is rewritten already"):
        lora_fx.load_adapter(loaded, tmp_path, deploy="int8")


def test_peft_reads_the_folder(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = lora_fx.rewrite(llama(1), config(), deploy="int4")
    lora_fx.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(1), tmp_path)
    ours = lora_fx.load_adapter(llama(1), tmp_path, deploy=None)
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, atol=1e-6, rtol=0)


def test_the_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = lora_fx.rewrite(llama(1), config(), deploy="int4")
    rows = [{"input_ids": IDS[i % 2], "labels": IDS[i % 2]} for i in range(8)]
    options = {"report_to": [], "use_cpu": True, "save_steps": 20, "logging_steps": 1}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, learning_rate=1e-2, per_device_train_batch_size=2, **options
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    loaded = lora_fx.load_adapter(llama(1), tmp_path / "checkpoint-20")
    for other in (loaded, lora_fx.merge(model)):
        assert torch.equal(other.eval()(IDS).logits, model.eval()(IDS).logits)


def test_copies_and_pickles_round_as_well() -> None:
    import pickle

    model = lora_fx.rewrite(mlp(), config(), deploy="int4")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(inputs()), model(inputs()))
        assert_same_storage(lora_fx.merge(other).up.weight, lora_fx.merge(model).up.weight)


def test_transformers_loads_the_merged_nf4(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = lora_fx.rewrite(llama(1), config(), deploy="nf4")
    lora_fx.merge(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert type(loaded.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert torch.equal(loaded(IDS).logits, model.train()(IDS).logits)


def arrays_of_file(path: Path) -> dict[str, torch.Tensor]:
    import onnx

    return {
        tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        for tensor in onnx.load(path).graph.initializer
    }


@pytest.mark.parametrize("deploy", FORMATS)
def test_a_file_has_the_codes_and_scales_of_the_merged_model(deploy: str, tmp_path: Path) -> None:
    model = lora_fx.rewrite(mlp(), config(), deploy=deploy).eval()
    merged = lora_fx.merge(model)
    report = lora_fx.export_onnx(model, tmp_path / "model.onnx", inputs())
    assert report.adapters == "merge"
    file = arrays_of_file(tmp_path / "model.onnx")
    weight: Any = merged.up.weight
    if deploy == "bf16":
        assert any(
            torch.equal(value, weight) or torch.equal(value, weight.T) for value in file.values()
        )
        return
    codes, scales = file["up.weight.codes"], file["up.weight.scales"]
    if deploy == "int8":
        assert torch.equal(codes, weight.qdata)
        assert torch.equal(scales.flatten(), weight.scale.flatten())
    elif deploy == "int4":
        pairs = torch.stack((codes & 15, codes >> 4), -1).flatten(1).to(torch.int8) - 8
        assert torch.equal(pairs, weight.qdata)
        assert torch.equal(scales.flatten(), weight.scale.flatten())
    else:
        assert torch.equal(codes.flatten(), weight.data.flatten())
    with pytest.raises(lora_fx.ExportError, match="only a merge computes that"):
        lora_fx.export_onnx(model, tmp_path / "other.onnx", inputs(), adapters="inputs")


def test_a_file_over_a_quantized_base_keeps_its_format(tmp_path: Path) -> None:
    model = lora_fx.rewrite(lora_fx.quantize(mlp(), "int4"), config(), deploy="int4").eval()
    lora_fx.export_onnx(model, tmp_path / "model.onnx", inputs())
    weight: Any = lora_fx.merge(model).up.weight
    codes = arrays_of_file(tmp_path / "model.onnx")["up.weight.codes"]
    pairs = torch.stack((codes & 15, codes >> 4), -1).flatten(1).to(torch.int8) - 8
    assert torch.equal(pairs, weight.qdata)
