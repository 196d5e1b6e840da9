"""Several adapters on one model: each alone is what a rewrite of its own gives, together they add up."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import CaptureError, CheckpointError, ConfigError, LoraConfig, MergeError, NoMatchError
from lora_fx.ir.graph import META_KEY
from lora_fx.ir.record import record_of
from tests.golden import check_golden, printed
from tests.numerics import assert_close, assert_same_bits, in_double
from tests.zoo import FORMS, Form, Mlp, Residual

IDS = torch.tensor([[0, 2, 5, 10], [2, 2, 9, 10]])
LISTED = LoraConfig(r=2, target_modules=["up"], init_lora_weights=False, seed=2)
ALL = LoraConfig(r=4, lora_alpha=2, init_lora_weights=False, seed=3, rank_pattern={"down": 3})
HEAD = LoraConfig(
    r=2, target_modules=["down"], init_lora_weights=False, modules_to_save=["head"], seed=5
)


def two(first: LoraConfig = LISTED, second: LoraConfig = ALL) -> tuple[nn.Module, nn.Module]:
    base = Residual().eval()
    model = lora_fx.rewrite(base, first, adapter_name="one")
    return base, lora_fx.add_adapter(model, second, "two")


def state(model: nn.Module) -> dict[str, object]:
    """Everything about a model that a call which fails must leave alone."""
    return {
        "record": record_of(model),
        "keys": list(model.state_dict()),
        "ids": {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)},
        "wants": {n: p.requires_grad for n, p in model.named_parameters()},
        "classes": [type(module) for module in model.modules()],
    }


# --- switching ------------------------------------------------------------------------------------


def test_each_alone_is_what_a_rewrite_of_its_own_is() -> None:
    base, model = two()
    for name, config in (("one", LISTED), ("two", ALL), ("one", LISTED)):
        lora_fx.set_adapter(model, name)
        alone = lora_fx.rewrite(base, config)
        assert_same_bits(model(IDS), alone(IDS))
        assert lora_fx.active_adapters(model) == (name,)


def test_a_new_adapter_is_not_active() -> None:
    base, model = two()
    assert lora_fx.adapter_names(model) == ("one", "two")
    assert lora_fx.active_adapters(model) == ("one",)
    assert_same_bits(model(IDS), lora_fx.rewrite(base, LISTED)(IDS))


def test_several_add_up() -> None:
    base, model = two()
    lora_fx.set_adapter(model, ["one", "two"])
    exact = in_double(base)
    for config in (LISTED, ALL):
        exact = in_double(lora_fx.merge(lora_fx.rewrite(base, config).double(), into=exact))
    assert_close(model(IDS), exact(IDS))
    assert_close(lora_fx.merge(model)(IDS), exact(IDS))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_form_switches_and_adds_up(form: Form) -> None:
    # PyTorch has other kernels for weights that want a gradient.
    base, x = form.model().requires_grad_(False), form.x()
    config = {"r": form.groups, "target_modules": [form.site], "init_lora_weights": False}
    model = lora_fx.rewrite(base, LoraConfig(**config), adapter_name="one")
    lora_fx.add_adapter(model, LoraConfig(**config, seed=7), "two")
    lora_fx.set_adapter(model, ["one", "two"])
    assert_close(lora_fx.merge(model)(x), model(x))
    lora_fx.set_adapter(model, "two")
    assert_same_bits(model(x), lora_fx.rewrite(base, LoraConfig(**config, seed=7))(x))
    lora_fx.set_adapter(model, [])
    assert_same_bits(model(x), base(x))


def test_parts_of_a_fused_weight_switch_and_add_up() -> None:
    base = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    model = lora_fx.rewrite(
        base, LoraConfig(target_modules=["self_attn.q"], init_lora_weights=False)
    )
    wide = LoraConfig(target_modules=["self_attn.q", "self_attn.v", "linear1"], seed=1)
    lora_fx.add_adapter(model, wide, "wide")
    lora_fx.add_adapter(model, LoraConfig(target_modules=["linear2"], seed=2), "outside")
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter)
    for names in (["default", "wide"], ["wide"], ["outside"], ["default", "outside", "wide"], []):
        lora_fx.set_adapter(model, names)
        expected = lora_fx.merge(model) if names else base
        assert_close(model(x), expected(x))
    # The attention has its own forward, and its fast paths, where no adapter is in it.
    lora_fx.set_adapter(model, "outside")
    assert type(model.self_attn) is nn.MultiheadAttention
    lora_fx.set_adapter(model, "wide")
    assert type(model.self_attn) is not nn.MultiheadAttention


def test_an_inactive_adapter_costs_nothing() -> None:
    base, model = two()
    only = lora_fx.rewrite(base, LISTED, adapter_name="one")
    lora_fx.set_adapter(model, "two")
    lora_fx.set_adapter(model, "one")
    for name, graph in lora_fx.graphs(only).items():
        assert printed(lora_fx.graphs(model)[name]) == printed(graph)
    lora_fx.set_adapter(model, [])
    assert not [n for g in lora_fx.graphs(model).values() for n in g.nodes if META_KEY in n.meta]


def test_active_parameters_want_a_gradient_and_others_do_not() -> None:
    _, model = two(LISTED, HEAD)

    def wanting() -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad}

    ones = wanting()
    assert ones == {f"blocks.{i}.up.lora_{x}.one" for i in range(2) for x in "AB"}
    lora_fx.set_adapter(model, "two")
    twos = {f"blocks.{i}.down.lora_{x}.two" for i in range(2) for x in "AB"}
    assert wanting() == twos | {"head.weight", "head.bias"} & set(dict(model.named_parameters()))
    lora_fx.set_adapter(model, ["one", "two"])
    assert wanting() > ones | twos
    lora_fx.set_adapter(model, "one", inference_mode=True)
    assert not wanting()


def test_training_one_leaves_the_other_alone() -> None:
    base, model = two()
    lora_fx.set_adapter(model, "two")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(lora_fx.trainable_parameters(model), lr=0.1)
    model(IDS).square().sum().backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n.endswith(".two")}
    lora_fx.set_adapter(model, "one")
    assert_same_bits(model(IDS), lora_fx.rewrite(base, LISTED)(IDS))


def test_disable_adapter_gives_the_base_and_puts_everything_back() -> None:
    base, model = two(HEAD, LISTED)
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(model):
            parameter.add_(1)
    before, out = state(model), model(IDS)
    with lora_fx.disable_adapter(model) as same:
        assert same is model
        assert_same_bits(model(IDS), base(IDS))
        assert lora_fx.active_adapters(model) == ()
    after = state(model)
    assert after.pop("record").active == before.pop("record").active
    assert after == before
    assert_same_bits(model(IDS), out)
    with pytest.raises(KeyError), lora_fx.disable_adapter(model):
        raise KeyError
    assert_same_bits(model(IDS), out)


@pytest.mark.parametrize("per_sample", [False, True])
def test_what_is_deleted_meanwhile_does_not_come_back(per_sample: bool) -> None:
    base, model = two(LISTED, LISTED)
    lora_fx.set_adapter(model, ["one", "two"], per_sample=per_sample)
    with lora_fx.disable_adapter(model):
        lora_fx.delete_adapter(model, "one")
    assert lora_fx.active_adapters(model) == ("two",)
    with lora_fx.disable_adapter(model):
        lora_fx.delete_adapter(model, "two")
    assert lora_fx.active_adapters(model) == ()
    assert_same_bits(model(IDS), base(IDS))


def test_what_is_chosen_while_adapters_are_disabled_counts_afterwards() -> None:
    """As in PEFT: :func:`lora_fx.set_adapter` and ``adapter_names`` leave a disabled model disabled."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)
    settings = {"r": 2, "target_modules": ["0"], "init_lora_weights": False}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings), "one")
    theirs.add_adapter("two", peft.LoraConfig(**settings))
    model = lora_fx.rewrite(base, LoraConfig(**settings), adapter_name="one")
    lora_fx.add_adapter(model, LoraConfig(**settings), "two")
    for name in ("one", "two"):
        state = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        lora_fx.load_adapter_state_dict(model, state, name)
    alone = model(x)
    with theirs.disable_adapter(), lora_fx.disable_adapter(model):
        theirs.set_adapter("two")
        lora_fx.set_adapter(model, "two")
        for one in (theirs, model):
            assert_same_bits(one(x), base(x))
        with lora_fx.adapter_ids(model, ["one", "two"]):
            assert_same_bits(model(x), base(x))
            assert_same_bits(theirs(x, adapter_names=["one", "two"]), base(x))
        assert_same_bits(model(x), base(x))
    assert lora_fx.active_adapters(model) == ("two",)
    assert_close(model(x), theirs(x))
    assert not torch.equal(model(x), alone)
    assert model[0].lora_A.two.requires_grad
    assert not model[0].lora_A.one.requires_grad


