"""A region is its module in every respect but where its forward comes from."""

from __future__ import annotations

import copy
import gc
import io
import linecache
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import lora_fx
from lora_fx.errors import CaptureError
from lora_fx.ir.graph import META_KEY, Region
from lora_fx.passes.capture.trace import trace
from lora_fx.passes.graph import (
    copy_graph,
    graphs_of,
    install,
    is_region,
    original_class,
    uninstall,
)
from tests import zoo
from tests.algebra import randomize
from tests.golden import printed
from tests.models import builders
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import sample, seeded

CONFIG = lora_fx.LoraConfig(r=2, lora_dropout=0.25)
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.fixture
def model() -> nn.Module:
    return seeded(zoo.Residual)(dropout=0.5).eval()


@pytest.fixture
def rewritten(model) -> nn.Module:
    return randomize(lora_fx.rewrite(model, CONFIG)).eval()


def as_region(module: nn.Module) -> nn.Module:
    install([Region("", module, trace(module)[0])])
    return module


def round_trips(module: nn.Module):
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


# --- classes -----------------------------------------------------------------------------------------


def test_a_region_is_an_instance_of_its_class(model, rewritten):
    for before, after in zip(
        model.modules(), (m for n, m in rewritten.named_modules() if "lora_" not in n), strict=True
    ):
        assert isinstance(after, type(before))
        assert original_class(after) is type(before)
        assert type(after).__name__ == type(before).__name__
        assert type(after).__qualname__ == type(before).__qualname__
        assert type(after).__module__ == type(before).__module__
    assert "Residual" in repr(rewritten)


def test_names_are_those_of_the_model(model, rewritten):
    names = [name for name, _ in rewritten.named_modules() if "lora_" not in name]
    assert names == [name for name, _ in model.named_modules()]
    keys = [key for key in rewritten.state_dict() if "lora_" not in key]
    assert keys == list(model.state_dict())
    assert [n for n, _ in rewritten.named_buffers()] == [n for n, _ in model.named_buffers()]


def test_equal_blocks_share_one_class(rewritten):
    blocks = rewritten.blocks
    assert type(blocks[0]) is type(blocks[1])
    assert type(blocks[0].up) is type(blocks[1].up)
    assert type(blocks[0].up) is type(blocks[0].down)
    assert type(blocks[0].up) is not type(rewritten.head)
    graphs = lora_fx.graphs(rewritten)
    assert graphs["blocks.0.up"] is graphs["blocks.1.up"]
    other = lora_fx.rewrite(seeded(zoo.Residual)(), CONFIG)
    assert type(other.blocks[0].up) is type(blocks[0].up)


def test_blocks_of_other_ranks_do_not_share(model):
    config = lora_fx.LoraConfig(r=2, rank_pattern={"blocks.1.up": 3}, alpha_pattern={})
    other = lora_fx.rewrite(model, config)
    assert type(other.blocks[0].up) is not type(other.blocks[1].up)
    assert type(other.blocks[0].down) is type(other.blocks[1].down)


def test_a_class_dies_with_its_last_instance():
    class Once(nn.Module):
        def forward(self, x):
            return x * 2

    import weakref

    module = as_region(Once())
    cls = weakref.ref(type(module))
    assert cls() is not None
    del module
    gc.collect()
    assert cls() is None


def test_uninstall_gives_the_class_back():
    module = as_region(builders.Scaled())
    assert is_region(module)
    for _ in range(2):
        uninstall(module)
        assert type(module) is builders.Scaled


def test_no_subclass_is_announced():
    before = list(builders.Registering.subclasses)
    module = as_region(builders.Registered())
    assert isinstance(module, builders.Registered)
    assert builders.Registering.subclasses == before
    for other in round_trips(module):
        assert type(other) is type(module)


def test_an_attribute_that_is_always_there_changes_nothing():
    model = nn.Sequential(builders.Delegating(), nn.Linear(4, 4))
    other = lora_fx.rewrite(model, CONFIG)
    assert_same_bits(other(sample(2, 4)), model.requires_grad_(False)(sample(2, 4)))
    assert type(lora_fx.merge(other)[0]) is builders.Delegating


# --- hooks -------------------------------------------------------------------------------------------


