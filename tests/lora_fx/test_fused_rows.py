"""One function for a linear operation whose rows have different adapters: what separate runs give."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx import ConfigError, LoraConfig, LoraFxError
from lora_fx.runtime.rows.fused_rows import lora_rows
from lora_fx.runtime.rows.samples import CallState, SampleRows
from tests.golden import check_golden, printed
from tests.numerics import assert_close, assert_same_bits

NAMES = ("a", "b", "c", "d")
Ids = Sequence[str | None]


class Net(nn.Module):
    """Products with and without a bias, a weight that is stored turned, and an input that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.turned = nn.Parameter(torch.randn(8, 5))
        self.down = nn.Linear(5, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(x)) @ self.turned
        return self.down(F.gelu(hidden)) + x


def model_of(
    base: nn.Module | None = None,
    configs: dict[str, dict[str, Any]] | None = None,
    **options: Any,
) -> nn.Module:
    """Four adapters of other ranks, scales and starts."""
    torch.manual_seed(0)
    base = Net().double() if base is None else base
    model = base
    for seed, name in enumerate(NAMES):
        more = {"r": 1 + seed, "lora_alpha": 3 * seed + 1, **(configs or {}).get(name, {})}
        config = LoraConfig(
            target_modules=r".*(up|turned|down|conv|emb)",
            init_lora_weights=False,
            seed=seed,
            **more,
        )
        if seed:
            lora_fx.add_adapter(model, config, name)
        else:
            model = lora_fx.rewrite(base, config, adapter_name=name, **options)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "magnitude" in key or "lora_bias" in key:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter)).add_(0.1)
    return model


def prepared(*args: Any, **kwargs: Any) -> nn.Module:
    model = model_of(*args, **kwargs)
    lora_fx.set_adapter(model, NAMES, per_sample=True)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def separate(model: nn.Module, x: Tensor, ids: Ids) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, gradient of x and gradients of each adapter's parameters, each alone with its rows."""
    model = copy.deepcopy(model)
    outputs, of_x, found = [None] * len(ids), torch.zeros_like(x), {}
    for name in dict.fromkeys(ids):
        lora_fx.set_adapter(model, [] if name is None else name)
        rows = [row for row, one in enumerate(ids) if one == name]
        own = x[rows].detach().requires_grad_()
        out = model(own)
        out.square().sum().backward()
        of_x[rows] = own.grad
        for row, value in zip(rows, out.detach(), strict=True):
            outputs[row] = value
        if name is not None:
            found |= {key: one for key, one in gradients(model).items() if one is not None}
        model.zero_grad()
    return torch.stack(outputs), of_x, found


def check(model: nn.Module, x: Tensor, ids: Ids) -> None:
    wanted, of_x, found = separate(model, x, ids)
    x = x.detach().requires_grad_()
    out = model(x, adapter_ids=list(ids))
    assert_close(out, wanted)
    out.square().sum().backward()
    assert_close(x.grad, of_x)
    mine = gradients(model)
    for key, wanted_grad in found.items():
        assert_close(mine.pop(key), wanted_grad)
    # An adapter without a row gets nothing.
    assert all(one is None or not one.any() for one in mine.values())


MODEL = prepared()
IDS = st.lists(st.sampled_from([*NAMES, None]), min_size=2, max_size=7)


@settings(max_examples=60)
@given(IDS, st.integers(1, 3), st.booleans())
def test_any_order_of_rows(ids: Ids, tokens: int, matrix: bool) -> None:
    MODEL.zero_grad()
    shape = (len(ids), 6) if matrix else (len(ids), tokens, 6)
    check(MODEL, torch.randn(shape, dtype=torch.float64), ids)


def test_every_adapter_is_in_one_call() -> None:
    model = prepared()
    graphs = lora_fx.graphs(model)
    calls = [node for graph in graphs.values() for node in graph.nodes if node.target is lora_rows]
    assert len(calls) == 3
    assert not any("select_rows" in node.name for graph in graphs.values() for node in graph.nodes)
    plain = prepared(optimize=False)
    assert any("select_rows" in n.name for g in lora_fx.graphs(plain).values() for n in g.nodes)
    check(plain, torch.randn(4, 6, dtype=torch.float64), ["b", "a", None, "b"])