@pytest.mark.parametrize("prepared", [False, True])
def test_blocks_nest(prepared: bool) -> None:
    base, model = two()
    if prepared:
        lora_fx.set_adapter(model, ["one", "two"], per_sample=True)
    with lora_fx.adapter_ids(model, ["one", "two"]):
        outer = model(IDS)
        with lora_fx.disable_adapter(model):
            assert_same_bits(model(IDS), base(IDS))
        assert_same_bits(model(IDS), outer)
        with lora_fx.adapter_ids(model, ["two", None]):
            inner = model(IDS)
            assert_same_bits(inner[1], base(IDS)[1])
        assert_same_bits(model(IDS), outer)
        lora_fx.set_adapter(model, [])
        assert_same_bits(model(IDS), outer)
        with pytest.raises(ConfigError, match="adapter_ids"):
            lora_fx.delete_adapter(model, "one")
    assert not lora_fx.active_adapters(model)
    assert_same_bits(model(IDS), base(IDS))


def test_blocks_may_end_in_any_order() -> None:
    base, model = two()
    alone = model(IDS)
    first, second = lora_fx.disable_adapter(model), lora_fx.adapter_ids(model, ["two", None])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert_same_bits(model(IDS)[1], base(IDS)[1])
    assert not torch.equal(model(IDS)[0], base(IDS)[0])
    second.__exit__(None, None, None)
    assert_same_bits(model(IDS), alone)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_in_no_block(copied: Callable[[nn.Module], nn.Module]) -> None:
    base, model = two()
    alone = model(IDS)
    with lora_fx.disable_adapter(model):
        other = copied(model)
        assert_same_bits(other(IDS), base(IDS))
        lora_fx.set_adapter(other, "one")
        assert_same_bits(other(IDS), alone)