def test_hooks_from_before_and_after_see_what_they_saw(model):
    seen = []

    def note(kind):
        return lambda module, *values: seen.append(
            (kind, original_class(module).__name__, [v.shape for v in _tensors(values)])
        )

    def watch(one):
        one.blocks[0].register_forward_pre_hook(note("pre"))
        one.blocks[0].up.register_forward_hook(note("post"))
        one.blocks[1].register_full_backward_hook(note("backward"))

    watch(model)
    early = lora_fx.rewrite(model, CONFIG)
    model(IDS).sum().backward()
    expected = list(seen)
    assert [kind for kind, *_ in expected] == ["pre", "post", "backward"]
    seen.clear()
    early(IDS).sum().backward()
    assert seen == expected
    seen.clear()
    late = lora_fx.rewrite(seeded(zoo.Residual)().eval(), CONFIG)
    watch(late)
    late(IDS).sum().backward()
    assert seen == expected


def _tensors(values):
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, torch.Tensor)]


def test_a_hook_that_changes_the_output_does(rewritten):
    rewritten.blocks[0].up.register_forward_hook(lambda m, args, out: out * 0)
    rewritten.blocks[0].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    block = rewritten.blocks[0]
    x = sample(2, 3, 6)
    expected = x + 1 + block.down.forward(torch.zeros(2, 3, 10))
    assert_close(block(x), expected, 1e-6)


# --- copies ------------------------------------------------------------------------------------------


def test_copies_compute_the_same(rewritten):
    expected = rewritten(IDS)
    for other in round_trips(rewritten):
        assert_same_bits(other(IDS), expected)
        assert [type(m) for m in other.modules()] == [type(m) for m in rewritten.modules()]
        assert other.state_dict().keys() == rewritten.state_dict().keys()
        assert [p.requires_grad for p in other.parameters()] == [
            p.requires_grad for p in rewritten.parameters()
        ]


def test_copies_are_independent(rewritten):
    expected = rewritten(IDS).detach().clone()
    for other in round_trips(rewritten):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.train()
    assert_same_bits(rewritten(IDS), expected)
    assert not rewritten.blocks[0].training


def test_copies_keep_what_was_learnt_and_merge(rewritten):
    merged = lora_fx.merge(rewritten)(IDS)
    for other in round_trips(rewritten):
        assert_same_bits(lora_fx.merge(other)(IDS), merged)
        assert type(lora_fx.merge(other)) is zoo.Residual


def test_graphs_survive_with_their_tags(rewritten):
    for other in round_trips(rewritten):
        found, expected = graphs_of(other), graphs_of(rewritten)
        assert found.keys() == expected.keys()
        for name in found:
            assert printed(found[name]) == printed(expected[name])


def test_a_fresh_process_loads_it(rewritten, tmp_path, root):
    torch.save(rewritten, tmp_path / "model.pt")
    code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
ids = torch.tensor({IDS.tolist()})
import lora_fx
torch.save((model(ids), lora_fx.merge(model)(ids)), {str(tmp_path / "out.pt")!r})
assert not isinstance(lora_fx.graphs(model)["blocks.0.up"], dict)
"""
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
    adapted, merged = torch.load(tmp_path / "out.pt")
    assert_same_bits(adapted, rewritten(IDS))
    assert_same_bits(merged, lora_fx.merge(rewritten)(IDS))


@pytest.mark.parametrize("cls", [builders.Stateful, builders.Reduced])
def test_manners_of_the_class_are_kept(cls):
    module = as_region(seeded(cls)())
    x = sample(2, 4)
    expected = module(x)
    for other in round_trips(module):
        assert type(other) is type(module)
        assert_same_bits(other(x), expected)
    if cls is builders.Stateful:
        assert copy.deepcopy(module).copies == 1
        assert pickle.loads(pickle.dumps(module)).lock is not module.lock


REGISTER: dict[str, type] = {}


class Registering(type):
    def __new__(cls, name, bases, members):
        made = REGISTER[name] = super().__new__(cls, name, bases, members)
        return made

    def __init__(cls, name, bases, members):
        super().__init__(name, bases, members)
        REGISTER[f"{name} by init"] = cls


class Registered(nn.Linear, metaclass=Registering):
    pass


def test_a_metaclass_is_not_told_of_the_classes_of_regions():
    before = dict(REGISTER)
    config = lora_fx.LoraConfig(r=2, target_modules=["0"])
    model = randomize(lora_fx.rewrite(nn.Sequential(Registered(4, 4)), config)).eval()
    assert before == REGISTER
    assert type(type(model[0])) is Registering
    x = sample(2, 4)
    for other in round_trips(model):
        assert_same_bits(other(x), model(x))
    assert type(lora_fx.merge(model)[0]) is Registered


class Delegating(nn.Module):
    """Looks up in what it holds whatever it does not have itself, as wrappers do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, x):
        return self.module(x) * self.in_features


