"""How a weight is applied: every spelling of a product, and the layers."""

from __future__ import annotations

import dataclasses

from tests.fuzz.source import Scope

__all__ = ["ELEMENTWISE", "LAYERS", "PRODUCTS", "add_elementwise", "add_layer", "add_product"]


@dataclasses.dataclass(frozen=True)
class Spelling:
    """One way of writing a product with a parameter.

    Attributes:
        shape: Shape of the parameter, over D, the width of x, and E, that of the result.
        text: Statements over ``{w}``, another parameter ``{w2}`` of that shape, and ``{v}``, a vector.
        same: Whether E has to be D.
        low: Whether it computes in fp32.
        grad: Whether it can be differentiated.
    """

    shape: str
    text: str
    same: bool = False
    low: bool = False
    grad: bool = True


_IN_OUT, _OUT_IN = "D, E", "E, D"

PRODUCTS = {
    "x @ w": Spelling(_IN_OUT, "x = x @ {w}"),
    "F.linear": Spelling(_OUT_IN, "x = F.linear(x, {w})"),
    "F.linear with a bias": Spelling(_OUT_IN, "x = F.linear(x, {w}, {v})"),
    "F.linear by keyword": Spelling(_OUT_IN, "x = F.linear(bias={v}, weight={w}, input=x)"),
    "matmul": Spelling(_IN_OUT, "x = torch.matmul(x, {w})"),
    "matmul by keyword": Spelling(_IN_OUT, "x = torch.matmul(input=x, other={w})"),
    "operator.matmul": Spelling(_IN_OUT, "x = operator.matmul(x, {w})"),
    "in place @": Spelling(_IN_OUT, "x @= {w}"),
    "x @ w.T": Spelling(_OUT_IN, "x = x @ {w}.T"),
    "x @ w.mT": Spelling(_OUT_IN, "x = x @ {w}.mT"),
    "x.matmul(w.t())": Spelling(_OUT_IN, "x = x.matmul({w}.t())"),
    "transpose": Spelling(_OUT_IN, "x = x @ {w}.transpose(-1, 0)"),
    "swapaxes": Spelling(_OUT_IN, "x = x @ {w}.swapaxes(0, 1)"),
    "permute": Spelling(_OUT_IN, "x = x @ {w}.permute(1, 0)"),
    "permute by keyword": Spelling(_OUT_IN, "x = x @ {w}.permute(dims=(1, 0))"),
    "movedim": Spelling(_OUT_IN, "x = x @ torch.movedim({w}, 0, 1)"),
    "einsum": Spelling(_IN_OUT, 'x = torch.einsum("bti,io->bto", x, {w})'),
    "einsum with spaces": Spelling(_OUT_IN, 'x = torch.einsum("b t i, o i -> b t o", x, {w})'),
    "einsum with an ellipsis": Spelling(_OUT_IN, 'x = torch.einsum("...i,oi->...o", x, {w})'),
    "einsum, weight first": Spelling(_OUT_IN, 'x = torch.einsum("oi,bti->bto", {w}, x)'),
    "einsum, implicit": Spelling(_IN_OUT, 'x = torch.einsum("bti,io", x, {w}).mT'),
    "einsum of a list": Spelling(_IN_OUT, 'x = torch.einsum("bti,io->bto", [x, {w}])'),
    "einsum to heads": Spelling(
        "2, E // 2, D", 'x = torch.einsum("bti,hdi->bthd", x, {w}).flatten(2)'
    ),
    "einsum to heads first": Spelling(
        "D, 2, E // 2", 'x = torch.einsum("bsd,dhe->bhse", x, {w}).transpose(1, 2).flatten(2)'
    ),
    "einsum from heads": Spelling(
        "2, D // 2, E",
        'x = torch.einsum("bthd,hdo->bto", x.unflatten(-1, (2, -1)), {w})',
    ),
    "einsum of experts": Spelling("2, D, E", 'x = torch.einsum("bti,bio->bto", x, {w})'),
    "tensordot": Spelling(_IN_OUT, "x = torch.tensordot(x, {w}, dims=1)"),
    "inner": Spelling(_OUT_IN, "x = torch.inner(x, {w})"),
    "mm": Spelling(_IN_OUT, "x = x.flatten(0, 1).mm({w}).unflatten(0, (2, 3))"),
    "addmm": Spelling(_IN_OUT, "x = torch.addmm({v}, x.flatten(0, 1), {w}).view(2, 3, -1)"),
    "addmm with factors": Spelling(
        _IN_OUT, "x = torch.addmm({v}, x.flatten(0, 1), {w}, beta=0.5, alpha=2).view(2, 3, -1)"
    ),
    "addmm as a method": Spelling(_IN_OUT, "x = {v}.addmm(x.flatten(0, 1), {w}).view(2, 3, -1)"),
    "bmm": Spelling("2, D, E", "x = torch.bmm(x, {w})"),
    "bmm, weight left": Spelling("2, E, D", "x = torch.bmm({w}, x.mT).mT"),
    "baddbmm": Spelling("2, D, E", "x = torch.baddbmm({v}, x, {w})"),
    "baddbmm with factors": Spelling(
        "2, D, E", "x = torch.baddbmm({v}, x, {w}, beta=0.5, alpha=2.0)"
    ),
    "addbmm": Spelling("2, D, E", "x = torch.addbmm({v}, x, {w}).expand(2, -1, -1)"),
    "matmul of experts": Spelling("2, D, E", "x = x @ {w}"),
    "experts side by side": Spelling("4, D, E", "x = (x.unsqueeze(1) @ {w}).mean(1)"),
    "one expert": Spelling("3, E, D", "x = F.linear(x, {w}[1])"),
    "the last expert": Spelling("3, D, E", "x = x @ {w}[-1]"),
    "a loop over experts": Spelling("2, E, D", "x = sum(F.linear(x, one) for one in {w})"),
    "unbind": Spelling("2, E, D", "x = F.linear(x, {w}.unbind(0)[1])"),
    "weight left": Spelling(_OUT_IN, "x = ({w} @ x.mT).mT"),
    "weight left, transposed": Spelling(_IN_OUT, "x = torch.matmul({w}.T, x.mT).mT"),
    "mv": Spelling(_IN_OUT, "x = x + torch.mv({w}, x[0, 0])", same=True),
    "mv as a method": Spelling(_IN_OUT, "x = x + {w}.mv(x[0, 1])", same=True),
    "addmv": Spelling(_IN_OUT, "x = x + torch.addmv({v}, {w}, x[0, 0])", same=True),
    "vector @ w": Spelling(_IN_OUT, "x = x + x[1, 2] @ {w}", same=True),
    "vector @ experts": Spelling("3, D, D", "x = x + torch.matmul(x[0, 0], {w})", same=True),
    "experts @ vector": Spelling("3, D, D", "x = x + torch.matmul({w}, x[0, 0])", same=True),
    "some rows": Spelling("E + 2, D", "x = F.linear(x, {w}[:-2])"),
    "rows in two products": Spelling(
        "2 * E, D", "x = F.linear(x, {w}[:{E}]) + F.linear(x.tanh(), {w}[{E}:])"
    ),
    "some columns": Spelling("D, E + 2", "x = x @ {w}[:, 2:]"),
    "some inputs": Spelling("E, D + 2", "x = F.linear(x, {w}[:, :-2])"),
    "every other row": Spelling("2 * E, D", "x = F.linear(x, {w}[::2])"),
    "chunk": Spelling(
        "2 * E, D", "a, b = {w}.chunk(2)\nx = F.linear(x, a) * F.linear(x, b).sigmoid()"
    ),
    "split": Spelling(
        "2 * E, D", "a, b = torch.split({w}, [{E}, {E}])\nx = F.linear(x, b) - F.linear(x, a)"
    ),
    "narrow": Spelling("E + 1, D", "x = F.linear(x, {w}.narrow(0, 1, {E}))"),
    "view of a vector": Spelling("E * D,", "x = F.linear(x, {w}.view({E}, {D}))"),
    "view of heads": Spelling("2, E // 2, D", "x = F.linear(x, {w}.view(-1, {D}))"),
    "reshape, transposed": Spelling("2, E // 2, D", "x = x @ {w}.reshape({E}, {D}).T"),
    "flatten": Spelling("E, D, 1", "x = F.linear(x, {w}.flatten(1))"),
    "squeeze": Spelling("E, D, 1", "x = F.linear(x, {w}.squeeze(-1))"),
    "contiguous": Spelling(_OUT_IN, "x = F.linear(x, {w}.contiguous())"),
    "clone": Spelling(_OUT_IN, "x = F.linear(x, {w}.clone())"),
    "expand": Spelling("1, D, E", "x = torch.bmm(x, {w}.expand(2, -1, -1))"),
    "cast": Spelling(_IN_OUT, "x = x @ {w}.to(x.dtype)"),
    "type_as": Spelling(_IN_OUT, "x = x @ {w}.type_as(x)"),
    "float": Spelling(_IN_OUT, "x = (x.float() @ {w}.float()).to(x.dtype)", low=True),
    "detach": Spelling(_IN_OUT, "x = x @ {w}.detach()"),
    "data": Spelling(_IN_OUT, "x = x @ {w}.data"),
    "flip": Spelling(_IN_OUT, "x = x @ {w}.flip(0)"),
    "scaled weight": Spelling(_IN_OUT, "x = x @ ({w} * 0.5)"),
    "masked weight": Spelling(_IN_OUT, "x = x @ {w}.tril()"),
    "sum of weights": Spelling(_IN_OUT, "x = x @ ({w} + {w2})"),
    "product of weights": Spelling("D, D", "x = x @ ({w} @ {w2})", same=True),
    "stacked weights": Spelling("E // 2, D", "x = F.linear(x, torch.cat([{w}, {w2}]))"),
    "gated weight": Spelling(_IN_OUT, "x = x @ (torch.softmax({w}, -1) + {w})"),
    "multi_dot": Spelling(
        "D, D", "x = torch.linalg.multi_dot([x.flatten(0, 1), {w}, {w2}]).view(2, 3, -1)", same=True
    ),
    "multiply and sum": Spelling(_IN_OUT, "x = (x.unsqueeze(-1) * {w}).sum(-2)"),
    "F.bilinear": Spelling("E, D, D", "x = F.bilinear(x, x.tanh(), {w})"),
    "F.conv1d": Spelling("E, D, 3", "x = F.conv1d(x.mT, {w}, padding=1).mT"),
    "F.conv1d grouped": Spelling("E, D // 2, 1", "x = F.conv1d(x.mT, {w}, {v}, groups=2).mT"),
    "F.conv_transpose1d": Spelling("D, E, 3", "x = F.conv_transpose1d(x.mT, {w}, padding=1).mT"),
    "F.conv2d": Spelling(
        "E, D, 1, 3", "x = F.conv2d(x.mT.unsqueeze(2), {w}, padding=(0, 1)).squeeze(2).mT"
    ),
    "F.embedding": Spelling("9, D", "x = x + F.embedding(torch.tensor([0, 3, 3]), {w})", same=True),
    "indexed": Spelling("9, D", "x = x + {w}[torch.tensor([1, 1, 4])]", same=True),
    "out": Spelling(
        _IN_OUT,
        "y = torch.empty(2, 3, {E}, dtype=x.dtype)\ntorch.matmul(x, {w}, out=y)\nx = y",
        grad=False,
    ),
    "a weight twice": Spelling(_IN_OUT, "x = x @ {w} + (x * 2).sin() @ {w}"),
    "a weight forward and back": Spelling(_OUT_IN, "x = F.linear(x, {w}).tanh() @ {w}", same=True),
    "two weights in a row": Spelling("D, D", "x = x @ {w} @ {w2}", same=True),
    "F.linear of F.linear": Spelling("D, D", "x = F.linear(F.linear(x, {w}), {w2})", same=True),
    "two weights side by side": Spelling(_IN_OUT, "x = x @ {w} + x @ {w2}"),
    "gate": Spelling(_OUT_IN, "x = F.silu(F.linear(x, {w})) * F.linear(x, {w2})"),
    "self attention": Spelling(
        "D, D",
        "y = torch.softmax(x @ {w} @ x.mT, -1)\nx = y @ (x @ {w2})",
        same=True,
    ),
    "fused attention": Spelling(
        "3 * D, D",
        "q, k, v = F.linear(x, {w}).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)\n"
        "x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)",
        same=True,
    ),
}
"""The statements of each spelling. All of them take x of [2, 3, D] to [2, 3, E]."""