def test_adapters_of_other_targets() -> None:
    model = model_of()
    lora_fx.add_adapter(model, LoraConfig(r=2, target_modules=["down"]), "e")
    lora_fx.set_adapter(model, ["e", "b", "c"], per_sample=True)
    for ids in (["e", "b", "e", "c"], ["b", "e", "e", "c"], ["e", "e", "b", "b"]):
        model.zero_grad()
        check(model, torch.randn(4, 2, 6, dtype=torch.float64), ids)


@pytest.mark.parametrize("ids", [["b", "a", "b", None], ["b", "b", "a", None]])
def test_parts_of_the_outputs(ids: Ids) -> None:
    torch.manual_seed(0)
    table = SampleRows(("a", "b"), torch.device("cpu"))
    table.assign(ids)
    table.thread.state = CallState.FOLDED
    x, weight, bias = (torch.randn(*shape).double() for shape in ((4, 3, 5), (7, 5), (7,)))
    a = [torch.randn(r, 5).double().requires_grad_() for r in (2, 3)]
    b = [torch.randn(n, r).double().requires_grad_() for n, r in ((3, 2), (7, 3))]
    x.requires_grad_()
    options = (table, ("a", "b"), a, b, (0.5, 2.0), (None, None), ((2, 5), None))
    out = lora_rows(x, weight, bias, *options)
    wanted = []
    for row, name in enumerate(ids):
        own = F.linear(x[row], weight, bias)
        if name is not None:
            place = "ab".index(name)
            delta = F.linear(F.linear(x[row], a[place]), b[place]) * (0.5, 2.0)[place]
            own = own + (F.pad(delta, (2, 2)) if name == "a" else delta)
        wanted.append(own)
    assert_close(out, torch.stack(wanted))
    given = [x, *a, *b]
    for mine, theirs in zip(
        torch.autograd.grad(out.square().sum(), given),
        torch.autograd.grad(torch.stack(wanted).square().sum(), given),
        strict=True,
    ):
        assert_close(mine, theirs)
    table.thread.state = CallState.CLOSED
    with pytest.raises(ConfigError, match="called by itself"):
        lora_rows(x, weight, bias, *options)


def test_the_absent_are_left_alone() -> None:
    model = prepared()
    model(torch.randn(2, 6, dtype=torch.float64), adapter_ids=["b", None]).sum().backward()
    trained = {name.rpartition(".")[2] for name, one in gradients(model).items() if one is not None}
    assert trained == {"b"}


@pytest.mark.parametrize("kind", [{"lora_bias": True}, {"use_dora": True}])
def test_kinds_are_mixed(kind: dict[str, Any]) -> None:
    model = prepared(configs={"b": kind, "d": kind})
    check(model, torch.randn(6, 2, 6, dtype=torch.float64), ["d", "a", "b", None, "c", "b"])


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.up = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.conv(self.emb(ids).mT).mT)


def test_embeddings_and_convolutions() -> None:
    model = prepared(Mixed().double())
    ids, names = torch.randint(9, (5, 4)), ["c", "a", None, "c", "b"]
    out = model(ids, adapter_ids=names)
    out.square().sum().backward()
    alone = copy.deepcopy(model)
    for name in "abc":
        rows = [row for row, one in enumerate(names) if one == name]
        lora_fx.set_adapter(alone, name)
        alone.zero_grad()
        wanted = alone(ids[rows])
        assert_close(out[rows], wanted)
        wanted.square().sum().backward()
        for key, one in gradients(alone).items():
            assert_close(gradients(model)[key], one)