def test_what_looks_up_attributes_in_a_region_is_not_copied_as_that():
    base = seeded(lambda: nn.Sequential(Delegating(nn.Linear(4, 4)), nn.Linear(4, 4)))().eval()
    model = randomize(lora_fx.rewrite(base, lora_fx.LoraConfig(r=2, target_modules=".*"))).eval()
    x = sample(2, 4)
    expected = model(x)
    assert not torch.equal(expected, base(x))
    for other in round_trips(model):
        assert type(other[0]) is type(model[0])
        assert is_region(other[0].module)
        assert_same_bits(other(x), expected)
    merged = lora_fx.merge(model)
    assert type(merged[0]) is Delegating
    assert_close(merged(x), expected)


class Reads(nn.Module):
    """Reads its own weight and that of its child; runs its own forward if its graph is in doubt."""

    def __init__(self):
        super().__init__()
        self.fc, self.kernel = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))
        self.factor = 2.0

    def forward(self, x):
        return F.linear(x @ self.kernel, self.fc.weight) * self.factor


class ReadsInDoubt(Reads):
    def forward(self, x):
        return super().forward(x) * (2.0 if self.training else 3.0)


@pytest.mark.parametrize("cls", [Reads, ReadsInDoubt])
def test_copies_read_weights_with_their_adapters(cls):
    config = lora_fx.LoraConfig(r=2, target_modules=["fc", "kernel"])
    model = randomize(lora_fx.rewrite(seeded(cls)(), config)).eval()
    assert is_region(model) == (cls is Reads)
    x, merged = sample(2, 4), lora_fx.merge(model)
    for factor in (2.0, 3.0):
        model.factor = merged.factor = factor
        expected = merged(x)
        for other in (model, *round_trips(model)):
            assert_close(other(x), expected)
            assert_close(other.kernel + 0, merged.kernel)
            assert_close(other.fc.weight.mT, merged.fc.weight.mT)


def test_layers_in_the_module_of_a_graph_are_regions():
    plain = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval())
    model = lora_fx.rewrite(plain, CONFIG)
    randomize(model).eval()
    assert isinstance(model, fx.GraphModule)
    x = sample(2, 4)
    expected = model(x)
    assert not torch.equal(expected, plain(x))
    for other in round_trips(model):
        assert is_region(other.get_submodule("0"))
        assert isinstance(other, fx.GraphModule)
        assert_same_bits(other(x), expected)
        merged = lora_fx.merge(other)
        assert type(merged).__mro__[1] is fx.GraphModule
        assert_close(merged(x), expected)