def add_product(s: Scope) -> None:
    """A product with a parameter of the module's own."""
    name = s.choices.feature("product", list(PRODUCTS))
    spelling = PRODUCTS[name]
    d = s.width
    e = d if spelling.same else s.choices.pick([d, 4, 6, 8])
    shape = [int(size) for size in _sizes(spelling.shape, d, e)]
    values: dict[str, object] = {"D": d, "E": e, "w": s.parameter(*shape)}
    if "{w2}" in spelling.text:
        values["w2"] = s.parameter(*shape)
    if "{v}" in spelling.text:
        values["v"] = s.parameter(e, stem="v")
    s.source.low |= spelling.low
    s.source.grad &= spelling.grad
    s.width = e
    s.add(*spelling.text.format(**values).splitlines(), owned="+" not in spelling.text)


def _sizes(shape: str, d: int, e: int) -> list[int]:
    result: list[int] = []
    for size in shape.split(","):
        if size.strip():
            value = eval(size, {"D": d, "E": e})
            result.append(int(value))
    return result


LAYERS = {
    "Linear": ("nn.Linear({D}, {E})", "x = {m}(x)"),
    "Linear without bias": ("nn.Linear({D}, {E}, bias=False)", "x = {m}(x)"),
    "Linear by keyword": ("nn.Linear({D}, {E})", "x = {m}(input=x)"),
    "Linear on a matrix": ("nn.Linear({D}, {E})", "x = {m}(x.flatten(0, 1)).view(2, 3, -1)"),
    "Linear on a vector": ("nn.Linear({D}, {D})", "x = x + {m}(x[0, 0])"),
    "Linear on images": ("nn.Linear({D}, {E})", "x = {m}(x.unsqueeze(1)).squeeze(1)"),
    "Conv1d": ("nn.Conv1d({D}, {E}, 3, padding=1)", "x = {m}(x.mT).mT"),
    "Conv1d grouped": ("nn.Conv1d({D}, {E}, 1, groups=2)", "x = {m}(x.mT).mT"),
    "Conv1d without a batch": ("nn.Conv1d({D}, {D}, 1)", "x = x + {m}(x[0].mT).mT"),
    "Conv1d padded round": (
        'nn.Conv1d({D}, {E}, 3, padding=1, padding_mode="circular")',
        "x = {m}(x.mT).mT",
    ),
    "Conv2d": (
        "nn.Conv2d({D}, {E}, (1, 3), padding=(0, 1))",
        "x = {m}(x.mT.unsqueeze(2)).squeeze(2).mT",
    ),
    "Conv2d grouped": (
        "nn.Conv2d({D}, {E}, 1, groups=2)",
        "x = {m}(x.mT.unsqueeze(2)).squeeze(2).mT",
    ),
    "Conv2d depthwise": (
        "nn.Conv2d({D}, {D}, 1, groups={D})",
        "x = {m}(x.mT.unsqueeze(2)).squeeze(2).mT",
    ),
    "ConvTranspose1d": ("nn.ConvTranspose1d({D}, {E}, 3, padding=1)", "x = {m}(x.mT).mT"),
    "ConvTranspose1d grouped": ("nn.ConvTranspose1d({D}, {E}, 1, groups=2)", "x = {m}(x.mT).mT"),
    "ConvTranspose1d to a size": (
        "nn.ConvTranspose1d({D}, {E}, 3, padding=1)",
        "x = {m}(x.mT, output_size=(3,)).mT",
    ),
    "Embedding": ("nn.Embedding(7, {D})", "x = x + {m}(torch.tensor([2, 0, 2]))"),
    "Embedding with padding": (
        "nn.Embedding(7, {D}, padding_idx=2)",
        "x = x + {m}(torch.tensor([2, 0, 2]))",
    ),
    "Embedding of positions": ("nn.Embedding(7, {D})", "x = x + {m}(torch.arange(x.shape[1]))"),
    "EmbeddingBag": ("nn.EmbeddingBag(7, {D})", "x = x + {m}(torch.tensor([[2, 0, 2]]))"),
    "Bilinear": ("nn.Bilinear({D}, {D}, {E})", "x = {m}(x, x.tanh())"),
    "MultiheadAttention": (
        "nn.MultiheadAttention({D}, 2, batch_first=True)",
        "x, _ = {m}(x, x, x)",
    ),
    "MultiheadAttention, sequence first": (
        "nn.MultiheadAttention({D}, 2)",
        "x = {m}(x, x, x, need_weights=False)[0]",
    ),
    "TransformerEncoderLayer": (
        "nn.TransformerEncoderLayer({D}, 2, 8, 0.0, batch_first=True)",
        "x = {m}(x)",
    ),
    "LSTM": ("nn.LSTM({D}, {E}, batch_first=True)", "x, _ = {m}(x)"),
    "GRUCell": ("nn.GRUCell({D}, {E})", "x = {m}(x.flatten(0, 1)).view(2, 3, -1)"),
    "Sequential": (
        "nn.Sequential(nn.Linear({D}, {D}), nn.GELU(), nn.Linear({D}, {E}))",
        "x = {m}(x)",
    ),
    "Sequential of Linears": (
        "nn.Sequential(nn.Linear({D}, {D}), nn.Linear({D}, {E}))",
        "x = {m}(x)",
    ),
    "Sequential, sliced": (
        "nn.Sequential(nn.Linear({D}, {E}), nn.Tanh(), nn.Linear(1, 1))",
        "x = {m}[:-1](x)",
    ),
    "Sequential, indexed": ("nn.Sequential(nn.Linear({D}, {E}), nn.Tanh())", "x = {m}[0](x)"),
    "ModuleList": (
        "nn.ModuleList([nn.Linear({D}, {D}) for _ in range(2)])",
        "for layer in {m}:\n    x = layer(x)",
    ),
    "ModuleList, counted": (
        "nn.ModuleList([nn.Linear({D}, {D}) for _ in range(2)])",
        "for i, layer in enumerate({m}):\n    x = layer(x) * (i + 1)",
    ),
    "ModuleList, backwards": (
        "nn.ModuleList([nn.Linear({D}, {D}) for _ in range(2)])",
        "for layer in reversed({m}):\n    x = layer(x).tanh()",
    ),
    "ModuleDict": ('nn.ModuleDict({{"a": nn.Linear({D}, {E})}})', 'x = {m}["a"](x)'),
    "ModuleDict, items": (
        'nn.ModuleDict({{"a": nn.Linear({D}, {D}), "b": nn.Tanh()}})',
        "for key, layer in {m}.items():\n    x = layer(x)",
    ),
    "ParameterList": (
        "nn.ParameterList([torch.randn({D}, {D}) * 0.4 for _ in range(2)])",
        "for w in {m}:\n    x = torch.tanh(x @ w)",
    ),
    "ParameterDict": (
        'nn.ParameterDict({{"a": nn.Parameter(torch.randn({D}, {E}) * 0.4)}})',
        'x = x @ {m}["a"]',
    ),
    "weight_norm": (
        "torch.nn.utils.parametrizations.weight_norm(nn.Linear({D}, {E}))",
        "x = {m}(x)",
    ),
    "old weight_norm": ("torch.nn.utils.weight_norm(nn.Linear({D}, {E}))", "x = {m}(x)"),
    "checkpoint": ("nn.Linear({D}, {E})", "x = checkpoint({m}, x, use_reentrant=False)"),
    "vmap": ("nn.Linear({D}, {E})", "x = torch.vmap({m})(x)"),
    "jvp": ("nn.Linear({D}, {E})", "x = sum(torch.func.jvp({m}, (x,), (x.cos(),)))"),
    "func.grad": (
        "nn.Linear({D}, {D})",
        "x = torch.func.grad(lambda t: {m}(t).tanh().square().sum())(x)",
    ),
    "autograd.grad": (
        "nn.Linear({D}, {D})",
        (
            "with torch.enable_grad():\n    y = x if x.requires_grad else x.clone().requires_grad_()\n"
            "    x = torch.autograd.grad({m}(y).tanh().sum(), y, create_graph=True)[0]"
        ),
    ),
}


