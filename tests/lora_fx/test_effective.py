"""An adapted weight knows its adapters: code that reads it computes with W + s·BA, and trains the factors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import lora_fx
from lora_fx.errors import CaptureError, ConfigError
from lora_fx.passes.graph import is_region
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits

WIDTH = 4


class Layer(nn.Module):
    """Applies its own weight."""

    def __init__(self, shape: tuple[int, ...] = (WIDTH, WIDTH)) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(shape))
        self.last = nn.Linear(WIDTH, WIDTH)


PRODUCTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "linear": ((WIDTH, WIDTH), F.linear),
    "matmul": ((WIDTH, WIDTH), lambda x, w: x @ w),
    "transposed": ((WIDTH, WIDTH), lambda x, w: torch.matmul(x, w.T)),
    "swapped": ((WIDTH, WIDTH), lambda x, w: x @ w.transpose(0, 1)),
    "addmm": ((WIDTH, WIDTH), lambda x, w: torch.addmm(x.new_ones(WIDTH), x, w)),
    "einsum": ((WIDTH, WIDTH), lambda x, w: torch.einsum("bi,oi->bo", x, w)),
    "conv": ((WIDTH, WIDTH, 1), lambda x, w: F.conv1d(x.unsqueeze(-1), w).squeeze(-1)),
    "embedding": ((7, WIDTH), lambda x, w: F.embedding(x.abs().long().sum(-1) % 7, w)),
}


def made(name: str, *, doubt: bool, **more: Any) -> nn.Module:
    shape, product = PRODUCTS[name]

    class Plain(Layer):
        def forward(self, x):
            return self.last(product(x, self.kernel))

    class InDoubt(Layer):
        def forward(self, x):
            if self.training is None:
                return x
            return self.last(product(x, self.kernel))

    torch.manual_seed(0)
    model = (InDoubt if doubt else Plain)(shape).double()
    config = lora_fx.LoraConfig(seed=1, r=2, target_modules=["kernel", "last"], **more)
    adapted = randomize(lora_fx.rewrite(model, config))
    assert is_region(adapted) is False or not doubt
    return adapted


def batch() -> Tensor:
    torch.manual_seed(3)
    return 3 * torch.randn(5, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_in_code_is_that_of_the_dense_weight(name: str, more: dict[str, Any]) -> None:
    if name == "embedding" and more.get("use_dora"):
        more = {}
    model, x = made(name, doubt=True, **more), batch()
    merged = lora_fx.merge(model)
    assert_close(model(x), merged(x), 1e-10)
    model(x).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert not lora_fx.status(model).computed  # no weight was made dense for it


@pytest.mark.parametrize("name", [name for name in PRODUCTS if name != "embedding"])
def test_code_drops_what_a_graph_drops(name: str) -> None:
    """Adapter dropout has a meaning for a product: it runs the function that the graph calls."""
    losses = []
    for doubt in (False, True):
        model = made(name, doubt=doubt, lora_dropout=0.5).train()
        torch.manual_seed(7)
        losses.append(model(batch()))
    assert_close(*losses, 1e-12)
    assert not torch.allclose(losses[0], model.eval()(batch()))


def test_samples_of_a_batch_have_adapters_of_their_own_in_code() -> None:
    model, x = made("linear", doubt=True), batch()
    lora_fx.add_adapter(
        model, lora_fx.LoraConfig(seed=5, r=3, target_modules=["kernel", "last"]), "other"
    )
    randomize(model)
    ids = ["default", "other", None, "other", "default"]
    alone = []
    for row, name in zip(x, ids, strict=True):
        lora_fx.set_adapter(model, [name] if name else [])
        alone.append(model(row[None]))
    with lora_fx.adapter_ids(model, ids):
        assert_close(model(x), torch.cat(alone), 1e-10)


class Cubed(torch.autograd.Function):
    """A product that no operator shows: it receives the weight as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.mT @ x


READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "an autograd function": Cubed.apply,  # type: ignore[dict-item]
    "cat": lambda x, w: x @ torch.cat([w, w])[:WIDTH].T,
    "rows of a cat": lambda x, w: x @ torch.cat([w[:2], w[2:] * 2]).T,
    "sum": lambda x, w: (x.unsqueeze(1) * w).sum(-1),
    "copy": lambda x, w: x @ torch.empty_like(w).copy_(w).T,
    "cast": lambda x, w: F.linear(x.float(), w.float()).double(),
    "rows": lambda x, w: F.linear(x, w[torch.arange(WIDTH)]),
    "norm": lambda x, w: x * w.norm(),
}


@pytest.mark.parametrize("name", READS)
def test_any_other_read_computes_the_adapted_weight(name: str) -> None:
    class Both(Layer):
        def forward(self, x):
            if self.training is None:
                return x
            return F.linear(x, self.kernel) + READS[name](x, self.kernel)

    torch.manual_seed(0)
    config = lora_fx.LoraConfig(seed=1, r=2, target_modules=["kernel"])
    model, x = randomize(lora_fx.rewrite(Both().double(), config)), batch()
    merged = lora_fx.merge(model)
    tolerance = 1e-6 if name == "cast" else 1e-10
    found = model(x)
    assert_close(found, merged(x), tolerance)
    lora_a, lora_b = (getattr(model.kernel_lora, f"lora_{one}").default for one in "AB")
    grads = torch.autograd.grad(found.square().sum(), [lora_a, lora_b])
    weight = model.get_parameter("kernel")
    dense = weight.detach() + 4.0 * lora_b @ lora_a
    exact = F.linear(x, dense) + READS[name](x, dense)
    assert_close(grads, torch.autograd.grad(exact.square().sum(), [lora_a, lora_b]), tolerance)
    ((place, where),) = lora_fx.status(model).computed[:1]
    assert place == "kernel"
    assert "test_effective.py" in where


def layer() -> nn.Module:
    torch.manual_seed(0)
    config = lora_fx.LoraConfig(r=2, target_modules=["0"])
    return randomize(lora_fx.rewrite(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config))


def test_the_form_of_the_weight_is_that_of_the_base() -> None:
    model = layer()
    weight, base = model[0].weight, model.get_parameter("0.weight")
    assert type(base) is nn.Parameter
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device) == (base.shape, base.dtype, base.device)
    assert weight.requires_grad
    assert weight.grad_fn is not None
    assert not base.requires_grad
    with torch.no_grad():
        assert model[0].weight.requires_grad
    assert_close(weight, lora_fx.merge(model)[0].weight)
    assert_close(torch.from_numpy(weight.detach().numpy()), weight)


def test_a_detached_weight_gives_no_gradient() -> None:
    model, x = layer(), torch.randn(3, 4)
    for detached in (model[0].weight.detach(), model[0].weight.data):
        for product in (F.linear(x, detached), x @ detached.T, x @ detached.transpose(0, 1)):
            assert not product.requires_grad
        assert_close(F.linear(x, detached), F.linear(x, model[0].weight))


def test_a_weight_that_was_read_without_gradients_gives_one() -> None:
    model, x = layer(), torch.randn(3, 4)
    with torch.no_grad():
        weight = model[0].weight
        assert not F.linear(x, weight).requires_grad
    F.linear(x, weight).sum().backward()
    assert model[0].lora_B.default.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        nn.init.zeros_,
        lambda w: w.copy_(torch.zeros(4, 4)),
        lambda w: w.data.mul_(2),
        lambda w: w.data[1].zero_(),
        lambda w: w.data.__setitem__(0, 1),
        lambda w: w.data.fill_diagonal_(0),
        lambda w: nn.init.normal_(w.data[-2:]),
        lambda w: w.narrow(0, 0, 1).zero_(),
        lambda w: w.chunk(2)[1].view(-1).add_(1),
        lambda w: w.detach()[:2].T.mul_(0),
        lambda w: setattr(w, "data", torch.zeros(4, 4)),
    ],
)
def test_a_write_says_where_to_write(write: Callable[[Tensor], Any]) -> None:
    model = layer()
    with torch.no_grad(), pytest.raises(CaptureError, match=r"get_parameter\('0\.weight'\)"):
        write(model[0].weight)


