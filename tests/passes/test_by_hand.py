"""Parameters of the base that are unfrozen by hand, and modules that are put in the place of others."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx import CheckpointError, ConfigError, LoraConfig, MergeError
from lora_fx.ir.record import record_of
from lora_fx.passes.parameters import rewritten as _by_hand
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import Residual, Tied

IDS = torch.tensor([[1, 2, 3], [4, 5, 10]])


def adapted(model: nn.Module, **options) -> nn.Module:
    config = LoraConfig(**{"r": 2, "target_modules": ["up", "down"], **options})
    return randomize(lora_fx.rewrite(model, config))


def steps(
    model: nn.Module,
    run: Callable[[nn.Module], torch.Tensor] = lambda model: model(IDS),
    optimizer: type = torch.optim.AdamW,
    count: int = 3,
) -> nn.Module:
    trained = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(count):
        trained.zero_grad()
        run(model).square().mean().backward()
        trained.step()
    return model


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


# --- whose storage it is ---------------------------------------------------------------------------


def set_flag(model: nn.Module) -> None:
    for parameter in model.head.parameters():
        parameter.requires_grad = True


def call_method(model: nn.Module) -> None:
    model.head.weight.requires_grad_()
    model.head.bias.requires_grad_(True)


def whole_module(model: nn.Module) -> None:
    model.head.requires_grad_()


def everything(model: nn.Module) -> None:
    model.requires_grad_(True)


@pytest.mark.parametrize("unfreeze", [set_flag, call_method, whole_module, everything])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_goes_as_it_would_and_the_users_model_stays(unfreeze, optimizer) -> None:
    model = Residual()
    changed = adapted(model)
    # A copy shares nothing: what it becomes is what is right.
    expected = copy.deepcopy(changed)
    unfreeze(changed)
    unfreeze(expected)
    before, objects = state_of(model), dict(changed.named_parameters())
    steps(changed, optimizer=optimizer)
    steps(expected, optimizer=optimizer)
    assert_same_bits(model.state_dict(), before)
    assert_same_bits(changed.state_dict(), expected.state_dict())
    assert not torch.equal(changed.head.weight, model.head.weight)
    assert all(changed.get_parameter(name) is one for name, one in objects.items())


def recomputed(model: nn.Module, *, reentrant: bool) -> torch.Tensor:
    x = model.embed(IDS).requires_grad_()
    return checkpoint(
        model.head, checkpoint(model.blocks[0], x, use_reentrant=reentrant), use_reentrant=reentrant
    )


@pytest.mark.parametrize(
    "run",
    [
        lambda model: model.head(model.embed(IDS)),
        lambda model: recomputed(model, reentrant=True),
        lambda model: recomputed(model, reentrant=False),
        lambda model: torch.compile(model, backend="aot_eager")(IDS),
        lambda model: torch.func.functional_call(model, dict(model.named_parameters()), (IDS,)),
        # Read twice: the gradient comes once.
        lambda model: model.head(model(IDS).mean() + model.embed(IDS)),
        lambda model: F.linear(model.embed(IDS), model.head.weight * 2),
    ],
)
def test_from_wherever_the_gradient_comes(run) -> None:
    model = Residual()
    changed = adapted(model)
    expected = copy.deepcopy(changed)
    before = state_of(model)
    for one in (changed, expected):
        one.head.requires_grad_()
        steps(one, run)
    assert_same_bits(model.state_dict(), before)
    assert_same_bits(changed.state_dict(), expected.state_dict())


def test_gradients_that_are_asked_for() -> None:
    model = Residual()
    changed, before = adapted(model), state_of(model)
    changed.head.weight.requires_grad_()
    (gradient,) = torch.autograd.grad(changed(IDS).sum(), [changed.head.weight])
    with torch.no_grad():
        changed.head.weight -= gradient
    assert_same_bits(model.state_dict(), before)


def test_a_graph_that_is_gone_through_twice() -> None:
    model = Residual()
    changed = adapted(model)
    changed.head.requires_grad_()
    loss = changed(IDS).square().mean()
    loss.backward(retain_graph=True)
    first = changed.head.weight.grad.clone()
    loss.backward()
    assert_same_bits(changed.head.weight.grad, 2 * first)


@pytest.mark.parametrize("listed", [lora_fx.trainable_parameters, lora_fx.parameter_groups])
def test_what_lora_fx_lists_can_be_written_without_a_gradient(listed) -> None:
    model = Residual()
    changed, before = adapted(model), state_of(model)
    changed.head.requires_grad_()
    found = listed(changed) if listed is lora_fx.trainable_parameters else listed(changed, 1e-3)
    for one in found:
        for parameter in one["params"] if isinstance(one, dict) else [one]:
            parameter.data.add_(1.0)
    assert_same_bits(model.state_dict(), before)
    assert not torch.equal(changed.head.bias, model.head.bias)


def test_what_is_frozen_costs_no_call(monkeypatch) -> None:
    called = []
    monkeypatch.setattr(_by_hand._Guard, "__call__", lambda self, gradient: called.append(self))
    changed = adapted(Residual(), modules_to_save=["norm"])
    steps(changed)
    assert not called
    changed.head.weight.requires_grad_()
    steps(changed, count=1)
    assert len(called) == 1


def test_tied_weights_stay_tied() -> None:
    model = Tied()
    changed = randomize(lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["body"])))
    before = state_of(model)
    changed.embed.requires_grad_()
    steps(changed)
    assert changed.embed.weight is changed.head.weight
    assert_same_bits(model.state_dict(), before)


class OneMemory(nn.Module):
    """Parameters that are parts of one tensor: two that overlap, and one beside them."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(60)
        self.first = nn.Parameter(flat[:24].view(4, 6))
        self.second = nn.Parameter(flat[12:36].view(4, 6).T)
        self.third = nn.Parameter(flat[40:58].view(3, 6))
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        return (x @ self.first.T) + (x @ self.second) + (x @ self.third.T).sum()


