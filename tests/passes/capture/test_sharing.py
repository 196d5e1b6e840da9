"""The copy that everything works on: over the same weights, and out of reach of the original."""

from __future__ import annotations

import copy
import queue
import threading
import types

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import CaptureError
from lora_fx.passes.graph.copies import check_model, share_copy
from lora_fx.passes.pipeline import plan_model
from tests import zoo
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import sample, seeded

CONFIG = lora_fx.LoraConfig(r=2)


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def trained(model: nn.Module, *inputs: torch.Tensor, steps: int = 2) -> nn.Module:
    """A rewritten model after a few steps that move everything that can move."""
    model.train()
    optimizer = torch.optim.SGD(lora_fx.trainable_parameters(model), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*inputs).square().sum().backward()
        optimizer.step()
    return model


# --- what is shared and what is not ---------------------------------------------------------------


def test_weights_are_shared_and_frozen():
    model = seeded(zoo.Mlp)()
    other = share_copy(model)
    assert type(other) is zoo.Mlp
    for (name, p), (other_name, q) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert name == other_name
        assert p is not q
        assert storage(p) == storage(q)
        assert p.requires_grad
        assert not q.requires_grad


def test_buffers_are_not_shared():
    model = seeded(zoo.Mlp)()
    other = share_copy(model)
    for p, q in zip(model.buffers(), other.buffers(), strict=True):
        assert storage(p) != storage(q)
        assert torch.equal(p, q)


def test_a_rewritten_model_holds_no_second_set_of_weights():
    model = seeded(zoo.Residual)()
    other = lora_fx.rewrite(model, CONFIG)
    mine = {storage(p) for p in model.parameters()}
    added = [n for n, p in other.named_parameters() if storage(p) not in mine]
    assert added
    assert all(".lora_" in name for name in added)


def test_ties_are_kept():
    model = seeded(zoo.Tied)()
    other = share_copy(model)
    assert other.head.weight is other.embed.weight
    shared = share_copy(seeded(zoo.Shared)())
    assert shared.again is shared.layer


def test_a_buffer_under_two_names_is_one():
    model = nn.Module()
    model.register_buffer("one", torch.zeros(2))
    model.register_buffer("two", model.one)
    other = share_copy(model)
    assert other.one is other.two
    assert other.one is not model.one


def test_attributes_of_a_parameter_are_kept():
    model = nn.Linear(2, 2)
    model.weight.tag = "mine"
    assert share_copy(model).weight.tag == "mine"


def test_integer_parameters_are_copied():
    model = nn.Linear(2, 2)
    model.index = nn.Parameter(torch.arange(3), requires_grad=False)
    assert storage(share_copy(model).index) == storage(model.index)


# --- tensors in odd places ------------------------------------------------------------------------


def test_plain_tensors_are_copied():
    model = nn.Linear(2, 2)
    model.constant = torch.ones(2)
    other = share_copy(model)
    other.constant.zero_()
    assert model.constant.sum() == 2


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: {"a": (x, [x])}])
def test_results_that_a_forward_left_behind_are_copied(wrap):
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].last = wrap(model(sample(1, 2)))
    other = share_copy(model)
    leaves = torch.utils._pytree.tree_leaves(other[0].last)
    assert all(not leaf.requires_grad for leaf in leaves)
    assert_same_bits(leaves, torch.utils._pytree.tree_leaves(model[0].last))


def test_a_result_in_a_buffer_is_copied():
    model = nn.Linear(2, 2)
    model.register_buffer("last", model(sample(1, 2)))
    assert_same_bits(share_copy(model).last, model.last)


def test_layers_in_a_plain_list_are_copied_and_run():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.hidden = [nn.Linear(4, 4)]
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.hidden[0](self.fc(x)))

    model = seeded(Hidden)()
    other = lora_fx.rewrite(model, CONFIG)
    assert other.hidden[0] is not model.hidden[0]
    with torch.no_grad():
        assert_same_bits(other(sample(2, 4)), model(sample(2, 4)))
    assert all("lora_" in n for n, p in other.named_parameters() if p.requires_grad)


def test_an_embedding_that_renormalizes_has_weights_of_its_own():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.1), nn.Linear(4, 4), nn.Linear(4, 2))
    before = copy.deepcopy(model.state_dict())
    other = lora_fx.rewrite(model, CONFIG)
    other(torch.tensor([0, 1, 2]))
    assert_same_bits(model.state_dict(), before)
    assert_same_bits(other(torch.tensor([3])), model.requires_grad_(False)(torch.tensor([3])))


