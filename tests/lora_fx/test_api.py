"""What `rewrite` promises about its argument and its result, by the public names alone."""

from __future__ import annotations

import copy
import io
import pickle
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.passes.capture import auto
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import TRANSFORMERS, Block, Mlp, Residual, Shared, Tied

IDS = torch.tensor([[1, 2, 3], [4, 5, 10]])


class Snapshot:
    """Everything about a model that `rewrite` must not touch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = copy.deepcopy(model.state_dict())
        self.parameters = dict(model.named_parameters())
        self.pointers = {name: t.data_ptr() for name, t in model.state_dict().items()}
        self.flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self.modules = dict(model.named_modules())
        self.classes = {name: type(module) for name, module in model.named_modules()}
        self.modes = {name: module.training for name, module in model.named_modules()}
        self.attributes = {name: set(vars(module)) for name, module in model.named_modules()}
        self.hooks = {name: len(m._forward_hooks) for name, m in model.named_modules()}

    def check(self) -> None:
        model = self.model
        assert_same_bits(model.state_dict(), self.state)
        assert {n: t.data_ptr() for n, t in model.state_dict().items()} == self.pointers
        assert all(p is self.parameters[name] for name, p in model.named_parameters())
        assert {name: p.requires_grad for name, p in model.named_parameters()} == self.flags
        assert all(module is self.modules[name] for name, module in model.named_modules())
        assert {name: type(module) for name, module in model.named_modules()} == self.classes
        assert {name: module.training for name, module in model.named_modules()} == self.modes
        assert {name: set(vars(m)) for name, m in model.named_modules()} == self.attributes
        assert {name: len(m._forward_hooks) for name, m in model.named_modules()} == self.hooks
        assert all(p.grad is None for p in model.parameters())


def train(model: nn.Module, x: torch.Tensor, steps: int = 5) -> None:
    """A loop as any other."""
    model.train()
    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(model), lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


FULL = {
    "r": 2,
    "lora_dropout": 0.2,
    "bias": "all",
    "modules_to_save": ["second"],
}


# --- the argument ---------------------------------------------------------------------------------


def test_the_argument_is_untouched_after_training_the_result() -> None:
    model = Mlp().train()
    model.second.eval()
    model.norm.bias.requires_grad_(False)
    model.first.register_forward_hook(lambda module, args, output: output + 1)
    before = Snapshot(model)
    adapted = lora_fx.rewrite(model, LoraConfig(**FULL))
    train(adapted, torch.randn(8, 5) * 3 + 1)
    assert not torch.equal(adapted.norm.running_mean, model.norm.running_mean)
    assert not torch.equal(adapted.second.weight, model.second.weight)
    assert not torch.equal(adapted.first.bias, model.first.bias)
    before.check()


def test_with_example_inputs_it_is_untouched_as_well() -> None:
    model = Mlp().train()
    before = Snapshot(model)
    rng = torch.get_rng_state()
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    adapted = lora_fx.rewrite(model, LoraConfig(**FULL, seed=1), x)
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same_bits(adapted.norm.state_dict(), model.norm.state_dict())
    assert adapted.training
    before.check()


def test_the_argument_is_the_reference_after_training() -> None:
    model = Residual().eval()
    expected = model(IDS)
    adapted = lora_fx.rewrite(model, LoraConfig(r=2))
    train(adapted, IDS)
    assert_same_bits(model(IDS), expected)
    assert not torch.equal(adapted.eval()(IDS), expected)


def test_the_base_weights_are_shared_and_not_copied() -> None:
    model = Residual()
    adapted = lora_fx.rewrite(model, LoraConfig())
    for name, parameter in model.named_parameters():
        assert adapted.get_parameter(name).data_ptr() == parameter.data_ptr(), name
        assert adapted.get_parameter(name) is not parameter


def test_two_rewrites_of_one_model_do_not_know_each_other() -> None:
    model = Mlp()
    first = lora_fx.rewrite(model, LoraConfig(**FULL))
    second = lora_fx.rewrite(model, LoraConfig(**FULL))
    state = copy.deepcopy(second.state_dict())
    train(first, torch.randn(8, 5))
    assert_same_bits(second.state_dict(), state)


# --- the result -----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Residual, Tied])
@pytest.mark.parametrize("inputs", [None, IDS, (IDS,), {"ids": IDS}])
def test_no_output_bit_changes_before_training(build, inputs) -> None:
    model = build().eval()
    adapted = lora_fx.rewrite(model, LoraConfig(target_modules=["up", "down", "body"]), inputs)
    assert_same_bits(adapted(IDS), model(IDS))


def test_the_result_is_of_the_models_own_classes() -> None:
    model = Residual()
    adapted = lora_fx.rewrite(model, LoraConfig())
    assert isinstance(adapted, Residual)
    assert isinstance(adapted.blocks[0], Block)
    assert type(adapted).__name__ == "Residual"
    assert type(adapted).__module__ == Residual.__module__
    for name, module in model.named_modules():
        assert isinstance(adapted.get_submodule(name), type(module)), name


def test_names_of_base_parameters_do_not_change() -> None:
    model = Residual()
    adapted = lora_fx.rewrite(model, LoraConfig(target_modules=["up", "embed"]))
    names = list(adapted.state_dict())
    assert [name for name in names if "lora_" not in name] == list(model.state_dict())
    assert [name for name in names if "lora_" in name] == [
        "embed.lora_embedding_A.default",
        "embed.lora_embedding_B.default",
        "blocks.0.up.lora_A.default",
        "blocks.0.up.lora_B.default",
        "blocks.1.up.lora_A.default",
        "blocks.1.up.lora_B.default",
    ]
    missing, unexpected = adapted.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all("lora_" in name for name in missing)


def test_only_adapters_have_gradients() -> None:
    adapted = randomize(lora_fx.rewrite(Residual(), LoraConfig()))
    adapted(IDS).sum().backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert parameter.requires_grad == ("lora_" in name), name


def test_training_flags_are_those_of_the_model() -> None:
    model = Residual(dropout=0.5).train()
    model.blocks[0].eval()
    adapted = lora_fx.rewrite(model, LoraConfig())
    for name, module in model.named_modules():
        assert adapted.get_submodule(name).training == module.training, name


@pytest.mark.parametrize("name", ["class", "lambda", 'a"b', "a\\b", "1", "ä"])
def test_names_that_code_cannot_spell_are_no_obstacle(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({name: nn.Linear(5, 5)})
            self.head = nn.Linear(5, 2)

        def forward(self, x):
            return self.head(torch.relu(self.layers[name](x)))

    model, x = Named(), torch.randn(3, 5)
    adapted = lora_fx.rewrite(model, LoraConfig(target_modules=[f"layers.{name}"]))
    assert_same_bits(adapted(x), model(x))
    assert_close(lora_fx.merge(randomize(adapted))(x), adapted(x))


class Unlocked(Mlp):
    """Has what cannot be copied, and says how it is copied all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