def test_memory_that_parameters_share_stays_shared() -> None:
    model, x = OneMemory(), torch.randn(5, 6)
    changed = randomize(lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["layer"])))
    before = state_of(model)
    changed.first.requires_grad_()
    # The original, trained as it is: what one parameter writes the other one sees.
    expected = OneMemory()
    expected.load_state_dict(model.state_dict())
    expected.requires_grad_(False)
    with torch.no_grad():
        changed.layer.lora_B.default.zero_()
    steps(changed, lambda one: one(x), torch.optim.SGD, count=1)
    expected.first.requires_grad_()
    steps(expected, lambda one: one(x), torch.optim.SGD, count=1)
    assert_same_bits(model.state_dict(), before)
    for name in ("first", "second", "third"):
        assert_close(changed.get_parameter(name), expected.get_parameter(name))
    assert not torch.equal(changed.second, model.second)
    assert changed.third.data_ptr() == model.third.data_ptr()


def test_one_of_several_parts_of_a_memory_is_trained_by_an_adapter() -> None:
    """A storage does not tell them apart: each is where it is in it."""
    model = OneMemory()
    changed = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["layer"], bias="all"))
    lora_fx.add_adapter(changed, LoraConfig(r=2, target_modules=["layer"]), "other")
    for name in ("first", "second", "third"):
        assert changed.get_parameter(name).shape == model.get_parameter(name).shape
        assert_same_bits(changed.get_parameter(name), model.get_parameter(name))