@pytest.mark.parametrize("ids", [["a", "b", "b", None, "d"], ["b", "a", "b", None, "d"]])
@pytest.mark.parametrize("different", [False, True])
def test_dropout(ids: Ids, different: bool) -> None:
    configs = {name: {"lora_dropout": 0.5} for name in NAMES}
    if different:
        configs = {"a": {"lora_dropout": 0.25}, "b": {"lora_dropout": 0.75}}
    base = nn.Sequential(nn.Linear(400, 3, bias=False)).double()
    base.up = base._modules.pop("0")
    model = prepared(base, configs).train()
    x = torch.randn(len(ids), 30, 400, dtype=torch.float64, requires_grad=True)
    lora_fx.set_adapter(model, [])
    plain = model(x)
    lora_fx.set_adapter(model, NAMES, per_sample=True)
    torch.manual_seed(3)
    out = model(x, adapter_ids=ids)
    for row, name in enumerate(ids):
        if name is None:
            assert_close(out[row], plain[row])
            continue
        # The branch is linear in its dropped input: its mean over many masks is the branch without dropout.
        a, b = (getattr(one, name) for one in (model.up.lora_A, model.up.lora_B))
        config = lora_fx.adapters.adapter_record(model, name).config
        scale = config.lora_alpha / config.r
        dropout = configs.get(name, {}).get("lora_dropout", 0.0)
        (factor,) = torch.autograd.grad(out[row].sum(), x, retain_graph=True)
        base_rows = model.get_parameter("up.weight").sum(0)
        own = (factor[row] - base_rows) / ((b.sum(0) @ a) * scale)
        kept = own.round(decimals=6).unique()
        assert kept.tolist() == pytest.approx([0.0, 1 / (1 - dropout)] if dropout else [1.0])
        delta = F.linear(F.linear(x[row] * own, a), b) * scale
        assert_close(out[row] - plain[row], delta)
    torch.manual_seed(3)
    assert_same_bits(model(x, adapter_ids=ids), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    model = prepared(Net())
    x, ids = torch.randn(4, 3, 6), ["a", "c", "a", None]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        wanted, _, found = separate(model, x, ids)
        out = model(x, adapter_ids=ids)
        out.square().sum().backward()
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(out, wanted, **tolerance)
    for key, one in found.items():
        assert gradients(model)[key].dtype is torch.float32
        mine = gradients(model)[key] / one.norm()
        torch.testing.assert_close(mine, one / one.norm(), **tolerance)


def test_half_models_have_full_factors() -> None:
    model = prepared(Net().bfloat16())
    out = model(torch.randn(4, 6, dtype=torch.bfloat16), adapter_ids=["a", "c", "a", None])
    out.float().square().sum().backward()
    assert gradients(model)["up.lora_A.c"].dtype is torch.float32


@pytest.mark.parametrize("ids", [["a", "b", None, "c"], ["a", "b", "a", "c"]])
def test_second_derivatives(ids: Ids) -> None:
    model = prepared()
    x = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
    factors = [model.up.lora_A.a, model.up.lora_B.a, model.down.lora_B.c]
    model(x, adapter_ids=ids)

    def penalty(*values: Tensor) -> Tensor:
        return model(values[0], adapter_ids=ids).square().sum()

    assert torch.autograd.gradcheck(penalty, (x,))
    assert torch.autograd.gradgradcheck(penalty, (x,))
    first = torch.autograd.grad(penalty(x), factors, create_graph=True)
    second = torch.autograd.grad(sum(one.square().sum() for one in first), x)[0]
    plain = prepared(optimize=False)
    factors = [plain.up.lora_A.a, plain.up.lora_B.a, plain.down.lora_B.c]
    first = torch.autograd.grad(
        plain(x, adapter_ids=ids).square().sum(), factors, create_graph=True
    )
    assert_close(second, torch.autograd.grad(sum(one.square().sum() for one in first), x)[0])


def test_a_frozen_a() -> None:
    model = prepared()
    x, ids = torch.randn(3, 6, dtype=torch.float64), ["a", "b", None]
    for key, parameter in model.named_parameters():
        if "lora_A" in key:
            parameter.requires_grad_(False)
    wanted = prepared()
    for one in (model, wanted):
        one(x, adapter_ids=ids).square().sum().backward()
    assert_close(gradients(model)["up.lora_B.b"], gradients(wanted)["up.lora_B.b"])
    (of_b,) = torch.autograd.grad(
        model(x.requires_grad_(), adapter_ids=ids).square().sum(), [model.down.lora_B.a]
    )
    assert of_b.abs().sum() > 0
    with pytest.raises(LoraFxError, match="whose A's are frozen"):
        torch.autograd.grad(
            model(x, adapter_ids=ids).square().sum(), [model.down.lora_B.a], create_graph=True
        )


def test_a_weight_that_is_trained_by_hand() -> None:
    model = prepared()
    model.up.weight.requires_grad_(True)
    model.up.bias.requires_grad_(True)
    x, ids = torch.randn(4, 6, dtype=torch.float64), ["a", "b", "a", None]
    model(x, adapter_ids=ids).square().sum().backward()
    plain = prepared(optimize=False)
    plain.up.weight.requires_grad_(True)
    plain.up.bias.requires_grad_(True)
    plain(x, adapter_ids=ids).square().sum().backward()
    assert_close(model.up.weight.grad, plain.up.weight.grad)
    assert_close(model.up.bias.grad, plain.up.bias.grad)


def test_recomputed_inputs() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.up(x)) * x.repeat(1, 1, 2)[..., :8])

    model = prepared(Gated().double(), memory="balanced")
    check(model, torch.randn(5, 4, 6, dtype=torch.float64), ["a", "b", "a", None, "d"])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", ["argument", "block"])