def test_a_model_that_says_how_it_is_copied_is_copied_so() -> None:
    adapted = lora_fx.rewrite(Unlocked().eval(), LoraConfig())
    for copied in (copy.deepcopy(adapted), pickled(adapted), lora_fx.merge(adapted)):
        assert copied.lock is not adapted.lock
        assert not copied.lock.locked()


def test_hooks_run_in_the_result() -> None:
    model = Residual()
    seen: list[str] = []
    model.blocks[0].up.register_forward_hook(lambda *_: seen.append("before"))
    adapted = lora_fx.rewrite(model, LoraConfig())
    adapted.blocks[1].register_forward_hook(lambda *_: seen.append("after"))
    adapted(IDS)
    assert seen == ["before", "after"]


def test_train_and_eval_mean_what_they_mean() -> None:
    model = Residual(dropout=0.5).eval()
    adapted = lora_fx.rewrite(model, LoraConfig(lora_dropout=0.5))
    assert_same_bits(adapted(IDS), model(IDS))
    adapted.train()
    assert not torch.equal(adapted(IDS), adapted(IDS))
    adapted.eval()
    assert_same_bits(adapted(IDS), model(IDS))


def test_batch_norm_learns_its_statistics_in_training_alone() -> None:
    adapted = lora_fx.rewrite(Mlp().eval(), LoraConfig())
    x = torch.randn(8, 5) * 2 + 3
    before = copy.deepcopy(adapted.norm.state_dict())
    adapted(x)
    assert_same_bits(adapted.norm.state_dict(), before)
    adapted.train()(x)
    assert adapted.norm.num_batches_tracked == before["num_batches_tracked"] + 1
    assert not torch.equal(adapted.norm.running_mean, before["running_mean"])