def test_views_without_gradients_are_read_like_any_tensor() -> None:
    model, x = layer(), torch.randn(3, 4)
    dense = lora_fx.merge(model)[0].weight.detach()
    weight = model[0].weight.detach()
    reads: list[Callable[[Tensor], Tensor]] = [
        lambda w: w[1],
        lambda w: w[:, :2].T,
        lambda w: w.chunk(2)[1].T,
        lambda w: w.view(-1)[3:5] * 2,
        lambda w: w[1:3] @ x.T,
        lambda w: torch.cat([w[:2], w[2:]]),
        lambda w: torch.stack(list(w)),
        lambda w: torch.tensor(w[0].tolist()),
        lambda w: torch.from_numpy(np.asarray(w[0])),
    ]
    for read in reads:
        assert_close(read(weight), read(dense))
        assert read(weight[:]).shape == read(dense).shape


def test_what_is_taken_out_of_it_is_a_plain_tensor() -> None:
    weight = layer()[0].weight
    buffer = io.BytesIO()
    torch.save({"w": weight.detach()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)["w"]
    for taken in (copy.deepcopy(weight.detach()), weight.clone(), saved):
        assert type(taken) is Tensor
        assert_close(taken, weight)


@pytest.mark.parametrize(
    "read", ["data_ptr", "untyped_storage", "storage", "share_memory_", "__dlpack__"]
)
def test_it_has_no_memory_to_give(read: str) -> None:
    for weight in (layer()[0].weight, layer()[0].weight.detach()):
        with pytest.raises(CaptureError, match=r"clone\(\) computes it"):
            getattr(weight, read)()


def test_an_assignment_would_count_the_adapters_twice() -> None:
    model = layer()
    with pytest.raises(ConfigError, match=r"^0\.weight has adapters.*get_parameter\('0.weight'\)"):
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied = lora_fx.rewrite(layers, lora_fx.LoraConfig(r=2, target_modules=["0", "1"]))
    tied[1].weight = tied[0].weight  # ties it to the base's
    assert tied.get_parameter("1.weight") is tied.get_parameter("0.weight")
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    config = lora_fx.LoraConfig(r=2, target_modules=["0"])
    model = randomize(lora_fx.rewrite(nn.Sequential(conv, norm), config)).eval()
    with pytest.raises(ConfigError, match="merge"):
        torch.nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])


def test_a_call_is_given_the_weight_of_the_base() -> None:
    model, x = layer(), torch.randn(3, 4)
    with pytest.raises(CaptureError, match="given to a module that adds them"):
        torch.func.functional_call(model[0], {"weight": model[0].weight}, (x,))
    base = model.get_parameter("0.weight")
    found = torch.func.functional_call(model[0], {"weight": base}, (x,))
    assert_close(found, model[0](x))


class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) + F.linear(x, F.normalize(self.fc.weight))


def test_torch_fx_is_told_not_to_keep_it() -> None:
    model = lora_fx.rewrite(Cosine(), lora_fx.LoraConfig(r=2, target_modules=["fc"]))
    with pytest.raises(CaptureError, match=r"torch\.fx traces code"):
        torch.fx.symbolic_trace(model)
    copy.deepcopy(model)


def test_a_product_in_code_has_no_bias_of_the_layer() -> None:
    class Twice(Cosine):
        def forward(self, x):
            return self.fc(x) + x.tanh() @ self.fc.weight.T

    config = lora_fx.LoraConfig(r=2, target_modules=["fc"], lora_bias=True)
    model, x = randomize(lora_fx.rewrite(Twice(), config)), torch.randn(3, 4)
    assert model.fc.lora_bias.default.abs().sum() > 0
    assert_close(model(x), lora_fx.merge(model)(x))