# --- the argument ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"modules_to_save": ["second"]}])
def test_the_argument_is_untouched_by_training(options):
    model = seeded(zoo.Mlp)().train()
    model.first.weight.requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    wants = [p.requires_grad for p in model.parameters()]
    modules = list(model.named_modules())
    attributes = [dict(m.__dict__) for _, m in modules]
    config = lora_fx.LoraConfig(r=2, target_modules=["first"], **options)
    trained(lora_fx.rewrite(model, config), sample(8, 5))
    assert_same_bits(model.state_dict(), state)
    assert [p.requires_grad for p in model.parameters()] == wants
    assert list(model.named_modules()) == modules
    assert [dict(m.__dict__) for m in model.modules()] == attributes
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_the_result_is_untouched_by_training_the_argument():
    model = seeded(zoo.Mlp)()
    other = lora_fx.rewrite(model, CONFIG).eval()
    before = [b.clone() for b in other.buffers()]
    model.train()(sample(8, 5))
    assert_same_bits(list(other.buffers()), before)


def test_statistics_are_learnt_and_kept_by_merge():
    model = seeded(zoo.Mlp)()
    other = trained(lora_fx.rewrite(model, CONFIG), sample(8, 5), steps=5).eval()
    assert not torch.equal(other.norm.running_mean, model.norm.running_mean)
    assert other.norm.num_batches_tracked == 5
    merged = lora_fx.merge(other).eval()
    assert_same_bits(list(merged.buffers()), list(other.buffers()))
    assert_close(merged(sample(3, 5)), other(sample(3, 5)))


# --- closures --------------------------------------------------------------------------------------


def test_a_forward_put_on_the_instance_runs_the_copy():
    model = seeded(zoo.Residual)()
    block = model.blocks[0]
    original = block.forward

    def doubled(x):
        return original(x) * 2

    block.forward = doubled
    other = randomize(lora_fx.rewrite(model, CONFIG))
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.equal(other(ids), model(ids))
    other(ids).sum().backward()
    learned = [p.grad for n, p in other.named_parameters() if ".lora_" in n and "blocks.0" in n]
    assert learned
    assert all(g is not None for g in learned)
    with torch.no_grad():
        assert_same_bits(model(ids), copy.deepcopy(model)(ids))


def test_a_method_put_on_the_instance_runs_the_copy():
    model = seeded(zoo.Residual)()
    block = model.blocks[0]
    block.forward = types.MethodType(lambda self, x: self.down(self.up(x)), block)
    other = randomize(lora_fx.rewrite(model, CONFIG))
    other(torch.tensor([[1, 2, 3]])).sum().backward()
    assert other.blocks[0].up.lora_A.default.grad is not None


def test_a_compiled_model_is_refused_with_a_remedy():
    model = torch.compile(seeded(zoo.Mlp)(), backend="eager")
    with pytest.raises(CaptureError, match=r"_orig_mod.*compile the result"):
        lora_fx.rewrite(model, CONFIG)


def test_a_compiled_layer_is_refused_too():
    model = nn.Sequential(torch.compile(nn.Linear(4, 4), backend="eager"), nn.Linear(4, 2))
    with pytest.raises(CaptureError, match=r"^0 is compiled"):
        lora_fx.rewrite(model, CONFIG)


def test_a_layer_compiled_in_place_is_not_compiled_in_the_copy():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].compile(backend="eager")
    other = randomize(lora_fx.rewrite(model, CONFIG))
    x = sample(2, 4)
    assert not torch.equal(other(x), model(x))
    other(x).sum().backward()
    assert other[0].lora_A.default.grad is not None


# --- what cannot be captured -----------------------------------------------------------------------


def test_what_is_no_module_is_refused():
    with pytest.raises(CaptureError, match=r"expected a torch\.nn\.Module, found function"):
        check_model(lambda x: x)


def test_lazy_layers_are_left_alone_until_they_have_run():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    config = lora_fx.LoraConfig(target_modules=[])
    _, plan = plan_model(model, config)
    (row,) = plan.rejections
    assert (row.name, row.reason[-10:]) == ("0", "rewrite it")
    model(sample(2, 3))
    other = lora_fx.rewrite(model, CONFIG)
    assert_same_bits(other(sample(2, 3)), model.requires_grad_(False)(sample(2, 3)))
    assert type(lora_fx.merge(other)[0]) is nn.Linear