def test_checkpoints_have_the_samples_of_their_call(how: str, reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=reentrant)

    model, x = prepared(Checkpointed().double()), torch.randn(3, 2, 6, dtype=torch.float64)
    orders: list[Ids] = [["a", "b", "c"], ["c", "a", "b"], [None, "d", "d"]]
    # All forwards come before the backwards, whatever the samples are then.
    losses = []
    for ids in orders:
        own = x.clone().requires_grad_()
        if how == "argument":
            out = model(own, adapter_ids=ids)
        else:
            with lora_fx.adapter_ids(model, ids):
                out = model(own)
        losses.append((out.square().sum(), own))
    for (loss, own), ids in zip(losses, orders, strict=True):
        model.zero_grad()
        loss.backward()
        _, of_x, found = separate(model, x, ids)
        assert_close(own.grad, of_x)
        for key, one in found.items():
            assert_close(gradients(model)[key], one)
    with pytest.raises(ConfigError, match="does not say which sample has which"):
        model(x)


def test_a_checkpoint_around_the_whole_model() -> None:
    model, ids = prepared(), ["a", "b", "a"]
    x = torch.randn(3, 6, dtype=torch.float64)
    model(x, adapter_ids=ids)
    for reentrant in (False, True):
        model.zero_grad()
        own = x.clone().requires_grad_()
        out = checkpoint(lambda x: model(x, adapter_ids=ids), own, use_reentrant=reentrant)
        out.square().sum().backward()
        _, of_x, found = separate(model, x, ids)
        assert_close(own.grad, of_x)
        for key, one in found.items():
            assert_close(gradients(model)[key], one)