def test_derivatives_of_higher_order() -> None:
    torch.manual_seed(0)
    config = lora_fx.LoraConfig(r=2, target_modules=["fc"])
    model, x = randomize(lora_fx.rewrite(Cosine().double(), config)), batch()[..., :4]
    factors = [model.fc.lora_A.default, model.fc.lora_B.default]
    base, bias = model.get_parameter("fc.weight").detach(), model.fc.bias.detach()

    def dense(x: Tensor) -> Tensor:
        weight = base + 4.0 * factors[1] @ factors[0]
        return F.linear(x, weight, bias) + F.linear(x, F.normalize(weight))

    def second(f: Callable[[Tensor], Tensor]) -> Any:
        grads = torch.autograd.grad(f(x).square().sum(), factors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), factors)

    assert_close(second(model), second(dense), 1e-10)
    names = ["fc.lora_A.default", "fc.lora_B.default"]
    tangents = [torch.randn_like(factor) for factor in factors]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(factors, tangents, strict=True)]
        found = torch.func.functional_call(model, dict(zip(names, duals, strict=True)), (x,))
        tangent = forward_ad.unpack_dual(found).tangent

    def of_factors(a: Tensor, b: Tensor) -> Tensor:
        weight = base + 4.0 * b @ a
        return F.linear(x, weight, bias) + F.linear(x, F.normalize(weight))

    _, expected = torch.func.jvp(of_factors, tuple(f.detach() for f in factors), tuple(tangents))
    assert_close(tangent, expected, 1e-10)


def test_a_tie_is_made_with_the_base() -> None:
    model, other = layer(), nn.Linear(4, 4)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ConfigError, match="get_parameter"):
            other.weight = model[0].weight
    other.weight = model.get_parameter("0.weight")
    assert other.weight is model.get_parameter("0.weight")


def test_an_optimizer_refuses_what_is_computed() -> None:
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD([layer()[0].weight], 0.1)


@pytest.mark.parametrize("way", ["copy", "pickle", "save"])
def test_copies_read_it_with_their_own_adapters(way: str) -> None:
    model, x = layer(), torch.randn(3, 4)
    if way == "copy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    before = F.linear(x, model[0].weight)
    assert_close(F.linear(x, twin[0].weight), before)
    with torch.no_grad():
        twin[0].lora_B.default.mul_(2)
    assert_close(F.linear(x, model[0].weight), before)
    assert not torch.allclose(F.linear(x, twin[0].weight), before)


def test_switching_adapters_switches_the_weight() -> None:
    model, x = layer(), torch.randn(3, 4)
    with lora_fx.disable_adapter(model):
        assert_same_bits(model[0].weight, model.get_parameter("0.weight"))
    merged = lora_fx.merge(model)
    assert type(merged[0]) is nn.Linear
    assert type(merged[0].weight) is nn.Parameter
    assert_close(F.linear(x, merged[0].weight), F.linear(x, model[0].weight))


class Own(Layer):
    def forward(self, x):
        if self.training is None:
            return x
        return self.last(x @ self.kernel.softmax(-1) + x @ self.kernel)


def own() -> nn.Module:
    torch.manual_seed(0)
    config = lora_fx.LoraConfig(seed=1, r=2, target_modules=["kernel", "last"])
    return randomize(lora_fx.rewrite(Own().double(), config))


def test_compilers_and_exports_see_the_expression() -> None:
    model, x = own(), batch()
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), expected, 1e-10)
    compiled(x).square().sum().backward()
    assert model.kernel_lora.lora_A.default.grad.abs().sum() > 0
    program = torch.export.export(model, (x,))
    assert_close(program.module()(x), expected, 1e-10)


def test_transforms_of_torch_func() -> None:
    model, x = own(), batch()
    values = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    found = torch.func.grad(loss)(values)
    expected = torch.autograd.grad(model(x).square().sum(), list(values.values()))
    assert_close(list(found.values()), list(expected), 1e-10)


def test_gradient_checkpoints_and_autocast() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = own(), batch().requires_grad_()
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert_close(*grads, 1e-10)
    half = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert half(x.float()).dtype is torch.bfloat16