def test_training_lowers_the_loss_and_leaves_the_base_alone() -> None:
    torch.manual_seed(0)
    model = Residual()
    adapted = lora_fx.rewrite(model, LoraConfig(r=4, target_modules=["up", "down", "embed"]))
    target = torch.tensor([1, 3])
    optimizer = torch.optim.Adam(lora_fx.trainable_parameters(adapted), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(adapted(IDS), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    merged = lora_fx.merge(adapted)
    assert_close(merged(IDS), adapted(IDS))


def test_a_shared_layer_has_one_adapter() -> None:
    adapted = lora_fx.rewrite(Shared(), LoraConfig(r=2))
    assert adapted.layer is adapted.again
    assert sum(p.numel() for p in lora_fx.trainable_parameters(adapted)) == 2 * 10


def test_ties_are_kept() -> None:
    adapted = lora_fx.rewrite(Tied(), LoraConfig())
    assert adapted.head.weight is adapted.embed.weight


# --- copies and files -----------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize("again", [copy.deepcopy, pickled, saved])


@COPIES
@pytest.mark.parametrize("trained", [False, True])
def test_a_rewritten_model_survives_a_copy(again, trained: bool) -> None:
    adapted = lora_fx.rewrite(Mlp(), LoraConfig(**FULL))
    x = torch.randn(8, 5)
    if trained:
        train(adapted, x)
    adapted.eval()
    copied = again(adapted)
    assert isinstance(copied, Mlp)
    assert_same_bits(copied(x), adapted(x))
    assert_same_bits(copied.state_dict(), adapted.state_dict())
    assert [p.requires_grad for p in copied.parameters()] == [
        p.requires_grad for p in adapted.parameters()
    ]
    assert lora_fx.graphs(copied).keys() == lora_fx.graphs(adapted).keys()


@COPIES
def test_a_copy_goes_on_living_by_itself(again) -> None:
    adapted = lora_fx.rewrite(Mlp(), LoraConfig(**FULL))
    x = torch.randn(8, 5)
    copied = again(adapted)
    state = copy.deepcopy(adapted.state_dict())
    train(copied, x)
    assert_same_bits(adapted.state_dict(), state)
    copied.eval()
    assert not torch.equal(copied(x), adapted.eval()(x))
    assert_close(lora_fx.merge(copied)(x), copied(x))


@COPIES
def test_a_transformers_model_survives_a_copy(again) -> None:
    model, inputs = TRANSFORMERS["llama"]()
    adapted = randomize(lora_fx.rewrite(model, LoraConfig(r=2)), 0.1)
    with torch.no_grad():
        assert_same_bits(again(adapted)(**inputs).logits, adapted(**inputs).logits)


def test_a_state_dict_goes_from_one_to_another() -> None:
    config = LoraConfig(r=2)
    first = randomize(lora_fx.rewrite(Mlp().eval(), config))
    second = lora_fx.rewrite(Mlp().eval(), config)
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 5)
    assert_same_bits(second(x), first(x))


# --- dtype and device -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_result_can_be_cast(dtype: torch.dtype) -> None:
    adapted = randomize(lora_fx.rewrite(Mlp().eval(), LoraConfig(r=2)))
    x = torch.randn(3, 5)
    expected = adapted(x)
    cast = copy.deepcopy(adapted).to(dtype)
    assert {p.dtype for p in cast.parameters()} == {dtype}
    found = cast(x.to(dtype))
    assert found.dtype == dtype
    assert_close(found, expected, 0.03 if dtype != torch.float64 else 1e-5)
    assert_close(lora_fx.merge(cast)(x.to(dtype)), found, 0.03)


def test_half_and_back() -> None:
    adapted = randomize(lora_fx.rewrite(Mlp().half().eval(), LoraConfig(r=2)))
    x = torch.randn(3, 5)
    assert adapted(x.half()).dtype == torch.float16
    assert adapted.float()(x).dtype == torch.float32


def test_autocast_reaches_the_branch() -> None:
    adapted = randomize(lora_fx.rewrite(Mlp().eval(), LoraConfig(r=2)))
    x = torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = adapted(x)
    assert found.dtype == torch.bfloat16
    assert_close(found, adapted(x), 0.03)


def test_a_meta_model_is_planned_and_rewritten_without_memory() -> None:
    with torch.device("meta"):
        model = Residual()
    adapted = lora_fx.rewrite(model, LoraConfig())
    assert all(p.is_meta for p in adapted.parameters())
    assert adapted(IDS.to("meta")).is_meta


def test_a_model_on_several_devices_is_refused_with_both() -> None:
    model = Mlp()
    model.second.to("meta")
    with pytest.raises(lora_fx.CaptureError, match=r"first.weight on cpu, second.weight on meta"):
        lora_fx.rewrite(model, LoraConfig())


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimize", [True, False])
def test_optimize_changes_no_result(optimize: bool) -> None:
    model = Residual().double()
    config = LoraConfig(r=2)
    reference = randomize(lora_fx.rewrite(model, config))
    adapted = randomize(lora_fx.rewrite(model, config, optimize=optimize))
    assert_close(adapted(IDS), reference(IDS))
    assert adapted.state_dict().keys() == reference.state_dict().keys()


def test_strict_is_passed_on() -> None:
    config = LoraConfig(target_modules=["up", "nothing"])
    lora_fx.rewrite(Residual(), config)
    with pytest.raises(lora_fx.PartialMatchError):
        lora_fx.rewrite(Residual(), config, strict=True)


def test_a_configuration_that_trains_nothing_is_refused() -> None:
    """PEFT refuses it, too."""
    model, nothing = Residual(), LoraConfig(target_modules=[])
    for call in (lora_fx.plan, lora_fx.rewrite):
        with pytest.raises(lora_fx.NoMatchError, match="nothing would be trained"):
            call(model, nothing)
    with pytest.raises(lora_fx.NoMatchError, match="nothing would be trained"):
        lora_fx.compare({"nothing": nothing}, model)
    adapted = lora_fx.rewrite(model, LoraConfig(target_modules=[], modules_to_save=["head"]))
    out = adapted(IDS)
    with pytest.raises(lora_fx.NoMatchError, match="nothing would be trained"):
        lora_fx.add_adapter(adapted, nothing, "other")
    assert_same_bits(adapted(IDS), out)


def test_random_factors_change_the_output_at_once() -> None:
    model = Residual()
    adapted = lora_fx.rewrite(model, LoraConfig(init_lora_weights=False), IDS)
    assert not torch.equal(adapted(IDS), model(IDS))


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_that_are_trained(bias: str) -> None:
    adapted = lora_fx.rewrite(Residual(1), LoraConfig(target_modules=["up"], bias=bias))
    trained = [
        name for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name
    ]
    expected = {
        "none": [],
        "lora_only": ["blocks.0.up.bias"],
        "all": [name for name, _ in Residual(1).named_parameters() if name.endswith("bias")],
    }
    assert trained == expected[bias]


@pytest.mark.parametrize(
    "inputs",
    [torch.randn(3, 4), (torch.randn(3, 5), 1), {"y": torch.randn(3, 5)}, 3, "text", ()],
)
@pytest.mark.parametrize("verb", [lora_fx.rewrite, lora_fx.capture])
def test_inputs_that_do_not_fit_are_refused(verb, inputs) -> None:
    options = () if verb is lora_fx.capture else (LoraConfig(),)
    with pytest.raises(lora_fx.CaptureError, match=r"example.inputs"):
        verb(Mlp(), *options, inputs)


@pytest.mark.parametrize("model", [None, 3, "model", nn.Linear, lambda x: x])
@pytest.mark.parametrize("verb", [lora_fx.rewrite, lora_fx.plan])
def test_what_is_no_module_is_refused(verb, model: object) -> None:
    with pytest.raises(lora_fx.CaptureError, match=r"expected a torch\.nn\.Module, found"):
        verb(model, LoraConfig())


# --- looking at it --------------------------------------------------------------------------------


def test_graphs_are_those_that_run() -> None:
    adapted = lora_fx.rewrite(Residual(1), LoraConfig())
    graphs = lora_fx.graphs(adapted)
    assert {"", "blocks.0", "blocks.0.up", "blocks.0.down"} <= set(graphs)
    names = [node.name for node in graphs["blocks.0.up"].nodes]
    assert "lora_a_default" in names
    assert lora_fx.graphs(Residual(1)) == {}


def test_a_captured_model_runs_and_is_the_model() -> None:
    model = Residual().eval()
    captured = lora_fx.capture(model, IDS)
    assert captured.frontend == "symbolic"
    assert_same_bits(captured.model(IDS), model(IDS))
    assert set(lora_fx.graphs(captured.model)) == set(captured.regions)


def test_trainable_parameters_are_what_an_optimizer_gets(capsys) -> None:
    adapted = lora_fx.rewrite(Mlp((5, 8, 3)), LoraConfig(r=2))
    assert sum(p.numel() for p in lora_fx.trainable_parameters(adapted)) == 26
    lora_fx.print_trainable_parameters(adapted)
    total = 26 + 5 * 8 + 8 + 16 + 8 * 3 + 3
    line = f"trainable params: 26 || all params: {total} || trainable%: {2600 / total:.4f}\n"
    assert capsys.readouterr().out == line


def test_the_line_is_pefts(capsys) -> None:
    peft = pytest.importorskip("peft")
    lora_fx.print_trainable_parameters(lora_fx.rewrite(Mlp(), LoraConfig(target_modules=["first"])))
    ours = capsys.readouterr().out
    peft.get_peft_model(
        Mlp(), peft.LoraConfig(target_modules=["first"])
    ).print_trainable_parameters()
    assert capsys.readouterr().out == ours


class HasNames(Mlp):
    """A model whose parts have the names of PEFT's methods."""

    def __init__(self) -> None:
        super().__init__()
        self.unload = nn.Linear(3, 3)
        self.merge_and_unload = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.unload(super().forward(x)) * self.merge_and_unload


def test_parts_with_names_of_pefts_methods_stay() -> None:
    model = HasNames()
    adapted = lora_fx.rewrite(model, LoraConfig(r=2))
    x = torch.randn(4, 5)
    assert_same_bits(adapted(x), model(x))
    assert isinstance(adapted.unload, nn.Linear)


class Prints(Mlp):
    """A class with a method of that name."""

    def print_trainable_parameters(self) -> str:
        return "mine"


def test_a_rewritten_model_prints_as_pefts_does(capsys) -> None:
    model = Mlp()
    adapted = lora_fx.rewrite(model, LoraConfig(r=2))
    lora_fx.print_trainable_parameters(adapted)
    line = capsys.readouterr().out
    for one in (adapted, copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        one.print_trainable_parameters()
        assert capsys.readouterr().out == line
    for one in (model, adapted.first, lora_fx.merge(adapted)):
        assert not hasattr(one, "print_trainable_parameters")
        with pytest.raises(AttributeError, match="has no attribute 'print_trainable_parameters'"):
            one.print_trainable_parameters()
    own: Any = lora_fx.rewrite(Prints(), LoraConfig(r=2))
    assert own.print_trainable_parameters() == "mine"
    adapted.print_trainable_parameters = lambda: "replaced"
    assert adapted.print_trainable_parameters() == "replaced"


def test_a_rewritten_model_merges_by_pefts_methods() -> None:
    model = Mlp()
    adapted: Any = lora_fx.rewrite(model, LoraConfig(r=2, init_lora_weights=False))
    lora_fx.add_adapter(adapted, LoraConfig(r=2, init_lora_weights=False), "other")
    expected = {
        names: lora_fx.merge(adapted, adapter_names=names).state_dict()
        for names in (None, ("other",))
    }
    for names, values in expected.items():
        merged = adapted.merge_and_unload(safe_merge=True, adapter_names=names)
        assert type(merged) is Mlp
        assert_equal(merged.state_dict(), values)
    assert_equal(adapted.unload().state_dict(), model.state_dict())
    assert not hasattr(model, "merge_and_unload")
    assert not hasattr(adapted.first, "unload")


def assert_equal(values: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    torch.testing.assert_close(dict(values), dict(expected), rtol=0, atol=0)


def test_swapped_arguments_are_told(tmp_path: Path) -> None:
    model, config, x = Mlp(), LoraConfig(r=2), torch.randn(2, 5)
    adapted = lora_fx.rewrite(model, config)
    folder = lora_fx.save_adapter(adapted, tmp_path / "adapter")
    for call, words in (
        (lambda: lora_fx.rewrite(config, model), "the model comes first"),
        (lambda: lora_fx.plan(config, model), "the model comes first"),
        (lambda: lora_fx.plan(model, ["first"]), r"LoraConfig\(target_modules=\[\.\.\.\]\)"),
        (lambda: lora_fx.compare(model, {"a": config}), "and then the model"),
        (lambda: lora_fx.add_adapter(config, adapted, "b"), "the model comes first"),
        (lambda: lora_fx.save_adapter("folder", adapted), "the model comes first"),
        (lambda: lora_fx.load_adapter(folder, model), "the model comes first"),
        (lambda: lora_fx.merge(model, folder), r"merge\(lora_fx\.load_adapter\(model, folder\)\)"),
        (lambda: lora_fx.merge(folder, model), r"merge\(lora_fx\.load_adapter\(model, folder\)\)"),
        (lambda: lora_fx.merge(folder), "adapter', and has to be the model that lora_fx.rewrite"),
        (lambda: lora_fx.status(config), "a LoraConfig, and has to be the model"),
        (lambda: lora_fx.export_onnx("m.onnx", model, x), "the model comes first, then the file"),
        (lambda: lora_fx.export_onnx(model, x, "m.onnx"), "'m.onnx', comes before the example"),
    ):
        with pytest.raises(lora_fx.LoraFxError, match=words):
            call()


WRONG = {
    "linear": (nn.Linear(6, 4), {}, torch.randn(2, 3)),
    "dropout": (nn.Linear(6, 4), {"lora_dropout": 0.5}, torch.randn(2, 5, 3)),
    "dora": (nn.Linear(6, 4), {"use_dora": True}, torch.randn(2, 3)),
    "conv": (nn.Conv2d(6, 4, 3), {}, torch.randn(2, 3, 8, 8)),
}


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_shape_is_the_error_of_the_layer(name: str, optimize: bool) -> None:
    layer, options, x = WRONG[name]
    model = nn.Sequential(layer)
    with pytest.raises(RuntimeError) as expected:
        model(x)
    adapted = lora_fx.rewrite(
        model, LoraConfig(r=2, target_modules=["0"], **options), optimize=optimize
    )
    for training in (True, False):
        with pytest.raises(RuntimeError) as caught:
            adapted.train(training)(x)
        assert str(caught.value) == str(expected.value)


def test_the_report_of_a_merge_is_given_when_it_is_asked_for() -> None:
    adapted = lora_fx.rewrite(Mlp(), LoraConfig())
    assert isinstance(lora_fx.merge(adapted), Mlp)
    merged, report = lora_fx.merge(adapted, return_report=True)
    assert isinstance(merged, Mlp)
    assert [row.name for row in report.sites] == ["first"]
    assert "1 weight(s) merged" in str(report)


# --- checking on example inputs -------------------------------------------------------------------


class Counts(Mlp):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_the_check_leaves_no_trace_in_the_result() -> None:
    model = Counts()
    adapted = lora_fx.rewrite(model, LoraConfig(), torch.randn(3, 5))
    assert model.calls == 0
    assert adapted.calls == 0


def test_a_model_that_draws_random_numbers_is_no_contradiction() -> None:
    class Noisy(Mlp):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    model, state = Noisy(), torch.get_rng_state()
    lora_fx.rewrite(model, LoraConfig(seed=1), torch.zeros(3, 5))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_capture_that_computes_something_else_is_refused(monkeypatch) -> None:
    def wrong(*args):
        captured = capture_model(*args)
        (node,) = captured.regions["first"].graph.find_nodes(op="output")
        with captured.regions["first"].graph.inserting_before(node):
            twice = captured.regions["first"].graph.call_function(torch.mul, (node.args[0], 2.0))
        node.args = (twice,)
        return captured

    # What is checked is what the walk over the modules found.
    capture_model = auto._captured
    monkeypatch.setattr(auto, "_captured", wrong)
    lora_fx.rewrite(Mlp().eval(), LoraConfig())
    with pytest.raises(lora_fx.CaptureError, match="computes something else than the original"):
        lora_fx.rewrite(Mlp().eval(), LoraConfig(), torch.randn(3, 5))


@pytest.mark.parametrize("name", sorted(lora_fx._OF_PEFT))
def test_names_of_peft_lead_to_ours(name: str) -> None:
    import peft

    assert hasattr(peft, name)
    with pytest.raises(
        AttributeError, match=rf"no attribute '{name}': it is lora_fx\.(\w+)"
    ) as raised:
        getattr(lora_fx, name)
    for ours in re.findall(r"lora_fx\.(\w+)|or (\w+)\(", str(raised.value)):
        assert next(filter(None, ours)) in lora_fx.__all__


@pytest.mark.parametrize(
    "function", [lora_fx.trainable_parameters, lora_fx.print_trainable_parameters]
)
def test_a_model_whose_rewrite_was_thrown_away_is_refused(function: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(r=2))
    with pytest.raises(lora_fx.ConfigError, match=r"model = lora_fx.rewrite\(model, config\)"):
        function(model)
    function(adapted)
    function(nn.ModuleDict({"inside": adapted}))  # as the modules of trainers have it


CONFIG = LoraConfig(r=2, init_lora_weights=False, seed=1)


@pytest.mark.parametrize("start", [True, False, "orthogonal", "pissa"])
def test_a_default_device_around_a_rewrite_changes_nothing(start: Any) -> None:
    base, x = Mlp().eval(), torch.randn(2, 5)
    config = LoraConfig(r=2, target_modules=["first"], init_lora_weights=start, seed=1)
    expected = lora_fx.rewrite(base, config)
    with torch.device("meta"):
        model = lora_fx.rewrite(base, config)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert_same_bits(model(x), expected(x))


def test_models_are_made_inside_of_transforms() -> None:
    base, x = Mlp().eval(), torch.randn(2, 5)
    adapted = lora_fx.rewrite(base, CONFIG)
    for make in (lambda: lora_fx.merge(adapted), lambda: lora_fx.rewrite(base, CONFIG)):
        model = make()
        expected = torch.func.jvp(model, (x,), (x,))
        assert_close(torch.func.jvp(lambda value, make=make: make()(value), (x,), (x,)), expected)
        expected = torch.func.grad(lambda value, model=model: model(value).sum())(x)
        assert_close(torch.func.grad(lambda value, make=make: make()(value).sum())(x), expected)


def test_parameters_of_a_transform_are_refused() -> None:
    adapted = lora_fx.rewrite(Mlp(), CONFIG)
    first = next(name for name, _ in adapted.named_parameters())

    def loss(value: torch.Tensor) -> torch.Tensor:
        owner, _, leaf = first.rpartition(".")
        adapted.get_submodule(owner)._parameters[leaf] = value
        return lora_fx.merge(adapted)(torch.randn(2, 5)).sum()

    with pytest.raises(lora_fx.ConfigError, match=rf"merge: {re.escape(first)} belongs to a trans"):
        torch.func.grad(loss)(adapted.get_parameter(first))