def test_a_model_on_several_devices_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(CaptureError, match=r"0\.weight on cpu, 1\.weight on meta.*model\.to"):
        lora_fx.rewrite(model, CONFIG)


def test_script_modules_are_refused():
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(CaptureError, match="TorchScript"):
        lora_fx.rewrite(model, CONFIG)


def test_a_script_module_inside_is_left_alone():
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4), nn.Linear(4, 2))
    plan = lora_fx.plan(model, CONFIG)
    assert [row.name for row in plan.sites] == ["1"]
    assert any(r.name == "0" and "TorchScript" in r.reason for r in plan.rejections)
    other = lora_fx.rewrite(model, CONFIG)
    assert_same_bits(other(sample(2, 4)), model.requires_grad_(False)(sample(2, 4)))
    assert all("lora_" in n for n, p in other.named_parameters() if p.requires_grad)


def test_what_cannot_be_copied_is_refused_with_the_reason():
    model = nn.Linear(2, 2)
    model.stream = (i for i in range(3))
    with pytest.raises(CaptureError, match=r"Linear cannot be copied.*generator"):
        lora_fx.rewrite(model, CONFIG)


class Counting(nn.Module):
    """Counts its calls under a lock, and reads its settings through a view that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.lock, self.again, self.calls = threading.Lock(), threading.RLock(), 0
        self.settings = {"scale": 2.0}
        self.view = types.MappingProxyType(self.settings)

    def forward(self, x):
        with self.lock, self.again:
            self.calls += 1
        return self.second(self.first(x)) * self.view["scale"]


def test_a_lock_is_shared_and_a_view_of_a_dict_is_that_of_the_copy():
    model = Counting()
    adapted = lora_fx.rewrite(model, CONFIG, (sample(2, 4),))
    assert adapted.lock is model.lock
    assert_same_bits(adapted(sample(2, 4)), model(sample(2, 4)))
    assert model.calls == 1
    adapted.settings["scale"] = 3.0
    assert_close(adapted(sample(2, 4)), 1.5 * model(sample(2, 4)))
    assert_close(lora_fx.merge(adapted)(sample(2, 4)), adapted(sample(2, 4)))


@pytest.mark.parametrize(
    "make",
    [lambda _: threading.local(), lambda _: queue.SimpleQueue(), lambda net: net.lock_of.values()],
)
def test_what_may_lead_back_to_the_original_is_refused(make):
    model = Counting()
    model.lock_of = {"first": model.first}
    model.held = make(model)
    with pytest.raises(CaptureError, match="cannot be copied"):
        lora_fx.rewrite(model, CONFIG)


# --- reparametrized layers -------------------------------------------------------------------------

NORMS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrizations.weight_norm": nn.utils.parametrizations.weight_norm,
    "parametrizations.spectral_norm": nn.utils.parametrizations.spectral_norm,
    "parametrizations.orthogonal": nn.utils.parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", NORMS)
def test_a_reparametrized_layer_goes_on_and_its_neighbors_are_adapted(name):
    torch.manual_seed(0)
    model = nn.Sequential(NORMS[name](nn.Linear(4, 4)), nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    plan = lora_fx.plan(model, CONFIG)
    assert [row.name for row in plan.sites] == ["1"]
    other = lora_fx.rewrite(model, CONFIG).eval()
    x = sample(2, 4)
    with torch.no_grad():
        assert_same_bits(other(x), model(x))
        state = {k: v.clone() for k, v in model.state_dict().items()}
    trained(other, x)
    assert_same_bits(model.state_dict(), state)
    assert all("lora_" in n for n, p in other.named_parameters() if p.requires_grad)
    assert type(lora_fx.merge(other)[0]) is type(model[0])


def test_inside_data_parallel():
    model = nn.DataParallel(seeded(zoo.Mlp)())
    other = randomize(lora_fx.rewrite(model, CONFIG)).eval()
    assert isinstance(other, nn.DataParallel)
    assert "module.first" in {row.name for row in lora_fx.plan(model, CONFIG).sites}
    assert_close(lora_fx.merge(other).eval()(sample(2, 5)), other(sample(2, 5)))