def test_a_deleted_adapter_leaves_nothing() -> None:
    base, model = two(LISTED, HEAD)
    lora_fx.delete_adapter(model, "two")
    only = lora_fx.rewrite(base, LISTED, adapter_name="one")
    assert list(model.state_dict()) == list(only.state_dict())
    assert lora_fx.adapter_names(model) == ("one",)
    lora_fx.add_adapter(model, ALL, "two")
    lora_fx.set_adapter(model, "two")
    lora_fx.delete_adapter(model, "one")
    assert_same_bits(model(IDS), lora_fx.rewrite(base, ALL)(IDS))


def test_deleting_the_adapter_of_a_raw_parameter_takes_its_holder_away() -> None:
    (form,) = (f for f in FORMS if f.name == "x @ W")
    model = lora_fx.rewrite(form.model(), LoraConfig(target_modules=["kernel"]))
    lora_fx.set_adapter(model, [])
    lora_fx.delete_adapter(model, "default")
    assert list(model.state_dict()) == list(form.model().state_dict())


# --- what adapters have in the place of the base's parameters ----------------------------------------


def test_each_adapter_has_its_own_saved_module() -> None:
    base, model = two(HEAD, LoraConfig(target_modules=["up"], modules_to_save=["head"]))
    for shift, name in ((1.0, "one"), (2.0, "two")):
        lora_fx.set_adapter(model, name)
        with torch.no_grad():
            model.head.weight.add_(shift)
    for shift, name in ((1.0, "one"), (2.0, "two")):
        lora_fx.set_adapter(model, name)
        assert_same_bits(model.head.weight, base.head.weight + shift)
        assert_same_bits(lora_fx.merge(model).head.weight, base.head.weight + shift)
    lora_fx.set_adapter(model, [])
    assert model.head.weight.data_ptr() == base.head.weight.data_ptr()
    assert_same_bits(lora_fx.merge(model, adapter_names="one").head.weight, base.head.weight + 1.0)
    with pytest.raises(ConfigError, match=r"'one' and 'two' cannot be active together.*head"):
        lora_fx.set_adapter(model, ["one", "two"])
    with pytest.raises(MergeError, match="several of the adapters have their own head"):
        lora_fx.merge(model, adapter_names=["one", "two"])


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["head"], "init_lora_weights": "pissa"},
        {"target_modules": ["up"], "trainable_token_indices": {"embed": [2]}},
        {"target_modules": ["up"], "modules_to_save": ["head"]},
    ],
)
def test_what_others_have_in_a_saved_module_is_theirs(config: dict) -> None:
    model = lora_fx.rewrite(Residual(), LoraConfig(r=2, **config))
    before = {n: p for n, p in model.named_parameters() if p.requires_grad or "lora_" in n}
    lora_fx.set_adapter(model, [])
    full = LoraConfig(r=2, target_modules=["down"], modules_to_save=["head", "embed"])
    lora_fx.add_adapter(model, full, "full")
    lora_fx.set_adapter(model, "full")
    trained = {id(p) for p in lora_fx.trainable_parameters(model)}
    assert not trained & {id(parameter) for parameter in before.values()}
    lora_fx.set_adapter(model, "default")
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