class Parenthesized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("fc(mask)", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule("fc(mask)")(x)


def test_a_name_may_have_a_parenthesis():
    base = Parenthesized().eval()
    model = randomize(lora_fx.rewrite(base, CONFIG)).eval()
    assert set(lora_fx.graphs(model)) == {"", "fc(mask)", "fc(mask).0", "fc(mask).1"}
    x = sample(2, 4)
    expected = model(x)
    assert not torch.equal(expected, base(x))
    with lora_fx.disable_adapter(model):
        assert_same_bits(model(x), base(x))
    for other in round_trips(model):
        assert_same_bits(other(x), expected)
        assert_close(lora_fx.merge(other)(x), expected)


@pytest.mark.parametrize("change", [lambda m: m.double(), lambda m: m.to(torch.bfloat16)])
def test_moves_to_other_dtypes(rewritten, change):
    expected = rewritten(IDS)
    other = change(copy.deepcopy(rewritten))
    assert all(p.dtype != torch.float32 for p in other.parameters())
    assert_close(other(IDS), expected, 3e-2)
    assert is_region(other.blocks[0].up)


def test_moves_to_half(rewritten):
    other = copy.deepcopy(rewritten).half()
    assert other(IDS).dtype == torch.float16


def test_moves_to_meta_and_back(rewritten):
    other = copy.deepcopy(rewritten).to("meta")
    assert other(IDS.to("meta")).device.type == "meta"
    other = other.to_empty(device="cpu")
    other.load_state_dict(rewritten.state_dict())
    assert_same_bits(other(IDS), rewritten(IDS))


# --- attributes that went into the graph ---------------------------------------------------------


@pytest.mark.parametrize("cls", [builders.Scaled, builders.ScaledKernel])
@pytest.mark.parametrize(
    ("name", "value"), [("factor", 2.0), ("factor", 3.0), ("twice", True), ("extra", nn.ReLU())]
)
def test_an_attribute_set_later_is_honored(cls, name, value):
    config = lora_fx.LoraConfig(r=2, target_modules=["fc", "kernel"])
    model = randomize(lora_fx.rewrite(nn.Sequential(seeded(cls)(), nn.Linear(4, 4)), config))
    merged = lora_fx.merge(model)
    assert is_region(model[0]) == (cls is builders.ScaledKernel)
    x = sample(2, 4)
    for one in (model, merged):
        setattr(one[0], name, value)
    assert_close(model(x), merged(x))
    assert isinstance(model[0], cls)
    model.train().eval().requires_grad_(False)
    assert_close(model(x), merged(x))


def test_layers_and_weights_can_be_replaced(rewritten):
    rewritten.norm.weight = nn.Parameter(torch.zeros(6))
    rewritten.norm.bias = nn.Parameter(torch.ones(6))
    first = rewritten(IDS)
    rewritten.head = nn.Linear(6, 3)
    assert is_region(rewritten.blocks[0].up)
    assert rewritten(IDS).shape == (2, 3)
    assert not torch.equal(first[:, :3], rewritten(IDS))


# --- graphs ------------------------------------------------------------------------------------------


def test_a_copied_graph_is_the_same_and_another(rewritten):
    graph = lora_fx.graphs(rewritten)["blocks.0.up"]
    other = copy_graph(graph)
    assert printed(other) == printed(graph)
    assert [n.meta.get(META_KEY) for n in other.nodes] == [
        n.meta.get(META_KEY) for n in graph.nodes
    ]
    last = next(n for n in reversed(other.nodes) if n.op == "call_function")
    last.replace_all_uses_with(last.all_input_nodes[0])
    assert printed(other) != printed(graph)


def test_a_traceback_shows_the_generated_code():
    module = as_region(builders.Scaled())
    with pytest.raises(RuntimeError) as caught:
        module(sample(2, 5))
    text = "".join(traceback.format_exception(caught.value))
    assert "lora_fx Scaled" in text
    assert "self.fc(x)" in text


def test_the_text_of_a_dead_class_goes():
    class Gone(nn.Module):
        def forward(self, x):
            return x * 2

    module = as_region(Gone())
    assert any("lora_fx Gone" in name for name in linecache.cache)
    del module
    gc.collect()
    assert not any("lora_fx Gone" in name for name in linecache.cache)


def test_a_container_that_grows_or_is_cut_runs_as_it_is_now():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(r=2))
    x = torch.randn(3, 4)
    assert torch.equal(adapted[:2](x), model[:2](x))
    extra = nn.Linear(2, 5)
    adapted.append(extra)
    assert torch.equal(adapted(x), extra(model(x)))
    blocks = lora_fx.rewrite(zoo.Residual(3), lora_fx.LoraConfig(r=2))
    blocks.blocks.append(nn.Sigmoid())
    ids = torch.tensor([[1, 2]])
    assert torch.isfinite(blocks(ids)).all()


def test_fx_forgets_the_code_of_regions_that_are_gone() -> None:
    wrapped = torch.fx._symbolic_trace._wrapped_fns_to_patch
    gc.collect()
    before = len(wrapped)
    for alpha in range(1, 51):  # each has code of its own
        config = lora_fx.LoraConfig(r=2, lora_alpha=alpha, target_modules=".*")
        lora_fx.rewrite(nn.Linear(4, 2), config)
    gc.collect()
    assert len(wrapped) < before + 25  # the last ones are kept


class _EveryModule(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


class _Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.fc = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x @ self.w)


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("kind", [{"target_parameters": ["w"]}, {"use_dora": True}])
@pytest.mark.parametrize("tracer", [fx.Tracer, _EveryModule])
def test_fx_traces_an_adapted_model(tracer: type[fx.Tracer], kind: Any, optimize: bool) -> None:
    config = lora_fx.LoraConfig(r=2, target_modules=["fc"], **kind)
    adapted = randomize(lora_fx.rewrite(_Raw(), config, optimize=optimize)).eval()
    traced = fx.GraphModule(adapted, tracer().trace(adapted))
    x = sample(3, 4)
    assert_close(traced(x), adapted(x))
    assert_close(pickle.loads(pickle.dumps(traced))(x), adapted(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.1}])
def test_jit_records_an_adapted_model_and_does_not_script_it(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    config = lora_fx.LoraConfig(r=2, target_modules="all-linear", **options)
    adapted = lora_fx.rewrite(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    x = torch.randn(3, 4)
    recorded = torch.jit.trace(adapted, x[:2])
    torch.jit.save(recorded, tmp_path / "model.pt")
    assert_close(torch.jit.load(tmp_path / "model.pt")(x), adapted(x))
    with pytest.raises(
        CaptureError, match=r"torch.jit.script .* graph: script what merge\(\) gives"
    ):
        torch.jit.script(adapted)
    merged = lora_fx.merge(adapted)
    assert_close(torch.jit.script(merged)(x), merged(x))