def test_a_state_dict_is_loaded_past_the_users_model() -> None:
    model = Residual()
    changed, before = adapted(model), state_of(model)
    state = state_of(changed)
    changed.load_state_dict(state)
    assert changed.head.weight.data_ptr() == model.head.weight.data_ptr()
    assert not lora_fx.status(changed).by_hand
    state["head.weight"] += 1
    changed.load_state_dict(state)
    changed.norm.load_state_dict({"weight": torch.ones(6) * 3, "bias": torch.ones(6)})
    assert_same_bits(model.state_dict(), before)
    assert_same_bits(changed.head.weight, state["head.weight"])
    assert lora_fx.status(changed).by_hand == ("norm.weight", "norm.bias", "head.weight")


def test_a_capture_and_an_adapter_that_is_added_are_safe_as_well() -> None:
    model = Residual()
    before = state_of(model)
    captured = lora_fx.capture(model).model
    captured.head.requires_grad_()
    steps(captured)
    changed = adapted(model, modules_to_save=["head"])
    lora_fx.set_adapter(changed, [])
    # The base's own, which was put in for the adapter's.
    changed.head.requires_grad_()
    steps(changed)
    assert_same_bits(model.state_dict(), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_train_and_are_safe(copied) -> None:
    model = Residual()
    changed, before = adapted(model), state_of(model)
    twin = copied(changed)
    twin.head.requires_grad_()
    steps(twin)
    assert lora_fx.status(twin).by_hand == ("head.weight", "head.bias")
    assert_close(lora_fx.merge(twin)(IDS), twin(IDS))
    assert_same_bits(model.state_dict(), before)
    assert not lora_fx.status(changed).by_hand


# --- what becomes of it -----------------------------------------------------------------------------


@pytest.fixture
def trained() -> tuple[Residual, nn.Module]:
    """A head, a norm and a weight that has an adapter, trained by hand and frozen again."""
    model = Residual()
    changed = adapted(model)
    changed.head.requires_grad_()
    changed.norm.weight.requires_grad = True
    changed.blocks[0].up.weight.requires_grad = True
    steps(changed).requires_grad_(False)
    return model, changed


BY_HAND = ("blocks.0.up.weight", "norm.weight", "head.weight", "head.bias")


def test_status_says_so(trained) -> None:
    _, changed = trained
    assert lora_fx.status(changed).by_hand == BY_HAND
    assert "trained by hand, beside the adapters: blocks.0.up.weight, norm" in str(
        lora_fx.status(changed)
    )
    assert not lora_fx.status(adapted(Residual())).by_hand


@pytest.mark.parametrize("options", [{}, {"own": True}])
def test_it_is_merged(trained, options) -> None:
    model, changed = trained
    merged = lora_fx.merge(changed, **options)
    assert_close(merged(IDS), changed(IDS))
    running = merged(IDS)
    changed.requires_grad_(True)
    steps(changed)
    assert_same_bits(merged(IDS), running)
    assert merged.head.weight.requires_grad == model.head.weight.requires_grad


def test_it_is_merged_into_a_model(trained) -> None:
    model, changed = trained
    target = copy.deepcopy(model)
    lora_fx.merge(changed, into=target)
    assert_close(target(IDS), changed(IDS))


@pytest.mark.parametrize("name", ["merge", "inline", "inputs"])
def test_it_is_exported(trained, name: str, tmp_path: Path, caplog) -> None:
    pytest.importorskip("onnxruntime")
    _, changed = trained
    x = torch.tensor([[1, 2, 3], [4, 5, 10]])
    lora_fx.export_onnx(changed, tmp_path / "x.onnx", (x,), adapters=name)
    session = lora_fx.OnnxSession(tmp_path / "x.onnx", "cpu")
    if name == "inputs":
        assert "only in a file that is exported from this model: blocks.0.up.weight" in caplog.text
        session.load_adapter("ours", changed)
        found = session.run(x, adapter="ours")
    else:
        found = session.run(x)
    assert_close(found["output"], changed(x))


def test_it_is_saved_and_read_again(trained, tmp_path: Path, caplog) -> None:
    model, changed = trained
    before = state_of(model)
    with caplog.at_level(logging.WARNING, "lora_fx"):
        lora_fx.save_adapter(changed, tmp_path / "one")
    assert "no adapter trains them" in caplog.text
    assert "modules_to_save" in caplog.text
    for name in BY_HAND:
        assert name in caplog.text
    with safetensors.safe_open(tmp_path / "one" / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_fx.by_hand"]) == sorted(BY_HAND)
    again = lora_fx.load_adapter(model, tmp_path / "one")
    assert_same_bits(again(IDS), changed(IDS))
    # It goes with the adapter, is saved with it again, and can be trained on.
    with lora_fx.disable_adapter(again):
        assert_same_bits(again(IDS), model(IDS))
    caplog.clear()
    lora_fx.save_adapter(again, tmp_path / "two")
    assert "no adapter trains" not in caplog.text
    assert_same_bits(lora_fx.load_adapter(model, tmp_path / "two")(IDS), changed(IDS))
    assert_close(lora_fx.merge(again)(IDS), changed(IDS))
    again.head.requires_grad_()
    steps(again)
    lora_fx.save_adapter(again, tmp_path / "three")
    assert_same_bits(lora_fx.load_adapter(model, tmp_path / "three")(IDS), again(IDS))
    assert_same_bits(model.state_dict(), before)


def test_peft_reads_it(trained, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, changed = trained
    lora_fx.save_adapter(changed, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert_close(theirs(IDS), changed(IDS))


def test_a_folder_is_read_into_a_model_that_trains_the_same(trained, tmp_path: Path) -> None:
    model, changed = trained
    before = state_of(model)
    lora_fx.save_adapter(changed, tmp_path)
    resumed = adapted(model)
    for name in BY_HAND:
        resumed.get_parameter(name).requires_grad = True
    lora_fx.load_adapter(resumed, tmp_path)
    assert_same_bits(resumed(IDS), changed(IDS))
    assert_same_bits(model.state_dict(), before)


def test_a_folder_for_which_nothing_is_unfrozen_is_refused(trained, tmp_path: Path) -> None:
    model, changed = trained
    lora_fx.save_adapter(changed, tmp_path)
    other = adapted(model)
    state = state_of(other)
    with pytest.raises(CheckpointError, match=r"norm\.weight, which is frozen in the model"):
        lora_fx.load_adapter(other, tmp_path)
    assert_same_bits(other.state_dict(), state)


def test_a_state_dict_of_the_adapter(trained) -> None:
    model, changed = trained
    before, state = state_of(model), lora_fx.adapter_state_dict(changed)
    assert "base_model.model.head.weight" in state
    other = adapted(model)
    for name in BY_HAND:
        other.get_parameter(name).requires_grad = True
    lora_fx.load_adapter_state_dict(other, state)
    assert_same_bits(other(IDS), changed(IDS))
    assert_same_bits(model.state_dict(), before)


def test_what_is_of_another_base_is_refused_as_before(tmp_path: Path) -> None:
    """A weight that nobody has trained by hand does not pass for one that somebody has."""
    changed = adapted(Residual())
    folder = lora_fx.save_adapter(changed, tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["base_model.model.head.weight"] = torch.zeros(4, 6)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"other base: head\.weight"):
        lora_fx.load_adapter(Residual(), folder)


def test_a_note_that_is_damaged(trained, tmp_path: Path) -> None:
    model, changed = trained
    path = lora_fx.save_adapter(changed, tmp_path) / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    for note in ("{", "3", "[1]"):
        safetensors.torch.save_file(tensors, path, metadata={"lora_fx.by_hand": note})
        with pytest.raises(CheckpointError, match="is damaged"):
            lora_fx.load_adapter(model, tmp_path)


def test_vllm_has_no_place_for_it(trained, tmp_path: Path) -> None:
    _, changed = trained
    with pytest.raises(CheckpointError, match=r"norm\.weight \[6\]: it is no factor of a layer"):
        lora_fx.save_adapter(changed, tmp_path / "x", vllm=True)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_weight_that_a_start_has_changed_has_no_place(start: str, tmp_path: Path) -> None:
    changed = adapted(Residual(), init_lora_weights=start)
    changed.blocks[0].up.weight.requires_grad = True
    steps(changed)
    with pytest.raises(
        CheckpointError, match=r"blocks\.0\.up\.weight was unfrozen by hand.*modules_to_save"
    ):
        lora_fx.save_adapter(changed, tmp_path / "x")
    assert_close(lora_fx.merge(changed)(IDS), changed(IDS))


def test_an_adapter_trains_what_it_has_of_its_own(tmp_path: Path, caplog) -> None:
    """What is trained as it should be is no work by hand."""
    changed = adapted(Residual(), modules_to_save=["head"], bias="lora_only")
    steps(changed)
    assert not lora_fx.status(changed).by_hand
    lora_fx.save_adapter(changed, tmp_path)
    assert not caplog.text


@pytest.mark.parametrize("options", [{"modules_to_save": ["head"]}, {"bias": "all"}])
def test_an_adapter_takes_over_what_is_frozen_again(trained, options) -> None:
    """Its value is that of the base then; as long as it is trained by hand, it is in somebody's optimizer."""
    _, changed = trained
    changed.head.requires_grad_()
    config = LoraConfig(r=2, target_modules=["up"], **options)
    state = state_of(changed)
    with pytest.raises(
        ConfigError, match=r"head\.(weight|bias) was unfrozen by hand.*freeze it first"
    ):
        lora_fx.add_adapter(changed, config, "other")
    assert_same_bits(changed.state_dict(), state)
    changed.head.requires_grad_(False)
    lora_fx.add_adapter(changed, config, "other")
    running = changed(IDS)
    lora_fx.set_adapter(changed, "other")
    assert_same_bits(changed.head.bias, state["head.bias"])
    steps(changed)
    assert not torch.equal(changed.head.bias, state["head.bias"])
    lora_fx.set_adapter(changed, "default")
    assert_same_bits(changed(IDS), running)


# --- modules that are put in -----------------------------------------------------------------------


def head() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_of_the_same_form_is_saved(frozen: bool, tmp_path: Path) -> None:
    model = Residual()
    changed = adapted(model)
    changed.head = nn.Linear(6, 4)
    steps(changed)
    changed.head.requires_grad_(not frozen)
    lora_fx.save_adapter(changed, tmp_path)
    assert_same_bits(lora_fx.load_adapter(model, tmp_path)(IDS), changed(IDS))
    assert_close(lora_fx.merge(changed)(IDS), changed(IDS))
    target = copy.deepcopy(model)
    assert_close(lora_fx.merge(changed, into=target)(IDS), changed(IDS))


def test_a_head_of_another_form_is_saved_and_needs_one_of_that_form(tmp_path: Path) -> None:
    model = Residual()
    changed = adapted(model)
    changed.head = head()
    steps(changed).eval()
    lora_fx.save_adapter(changed, tmp_path)
    with pytest.raises(CheckpointError, match=r"unexpected: head\.1\.running_mean \[6\]"):
        lora_fx.load_adapter(model, tmp_path)
    with pytest.raises(MergeError, match=r"into has no head\.0\.weight of shape"):
        lora_fx.merge(changed, into=copy.deepcopy(model))
    model.head = head()
    before = state_of(model)
    assert_same_bits(lora_fx.load_adapter(model, tmp_path).eval()(IDS), changed(IDS))
    assert_same_bits(model.state_dict(), before)
    merged = lora_fx.merge(changed)
    assert_close(merged(IDS), changed(IDS))
    assert merged.head[0].weight.requires_grad


# --- scripted modules --------------------------------------------------------------------------------


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        inner = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.inner = torch.jit.script(inner)
        self.last = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.first(x)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
class TestScripted:
    x = torch.randn(5, 6)

    def adapted(self, **options) -> tuple[nn.Module, nn.Module]:
        model = Scripted().eval()
        config = LoraConfig(**{"r": 2, "target_modules": ["first", "last"], **options})
        return model, randomize(lora_fx.rewrite(model, config))

    def test_merge_and_disable(self) -> None:
        model, changed = self.adapted()
        with lora_fx.disable_adapter(changed):
            assert_same_bits(changed(self.x), model(self.x))
        for options in ({}, {"own": True}, {"dtype": torch.float32}):
            assert_close(lora_fx.merge(changed, **options)(self.x), changed(self.x))
        assert_close(lora_fx.merge(changed, into=copy.deepcopy(model))(self.x), changed(self.x))

    def test_the_other_verbs(self, tmp_path: Path) -> None:
        model, changed = self.adapted()
        lora_fx.add_adapter(changed, LoraConfig(r=2, target_modules=["last"]), "other")
        with lora_fx.adapter_ids(changed, ["other", None, "default", None, None]):
            assert_close(changed(self.x)[[1, 3, 4]], model(self.x)[[1, 3, 4]])
        lora_fx.set_adapter(changed, "other")
        lora_fx.delete_adapter(changed, "default")
        lora_fx.save_adapter(changed, tmp_path)
        again = lora_fx.load_adapter(model, tmp_path, adapter_name="other")
        assert_same_bits(again(self.x), changed(self.x))
        assert_same_bits(copy.deepcopy(changed)(self.x), changed(self.x))

    @pytest.mark.parametrize(
        "options",
        [{"bias": "all"}, {"modules_to_save": ["inner"]}, {"modules_to_save": ["inner.0"]}],
    )
    def test_what_is_scripted_is_not_trained(self, options) -> None:
        with pytest.raises(
            ConfigError, match="TorchScript module, whose parameters cannot be exchanged"
        ):
            self.adapted(**options)

    def test_unless_it_is_by_hand(self, tmp_path: Path) -> None:
        model, changed = self.adapted()
        before = state_of(model)
        for parameter in changed.inner.parameters():
            parameter.requires_grad = True
        steps(changed, lambda one: one(self.x))
        assert_same_bits(model.state_dict(), before)
        assert_close(lora_fx.merge(changed)(self.x), changed(self.x))
        target = copy.deepcopy(model)
        assert_close(lora_fx.merge(changed, into=target)(self.x), changed(self.x))
        lora_fx.save_adapter(changed, tmp_path)
        with pytest.raises(CheckpointError, match=r"inner\.0\.weight is in a TorchScript module"):
            lora_fx.load_adapter(model, tmp_path)
        assert_same_bits(model.state_dict(), before)


def test_the_record_of_a_copy_knows_it(trained) -> None:
    _, changed = trained
    for twin in (copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):
        assert record_of(twin).by_hand == frozenset(BY_HAND)


def test_what_is_no_number_yet_is_left_alone() -> None:
    """A lazy layer has no storage, and what was made under inference mode cannot be trained."""
    base = nn.ModuleDict({"fc": nn.Linear(6, 6), "later": nn.LazyLinear(8)})
    with torch.inference_mode():
        base["inferred"] = nn.Linear(6, 6)
    base.forward = base["fc"].forward
    changed = lora_fx.rewrite(base, LoraConfig(r=2, target_modules=["fc"]))
    assert _by_hand.is_guarded(changed.get_parameter("fc.weight"))
    assert not _by_hand.is_guarded(changed["later"].weight)
    changed["fc"].requires_grad_()
    before = base["fc"].weight.detach().clone()
    steps(changed, lambda one: one["fc"](torch.ones(2, 6)))
    assert_same_bits(base["fc"].weight, before)
    assert lora_fx.status(changed).by_hand == ("fc.weight", "fc.bias")