def test_ties_come_back_with_the_base() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(11, 6)
            self.mid = nn.Linear(6, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids):
            return self.head(self.mid(self.emb(ids)))

    model = lora_fx.rewrite(Tied(), LoraConfig(target_modules=["mid"], modules_to_save=["head"]))
    assert model.head.weight is not model.emb.weight
    lora_fx.set_adapter(model, [])
    assert model.head.weight is model.emb.weight
    lora_fx.set_adapter(model, "default")
    assert model.head.weight is not model.emb.weight


def test_biases_belong_to_their_adapter() -> None:
    biased = LoraConfig(target_modules=["up"], bias="all")
    base, model = two(biased, LISTED)
    with torch.no_grad():
        model.blocks[0].up.bias.add_(1)
    lora_fx.set_adapter(model, "two")
    assert_same_bits(model.blocks[0].up.bias, base.blocks[0].up.bias)
    lora_fx.set_adapter(model, "one")
    assert_same_bits(model.blocks[0].up.bias, base.blocks[0].up.bias + 1)


def test_what_lies_beside_the_base_moves_and_is_saved_with_the_model() -> None:
    _, model = two(HEAD, LISTED)
    lora_fx.set_adapter(model, "two")
    assert "head.lora_own_weight.one" in model.state_dict()
    model.double()
    lora_fx.set_adapter(model, "one")
    assert model.head.weight.dtype == torch.float64
    lora_fx.set_adapter(model, [])
    assert model(IDS).dtype == torch.float64


# --- copies, files, compilers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_switch_by_themselves(copied: Callable[[nn.Module], nn.Module]) -> None:
    base, model = two(HEAD, ALL)
    other = copied(model)
    before = model(IDS)
    lora_fx.set_adapter(other, "two")
    assert_same_bits(model(IDS), before)
    assert_same_bits(other(IDS), lora_fx.rewrite(base, ALL)(IDS))
    lora_fx.set_adapter(other, "one")
    assert_same_bits(other(IDS), before)
    lora_fx.add_adapter(other, LISTED, "three")
    assert lora_fx.adapter_names(model) == ("one", "two")
    graphs = record_of(other).base.graphs
    assert len({id(graphs[f"blocks.{i}.up"]) for i in range(2)}) == 1


