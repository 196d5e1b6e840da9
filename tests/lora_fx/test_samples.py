"""Batches whose samples have different adapters: every sample gets what its adapter alone gives it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx import ConfigError, LoraConfig
from lora_fx.ir.record import record_of
from lora_fx.runtime.rows.samples import Assigned, CallState, SampleRows, add_rows, select_rows
from tests.golden import check_golden, printed
from tests.mixtures import MODELS
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import FORMS, Einsum, Form, Residual, tiny_llama

IDS = torch.randint(0, 11, (5, 4), generator=torch.Generator().manual_seed(0))


def three(base: nn.Module, **config: object) -> nn.Module:
    settings = {"init_lora_weights": False, "r": 2, **config}
    model = lora_fx.rewrite(base, LoraConfig(**settings), adapter_name="a")
    for seed, name in enumerate("bc", 1):
        more = {**settings, "r": (1 + seed) * settings["r"], "seed": seed}
        lora_fx.add_adapter(model, LoraConfig(**more), name)
    return model


def alone(
    model: nn.Module, x: torch.Tensor, ids: list[str | None], logits: bool = False, axis: int = 0
) -> torch.Tensor:
    """Sample by sample, each with its own adapter active; samples of the output are on ``axis``."""
    before = lora_fx.active_adapters(model)
    rows = []
    for place, name in enumerate(ids):
        lora_fx.set_adapter(model, [] if name is None else name)
        out = model(x[place : place + 1])
        rows.append(out.logits.detach() if logits else out)
    lora_fx.set_adapter(model, before)
    return torch.cat(rows, axis)


def test_every_sample_gets_its_own_adapter() -> None:
    model = three(Residual().eval())
    ids = ["b", None, "a", "c", "b"]
    out = model(IDS)
    with lora_fx.adapter_ids(model, ids):
        found = model(IDS)
    assert_close(found, alone(model, IDS, ids))
    assert_same_bits(model(IDS), out)
    lora_fx.set_adapter(model, ["a", "b", "c"], per_sample=True)
    assert_close(model(IDS, adapter_ids=["b", "__base__", "a", "c", "b"]), found)
    lora_fx.set_adapter(model, "a")
    assert lora_fx.active_adapters(model) == ("a",)
    assert not [name for name, _ in model.named_modules() if name.endswith("lora_rows")]


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=5, max_size=5))
def test_any_mixture(ids: list[str | None]) -> None:
    model = three(Residual().eval())
    with lora_fx.adapter_ids(model, ids):
        found = model(IDS)
    assert_close(found, alone(model, IDS, ids))


BATCHED = [
    form
    for form in FORMS
    if form.x().dim() > 1 and "experts" not in form.kind and "unbatched" not in form.name
]


@pytest.mark.parametrize("form", BATCHED, ids=lambda form: form.name)
def test_every_form_takes_samples(form: Form) -> None:
    base, x = form.model(), form.x()
    model = three(base, target_modules=[form.site], rank_pattern={"op.*": 2 * form.groups})
    (call,) = next(iter(record_of(model).adapters["a"].sites)).site.calls
    ids = [("a", "b", None)[place % 3] for place in range(len(x))]
    if call.left and x.dim() == 2:
        # What lies along its first axis is what the weight sums over.
        with pytest.raises(ConfigError, match="op"), lora_fx.adapter_ids(model, ids):
            model(x)
        return
    with lora_fx.adapter_ids(model, ids):
        found = model(x)
    lengths = zip(found.shape, alone(model, x[:1], ids[:1]).shape, strict=True)
    axis = next((place for place, (several, one) in enumerate(lengths) if several != one), 0)
    assert_close(found, alone(model, x, ids, axis=axis))


class Mixing(nn.Module):
    """A product whose samples are not on the first axis of what the weight is multiplied with."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.first = nn.Linear(5, 5)
        self.kernel = nn.Parameter(torch.randn(7, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.way == "columns":
            return (self.kernel @ x.T).T
        if self.way == "features first":
            return torch.einsum("oi,ib->ob", self.kernel, x.T).mT
        if self.way == "turned":
            return torch.einsum("bi,oi->ob", x, self.kernel).T
        if self.way == "ellipsis":
            return torch.einsum("...i,oi->...o", x, self.kernel)
        return (self.kernel @ x[:, :, None])[..., 0]


WAYS = ("columns", "features first", "turned", "ellipsis", "batched")


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("way", WAYS)
def test_samples_are_found_on_any_axis(way: str, dora: bool) -> None:
    """Outputs and gradients of a mixed batch are those of separate calls, also where sizes are equal."""
    x = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = three(Mixing(way).double(), target_modules=["kernel"], use_dora=dora)
    ids = ["b", None, "a", "c", "b"]
    lora_fx.set_adapter(model, list("abc"), per_sample=True)
    with lora_fx.adapter_ids(model, ids):
        found = model(x)
        found.square().sum().backward()
        # A form of call that has been seen is not followed again.
        assert_same_bits(model(x), found)
    mixed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(mixed) == (9 if dora else 6)
    for name in "abc":
        model.zero_grad()
        lora_fx.set_adapter(model, name)
        mine = [place for place, one in enumerate(ids) if one == name]
        out = model(x[mine])
        assert_close(found[mine], out)
        out.square().sum().backward()
        for key, parameter in model.named_parameters():
            if key.endswith(f".{name}"):
                assert_close(mixed[key], parameter.grad)
    lora_fx.set_adapter(model, [])
    assert_close(found[1:2], model(x[1:2]))


class Summed(nn.Module):
    """Products that mix samples, or whose samples nothing shows."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.kernel = nn.Parameter(torch.randn(7, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "vector":
            return self.kernel @ x[:, 0]
        if self.way == "columns":
            return self.kernel @ x
        return torch.einsum("ib,oi->bo", x, self.kernel)


def test_an_einsum_without_an_axis_of_samples_is_refused_before_the_model_is_edited() -> None:
    base = Einsum("i,oi->o", 7, 5)
    model = three(nn.Sequential(base), target_modules=["0.kernel"])
    x = torch.randn(5)
    before = model(x)
    with pytest.raises(
        ConfigError, match=r"0\.kernel: no axis of the activation of einsum 'i,oi->o'"
    ):
        lora_fx.set_adapter(model, list("abc"), per_sample=True)
    assert lora_fx.active_adapters(model) == ("a",)
    assert_same_bits(model(x), before)


@pytest.mark.parametrize("way", ["vector", "columns", "summed letter"])
def test_products_that_mix_samples_are_refused(way: str) -> None:
    """The sizes fit: five samples, five features."""
    model = three(Summed(way), target_modules=["kernel"])
    message = "kernel: an (input|activation) of shape"
    ids = ["b", None, "a", "c", "b"]
    with pytest.raises(ConfigError, match=message), lora_fx.adapter_ids(model, ids):
        model(torch.randn(5, 5))


class Scored(nn.Module):
    """Scores of the samples, and one number of all of them."""

    def __init__(self, score: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.score = score

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.layer(x)
        return {"out": out, "score": self.score(out.mean())}


@pytest.mark.parametrize(
    "score",
    [
        torch.linalg.vector_norm,
        torch.median,
        lambda mean: mean.kthvalue(1).values,
        lambda mean: torch.var_mean(mean, correction=0)[1],
        lambda mean: mean.gather(0, torch.tensor(0)),
    ],
    ids=["norm", "median", "kthvalue", "var_mean", "gather"],
)
def test_a_result_may_be_a_single_number_of_all_samples(
    score: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    model = three(Scored(score), target_modules=["layer"])
    x, ids = torch.randn(3, 4), ["b", None, "c"]
    wanted = []
    for row, name in zip(x, ids, strict=True):
        lora_fx.set_adapter(model, [] if name is None else name)
        wanted.append(model(row[None])["out"])
    with lora_fx.adapter_ids(model, ids):
        found = model(x)
    assert_close(found["out"], torch.cat(wanted))
    assert_close(found["score"], score(found["out"].mean()))


def test_gradients_reach_each_adapter_from_its_own_samples() -> None:
    model = three(Residual().eval())
    ids = ["b", None, "a", "b", None]
    lora_fx.set_adapter(model, ["a", "b"], per_sample=True)
    with lora_fx.adapter_ids(model, ids):
        model(IDS).square().sum().backward()
    mixed = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name in "ab":
        model.zero_grad()
        lora_fx.set_adapter(model, name)
        mine = [place for place, one in enumerate(ids) if one == name]
        model(IDS[mine]).square().sum().backward()
        for key, parameter in model.named_parameters():
            if key.endswith(f".{name}"):
                assert_close(mixed[key], parameter.grad)


def test_a_prepared_model_is_not_edited_for_each_batch() -> None:
    model = three(Residual().eval())
    lora_fx.set_adapter(model, list("abc"), per_sample=True)
    classes = [type(module) for module in model.modules()]
    for ids in (["a"] * 5, ["b", "c", None, "a", "c"]):
        with lora_fx.adapter_ids(model, ids):
            assert [type(module) for module in model.modules()] == classes
            found = model(IDS)
        assert lora_fx.active_adapters(model) == ("a", "b", "c")
        single = copy.deepcopy(model)
        lora_fx.set_adapter(single, "a")
        assert_close(found, alone(single, IDS, ids))
    with pytest.raises(ConfigError, match="does not say which sample has which"):
        model(IDS)
    for ids in (["a", "b"], list("abcabc")):
        said = f"{len(ids)} samples that adapter_ids names: the arguments of the call begin with 5"
        with pytest.raises(ConfigError, match=said), lora_fx.adapter_ids(model, ids):
            model(IDS)
    lora_fx.set_adapter(model, "a")
    assert model(IDS).shape == (5, 4)


def test_a_model_of_transformers_as_peft_does_it() -> None:
    base, _ = tiny_llama()
    base = base.eval()
    ids = torch.randint(0, base.config.vocab_size, (4, 6))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    config = {"target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    model = lora_fx.rewrite(base, LoraConfig(**config), adapter_name="a")
    lora_fx.add_adapter(model, LoraConfig(**config, r=3, seed=1), "b")
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config), "a").eval()
    theirs.add_adapter("b", peft.LoraConfig(**config, r=3))
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.base_model.model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(values[name.removesuffix(".weight")])
    names = ["b", "__base__", "a", "b"]
    with lora_fx.adapter_ids(model, names):
        found = model(ids, attention_mask=mask).logits
    expected = theirs(ids, attention_mask=mask, adapter_names=names).logits
    assert_close(found, expected)


def test_flattened_tokens_belong_to_their_sample() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            return self.fc(x.flatten(0, 1)).view(*x.shape[:2], 4)

    model, x = three(Flat(), target_modules=["fc"]), torch.randn(4, 5, 3)
    ids = ["a", "c", None, "a"]
    with lora_fx.adapter_ids(model, ids):
        found = model(x)
    assert_close(found, alone(model, x, ids))


@pytest.mark.parametrize("name", ["nn.Linear", "x @ W", "conv2d depthwise", "padding_idx"])
@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
def test_variants(name: str, variant: str) -> None:
    (form,) = (f for f in FORMS if f.name == name)
    if form.kind == "embedding" and variant == "lora_bias":
        return
    model, x = (
        three(form.model(), r=form.groups, target_modules=[form.site], **{variant: True}),
        form.x(),
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "magnitude" in key or "lora_bias" in key:
                parameter.add_(torch.rand_like(parameter))
    ids = [("a", "b", None)[place % 3] for place in range(len(x))]
    with lora_fx.adapter_ids(model, ids):
        found = model(x)
    assert_close(found, alone(model, x, ids))


def test_parts_and_several_calls() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model = three(nn.Sequential(layer, nn.Linear(8, 8)))
    model_x = torch.randn(3, 4, 8)
    with lora_fx.adapter_ids(model, ["a", "b", None]):
        found = model(model_x)
    assert_close(found, alone(model, model_x, ["a", "b", None]))


def test_it_compiles_whole() -> None:
    model = three(Residual().eval())
    lora_fx.set_adapter(model, ["a", "b"], per_sample=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ids in (["b", None, "a", "b", "a"], ["a", "a", "b", "a", None]):
        with lora_fx.adapter_ids(model, ids):
            wanted = model(IDS)  # first: a compiler cannot see which axis has the samples
            assert_close(compiled(IDS), wanted)


# --- the functions ----------------------------------------------------------------------------------


def table_of(samples: int, own: list[int], state: CallState = CallState.FOLDED) -> SampleRows:
    table = SampleRows(("a",), torch.device("cpu"))
    table.reassign(Assigned(samples, 1, {"a": own}))
    table.thread.state = state
    return table


def test_rows_are_selected_and_added_to() -> None:
    x = torch.arange(12.0).view(6, 2)
    assert_same_bits(select_rows(x, table_of(6, [2, 0]), "a"), x[[2, 0]])
    assert_same_bits(select_rows(x, table_of(3, [1]), "a"), x[2:4])
    total = add_rows(torch.zeros(6, 2), table_of(3, [2, 0]), "a", torch.ones(4, 2))
    assert total[:, 0].tolist() == [1, 1, 0, 0, 1, 1]
    for shape, samples, state in (
        ((6, 2), 4, CallState.FOLDED),
        ((6, 2), 3, CallState.TRUSTED),
        ((), 1, CallState.FOLDED),
    ):
        with pytest.raises(ConfigError, match=f"does not begin with the {samples} samples"):
            select_rows(torch.zeros(shape), table_of(samples, [0], state), "a")
    with pytest.raises(ConfigError, match="called by itself"):
        select_rows(x, table_of(6, [0], CallState.CLOSED), "a")


# --- errors: the model is as it was ------------------------------------------------------------------


def test_bad_ids() -> None:
    model = three(Residual().eval())
    classes, out = [type(module) for module in model.modules()], model(IDS)
    for ids, message in (
        (["a", "x"], "no adapter 'x'"),
        ("a", "one name or None for each sample"),
        ([], "one name or None for each sample"),
    ):
        with pytest.raises(ConfigError, match=message), lora_fx.adapter_ids(model, ids):
            pass
    with pytest.raises(ConfigError, match="the 3 samples"), lora_fx.adapter_ids(model, ["a"] * 3):
        model(IDS)
    assert [type(module) for module in model.modules()] == classes
    assert_same_bits(model(IDS), out)


def test_experts_whose_rows_are_no_known_tokens_take_one_adapter() -> None:
    (form,) = (f for f in FORMS if f.pattern == "grouped-mm")
    model = three(form.model(), target_modules=[form.site])
    with pytest.raises(ConfigError, match="of which token each row is"):
        lora_fx.set_adapter(model, list("ab"), per_sample=True)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_row_of_an_expert_has_the_adapter_of_its_token(name: str, implementation: str) -> None:
    base = MODELS[name]()
    base.set_experts_implementation(implementation)
    targets = ["q_proj", "gate_up_proj", "down_proj"]
    model = three(base, target_modules=targets)
    names: list[str | None] = ["b", None, "a", "c", "b"]
    x = torch.randint(1, 60, (5, 4), generator=torch.Generator().manual_seed(0))
    expected = [alone(model, ids, names, logits=True) for ids in (x, x.flip(0))]
    gradients = separate(model, x, names)
    lora_fx.set_adapter(model, list("abc"), per_sample=True)
    with lora_fx.adapter_ids(model, names):
        for ids, wanted in zip((x, x.flip(0)), expected, strict=True):
            assert_close(model(ids).logits, wanted, 1e-5)
        # The second batch had other experts for its tokens, and was not followed once more.
        table = next(one for key, one in model.named_modules() if key.endswith("lora_rows"))
        assert len(table.folded) == 1
        model(x).logits.square().sum().backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for key, grad in found.items():
        assert_close(grad, gradients[key], 1e-5)
    with pytest.raises(ConfigError, match="does not begin with"), lora_fx.adapter_ids(model, names):
        model(x[:3])


def test_a_row_of_an_expert_in_half_precision_with_factors_in_fp32() -> None:
    base = MODELS["mixtral"]().to(torch.bfloat16)
    base.set_experts_implementation("eager")
    model = three(base, target_modules=["gate_up_proj"])
    names: list[str | None] = ["b", None, "a"]
    x = torch.randint(1, 60, (3, 4), generator=torch.Generator().manual_seed(0))
    wanted = alone(model, x, names, logits=True)
    lora_fx.set_adapter(model, list("abc"), per_sample=True)
    with lora_fx.adapter_ids(model, names):
        assert_close(model(x).logits.float(), wanted.float(), 2e-2)


def test_an_embedding_under_autocast() -> None:
    model = three(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4)), target_modules=["0", "1"])
    names: list[str | None] = ["b", None, "a"]
    x = torch.tensor([[1, 2], [3, 4], [5, 6]])
    with torch.autocast("cpu", torch.bfloat16):
        wanted = alone(model, x, names)
        lora_fx.set_adapter(model, list("abc"), per_sample=True)
        with lora_fx.adapter_ids(model, names):
            assert_close(model(x).float(), wanted.float(), 2e-2)


def separate(model: nn.Module, x: torch.Tensor, names: list[str | None]) -> dict[str, torch.Tensor]:
    """The gradients of one sample after the other."""
    model.zero_grad()
    for place, name in enumerate(names):
        if name is not None:
            lora_fx.set_adapter(model, name)
            model(x[place : place + 1]).logits.square().sum().backward()
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_golden() -> None:
    # A bias on B has no function that computes the operation with it.
    model = three(nn.Sequential(nn.Linear(3, 4)), target_modules=["0"], lora_bias=True)
    lora_fx.set_adapter(model, list("ab"), per_sample=True)
    check_golden("select_rows", printed(lora_fx.graphs(model)["0"]))


def _t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        vocab_size=20,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("build", [lambda: tiny_llama()[0], _t5], ids=["llama", "t5"])
def test_beams_are_repeated_samples(build: Callable[[], nn.Module]) -> None:
    """As PEFT, which repeats ``adapter_names`` as ``generate`` repeats samples."""
    base = build().eval()
    names = ["q", "v"] if hasattr(base, "encoder") else ["q_proj", "v_proj"]
    settings = {"r": 2, "target_modules": names, "init_lora_weights": False}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings), "a").eval()
    theirs.add_adapter("b", peft.LoraConfig(**settings))
    model = lora_fx.rewrite(base, LoraConfig(**settings), adapter_name="a")
    lora_fx.add_adapter(model, LoraConfig(**settings), "b")
    for name in "ab":
        state = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        lora_fx.load_adapter_state_dict(model, {k: v * 8 for k, v in state.items()}, name)
        peft.set_peft_model_state_dict(theirs, {k: v * 8 for k, v in state.items()}, name)
    how = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    ids = torch.randint(3, 11, (4, 5), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **how}
    wanted = theirs.generate(**given, adapter_names=["a", "__base__", "b", "a"])
    with lora_fx.adapter_ids(model, ["a", None, "b", "a"], repeats=3):
        assert torch.equal(model.generate(**given), wanted)
        model(**{"decoder_input_ids": ids} if hasattr(base, "encoder") else {}, input_ids=ids)
    assert not torch.equal(wanted, theirs.generate(**given, adapter_names=["a"] * 4))
    with (
        lora_fx.adapter_ids(model, ["a", None, "b", "a"]),
        pytest.raises(ConfigError, match=r"repeats=, where generate"),
    ):
        model.generate(**given)
    with pytest.raises(ConfigError, match="repeats"), lora_fx.adapter_ids(model, ["a"], repeats=0):
        pass