def add_layer(s: Scope) -> None:
    """A layer of PyTorch, or several in a container."""
    name = s.choices.feature("layer", list(LAYERS))
    build, text = LAYERS[name]
    keeps = "{E}" not in build
    d = s.width
    e = d if keeps else s.choices.pick([d, 4, 6, 8])
    module = s.layer(build.format(D=d, E=e), "layer", d, e, calls=text == "x = {m}(x)")
    if name.startswith("Linear"):
        s.linears.append((module, d, e))
    s.width = e
    plain = text == "x = {m}(x)" and build.startswith("nn.Linear")
    s.add(*text.format(m=module).splitlines(), owned=plain)


ELEMENTWISE = {
    "gelu": ("", "x = F.gelu(x)"),
    "relu": ("", "x = torch.relu(x)"),
    "Tanh": ("nn.Tanh()", "x = {m}(x)"),
    "sigmoid": ("", "x = x.sigmoid() * x"),
    "LayerNorm": ("nn.LayerNorm({D})", "x = {m}(x)"),
    # By default its eps is that of the dtype: the oracle, in fp64, would have another.
    "RMSNorm": ("nn.RMSNorm({D}, eps=1e-6)", "x = {m}(x)"),
    "BatchNorm1d": ("nn.BatchNorm1d({D})", "x = {m}(x.mT).mT"),
    "GroupNorm": ("nn.GroupNorm(2, {D})", "x = {m}(x.mT).mT"),
    "Dropout": ("nn.Dropout(0.5)", "x = {m}(x)"),
    "F.dropout": ("", "x = F.dropout(x, 0.5, self.training)"),
    "residual": ("", "r = x\nx = torch.sin(x)\nx = x + r"),
    "constant": ("", "x = x * 2 + torch.ones({D}, dtype=x.dtype)"),
    "mean": ("", "x = x - x.mean(-1, keepdim=True)"),
    "cat": ("", "x = torch.cat([x, x.cos()], 1)[:, ::2]"),
    "mask": ("", "x = x.masked_fill(x > 1.5, 0.0)"),
    "size": ("", "x = x / x.shape[-1] * x.size(1)"),
    "unpacked shape": ("", "b, t, d = x.shape\nx = x.reshape(b * t, d).view(b, t, d)"),
    "len": ("", "x = x * len(x)"),
    "iteration": ("", "x = torch.stack([row * 2 for row in x])"),
    "dim": ("", "x = x if x.dim() == 3 else x * 100"),
    "dtype": ("", "x = x if x.dtype == torch.int64 else x + 1"),
    "device": ("", "x = x + torch.zeros((), device=x.device, dtype=x.dtype)"),
    "is_floating_point": ("", "x = x * 2 if x.is_floating_point() else x"),
    "new tensor": ("", "x = x + x.new_ones({D})"),
    "requires_grad": ("", "x = x * 2 if x.requires_grad else x"),
    "grad mode": ("", "x = x * 2 if torch.is_grad_enabled() else x"),
    "no_grad": ("", "with torch.no_grad():\n    y = x.mean()\nx = x - y"),
    "a tensor's truth": ("", "x = x * 2 if bool((x > 100).any()) else x"),
    "item": ("", "x = x * x.detach().abs().max().clamp(1, 1).item()"),
    "buffer": ("nn.Buffer(torch.ones({D}) * 2)", "x = x * {m}"),
    "is_leaf": ("", "x = x * 2 if x.is_leaf else x"),
    "inference mode": ("", "x = x * 2 if torch.is_inference_mode_enabled() else x"),
    "default dtype": ("", "x = x * 2 if torch.get_default_dtype() is torch.float32 else x"),
    "autograd function": ("", "x = Turned.apply(x)"),
    "sparse buffer": ("Edges()", "x = {m}(x)"),
}

_EDGES = """
class Edges(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("edges", torch.ones(3, 3).tril().to_sparse())

    def forward(self, x):
        return torch.stack([torch.sparse.mm(self.edges.to(x.dtype), one) for one in x])
"""

_TURNED = """
class Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * -3
"""


def add_elementwise(s: Scope) -> None:
    """What is no product: norms, activations, questions about x."""
    build, text = ELEMENTWISE[s.choices.feature("elementwise", list(ELEMENTWISE))]
    values: dict[str, object] = {"D": s.width}
    if "Turned" in text:
        s.source.before(_TURNED)
    if "Edges" in build:
        s.source.before(_EDGES)
    if build:
        values["m"] = s.layer(build.format(D=s.width), "part", s.width, s.width, calls=False)
    s.add(*text.format(**values).splitlines())