def test_each_is_saved_and_loaded_beside_the_others(tmp_path: Path) -> None:
    base, model = two(HEAD, ALL)
    for name in ("one", "two"):
        lora_fx.save_adapter(model, tmp_path, name)
    loaded = lora_fx.load_adapter(base, tmp_path / "one", adapter_name="one")
    assert lora_fx.load_adapter(loaded, tmp_path / "two", adapter_name="two") is loaded
    assert lora_fx.active_adapters(loaded) == ("one",)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one", "one")
    theirs.load_adapter(tmp_path / "two", "two")
    for name in ("two", "one"):
        for each in (model, loaded, theirs):
            each.set_adapter(name) if each is theirs else lora_fx.set_adapter(each, name)
        assert_same_bits(loaded(IDS), model(IDS))
        assert_close(loaded(IDS), theirs(IDS))


def test_the_folder_above_adapters_says_where_they_are(tmp_path: Path) -> None:
    base, model = two()
    for name in ("one", "two"):
        lora_fx.save_adapter(model, tmp_path, name)
    with pytest.raises(CheckpointError) as caught:
        lora_fx.load_adapter(base, tmp_path)
    assert f"did you mean {tmp_path / 'one'} or {tmp_path / 'two'}?" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"does not fit the one of this name.*another name"):
        lora_fx.load_adapter(model, tmp_path / "one", adapter_name="two")


def test_one_that_does_not_fit_is_not_added(tmp_path: Path) -> None:
    base, model = two()
    lora_fx.save_adapter(lora_fx.rewrite(Mlp(), LoraConfig(r=2)), tmp_path / "mlp")
    wide = Residual(width=2 * base.head.in_features)
    lora_fx.save_adapter(lora_fx.rewrite(wide, ALL), tmp_path / "wide")
    before = state(model)
    for folder in ("mlp", "wide"):
        with pytest.raises(CheckpointError, match="does not fit this Residual"):
            lora_fx.load_adapter(model, tmp_path / folder, adapter_name="three")
        after = state(model)
        assert after.pop("record").adapters == record_of(model).adapters
        assert after == {key: value for key, value in before.items() if key != "record"}


@pytest.mark.parametrize("frontend", ["auto", "export"])
def test_graphs_of_whole_models_switch(frontend: str) -> None:
    base, x = Mlp().eval(), torch.randn(3, 5)
    config = LoraConfig(r=2, init_lora_weights=False)
    model = lora_fx.rewrite(base, config, x, frontend=frontend)
    lora_fx.add_adapter(model, LoraConfig(r=3, init_lora_weights=False, seed=9), "other")
    lora_fx.set_adapter(model, "other")
    assert_close(model(x), lora_fx.merge(model)(x))
    lora_fx.set_adapter(model, ["other", "default"])
    assert_close(model(x), lora_fx.merge(model)(x))