def test_compiled_once_for_all_orders() -> None:
    model = prepared(Net())
    x = torch.randn(4, 3, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    orders = [["b", None, "a", "b"], ["a", "b", "b", None], ["b", "b", None, "a"]]
    with lora_fx.adapter_ids(model, orders[0]):
        model(x)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for ids in orders:
        _, _, found = separate(model, x, ids)
        model.zero_grad()
        with lora_fx.adapter_ids(model, ids):
            compiled(x).square().sum().backward()
        for key, one in found.items():
            assert_close(gradients(model)[key], one)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 2
    with pytest.raises(Exception, match="a compiler would compile each order"):
        compiled(x, adapter_ids=orders[0])


def test_transforms_of_torch_func() -> None:
    model = prepared()
    x, ids = torch.randn(3, 6, dtype=torch.float64), ["a", "b", "a"]
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    with lora_fx.adapter_ids(model, ids):
        model(x)

        def loss(values: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, values, (x,)).square().sum()

        found = torch.func.grad(loss)(values)
    _, _, wanted = separate(model, x, ids)
    for key, one in wanted.items():
        assert_close(found[key], one)


def test_quantized_bases() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = nn.Sequential()
    base.up, base.down = nn.Linear(64, 64), nn.Linear(64, 64)
    quantized = lora_fx.quantize(base, "nf4")
    model = prepared(quantized)
    x, ids = torch.randn(4, 2, 64), ["b", "a", "b", None]
    wanted, _, found = separate(model, x, ids)
    out = model(x, adapter_ids=ids)
    assert_close(out, wanted)
    out.square().sum().backward()
    for key, one in found.items():
        assert_close(gradients(model)[key], one)


# --- the argument of a call --------------------------------------------------------------------------


def test_numbers_name_active_adapters() -> None:
    model, x = prepared(), torch.randn(3, 6, dtype=torch.float64)
    wanted = model(x, adapter_ids=["b", None, "d"])
    assert_same_bits(model(x, adapter_ids=torch.tensor([1, -1, 3])), wanted)
    with lora_fx.adapter_ids(model, ["a", "a", "a"]):
        assert_same_bits(model(x, adapter_ids=(1, -1, 3)), wanted)
        assert not torch.equal(model(x), wanted)


def test_the_base_takes_the_argument_and_has_no_use_for_it() -> None:
    model, x = prepared(), torch.randn(3, 6, dtype=torch.float64)
    with lora_fx.disable_adapter(model):
        assert_same_bits(model(x, adapter_ids=["a", "b", "c"]), model(x))
    check(model, x, ["a", "b", "c"])


class Open(Net):
    """Takes any argument, as models of transformers do."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("base", [Net, Open])
def test_a_model_that_is_not_prepared_refuses_the_argument(base: type[nn.Module]) -> None:
    """Without a word all samples would have the active adapter."""
    model, x = model_of(base().double()), torch.randn(3, 6, dtype=torch.float64)
    for names in (None, "a", ["a", "b"]):
        if names is not None:
            lora_fx.set_adapter(model, names)
        model(x)
        for _ in range(2):
            with pytest.raises(ConfigError, match="per_sample=True"):
                model(x, adapter_ids=["a", "b", "c"])
    lora_fx.set_adapter(model, NAMES, per_sample=True)
    with pytest.raises(ConfigError, match="call the model itself"):
        model.forward(x, adapter_ids=["a", "b", "c"])
    check(model, x, ["a", "b", "c"])
    with lora_fx.disable_adapter(model):
        assert_same_bits(model(x, adapter_ids=["a", "b", "c"]), model(x))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "x", "a"], "no adapter 'x' in this model's batches"),
        ([0, 4, 0], "no adapter 4"),
        ("abc", "one name or number for each sample"),
        ([], "one name or number for each sample"),
        (torch.zeros(3), "whole numbers"),
        (["a", "a"], "give one adapter for each sample"),
    ],
)
def test_ids_that_name_nothing(ids: Any, message: str) -> None:
    model, x = prepared(), torch.randn(3, 6, dtype=torch.float64)
    with pytest.raises(ConfigError, match=message):
        model(x, adapter_ids=ids)
    check(model, x, ["a", None, "c"])


def test_a_model_that_takes_such_an_argument_gets_it() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 6)

        def forward(self, x: Tensor, adapter_ids: Tensor) -> Tensor:
            return self.up(x) + adapter_ids

    model = prepared(Own())
    with lora_fx.adapter_ids(model, ["a", None]):
        assert model(torch.randn(2, 6), adapter_ids=torch.ones(())).shape == (2, 6)


@pytest.mark.parametrize("name", ["assign", "thread"])
def test_names_of_the_table_are_no_adapters(name: str) -> None:
    model = model_of()
    with pytest.raises(ConfigError, match="choose another"):
        lora_fx.add_adapter(model, LoraConfig(r=1, target_modules=["up"]), name)


def test_golden() -> None:
    base = nn.Sequential()
    base.up = nn.Linear(3, 4)
    model = prepared(base, {"b": {"lora_dropout": 0.1}, "c": {"lora_bias": True}})
    check_golden("fuse_rows", printed(lora_fx.graphs(model)["up"]))