def test_a_switched_model_compiles_whole() -> None:
    _, model = two()
    lora_fx.set_adapter(model, ["one", "two"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(IDS), model(IDS))
    lora_fx.set_adapter(model, "two")
    assert_close(compiled(IDS), model(IDS))


# --- errors: the model is as it was ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: lora_fx.add_adapter(m, ALL, "one"), ConfigError, "is an adapter 'one' already"),
        (lambda m: lora_fx.add_adapter(m, ALL, "a.b"), ConfigError, "letters, digits"),
        (lambda m: lora_fx.add_adapter(m, peft.LoraConfig(), "x"), ConfigError, "from_dict"),
        (lambda m: lora_fx.add_adapter(m, {"r": 4}, "x"), ConfigError, r"from_dict\(config\)"),
        (
            lambda m: lora_fx.add_adapter(m, LoraConfig(target_modules=["nowhere"]), "x"),
            NoMatchError,
            "nowhere",
        ),
        (
            lambda m: lora_fx.add_adapter(m, LoraConfig(bias="all"), "x"),
            ConfigError,
            "the adapter 'one' trains biases",
        ),
        (lambda m: lora_fx.set_adapter(m, "three"), ConfigError, "the model has 'one', 'two'"),
        (lambda m: lora_fx.set_adapter(m, ["two", "two"]), ConfigError, "named twice"),
        (lambda m: lora_fx.delete_adapter(m, "one"), ConfigError, "'one' is active: activate"),
        (lambda m: lora_fx.delete_adapter(m, "three"), ConfigError, "no adapter 'three'"),
        (lambda m: lora_fx.merge(m, adapter_names="three"), MergeError, "no adapter 'three'"),
    ],
)
def test_bad_calls_leave_the_model_alone(
    call: Callable[[nn.Module], object], error: type[Exception], message: str
) -> None:
    _, model = two(LoraConfig(target_modules=["up"], bias="lora_only", modules_to_save=["head"]))
    before = state(model)
    with pytest.raises(error, match=message):
        call(model)
    assert state(model) == before


def test_a_failure_on_the_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = two(HEAD, LISTED)
    before, out = state(model), model(IDS)
    import lora_fx.passes.insert.trained_whole as unfreeze

    def fails(*_: object) -> bool:
        raise MemoryError("no more memory")

    monkeypatch.setattr(unfreeze, "_unfreeze_bias", fails)
    with pytest.raises(CaptureError, match="no more memory"):
        lora_fx.add_adapter(
            model, LoraConfig(modules_to_save=["head"], bias="all", target_modules=["down"]), "x"
        )
    assert state(model) == before
    assert_same_bits(model(IDS), out)


def test_a_model_without_adapters_has_no_verbs() -> None:
    for verb in (lora_fx.adapter_names, lora_fx.active_adapters):
        with pytest.raises(ConfigError, match="this Mlp has no adapters"):
            verb(Mlp())
    with pytest.raises(ConfigError, match="this Mlp has no adapters"):
        lora_fx.add_adapter(Mlp(), ALL, "one")


def test_none_is_no_name_of_an_adapter() -> None:
    model = lora_fx.rewrite(Mlp(), ALL)
    with pytest.raises(ConfigError, match=r"list of names, or \[\] for the model without"):
        lora_fx.set_adapter(model, None)  # type: ignore[arg-type]
    assert lora_fx.active_adapters(model) == ("default",)


def test_merging_with_nothing_active_says_so() -> None:
    _, model = two()
    lora_fx.set_adapter(model, [])
    with pytest.raises(MergeError, match="no adapter is active"):
        lora_fx.merge(model)


def test_a_layer_that_replaced_another_takes_an_adapter() -> None:
    base, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), torch.randn(2, 3)
    model = lora_fx.rewrite(base, LoraConfig(target_modules=["0"]))
    model[2] = layer = nn.Linear(3, 3)
    before = model(x)
    lora_fx.add_adapter(model, LoraConfig(r=2, target_modules=["2"], init_lora_weights=False), "x")
    lora_fx.set_adapter(model, ["default", "x"])
    assert model[2] is layer
    assert_close(model(x), lora_fx.merge(model)(x))
    assert not torch.allclose(model(x), before)


def test_golden_two_branches() -> None:
    config = LoraConfig(r=2, target_modules=["0"])
    model = lora_fx.rewrite(nn.Sequential(nn.Linear(3, 4)), config, optimize=False)
    lora_fx.add_adapter(model, LoraConfig(r=1, lora_alpha=3, target_modules=["0"]), "other")
    lora_fx.set_adapter(model, ["default", "other"])
    check_golden("insert_two_adapters", printed(lora_fx.graphs(model)["0"]))
