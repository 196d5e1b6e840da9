"""Code other than a layer's own forward that reads the layer's weight, or calls it in a roundabout way."""

from __future__ import annotations

from tests.fuzz.source import Scope

__all__ = [
    "CALLERS",
    "HOOKS",
    "READERS",
    "WRITES",
    "add_caller",
    "add_hook",
    "add_reader",
    "add_write",
]

READERS = {
    "the parent": "x = F.linear(x, {m}.weight)",
    "the parent, with the bias": "x = F.linear(x, {m}.weight, {m}.bias)",
    "the parent, transposed": "x = x @ {m}.weight.T",
    "the parent, a norm": "x = x + x * {m}.weight.norm()",
    "the parent, a penalty": "x = x + {m}.weight.sum()",
    "the parent, back": "x = {m}(x).tanh() @ {m}.weight",
    "a function": "x = product(x, {m}.weight)",
    "a function of the layer": "x = applied({m}, x)",
    "getattr": 'x = F.linear(x, getattr({m}, "weight"))',
    "getattr of the layer": 'x = F.linear(x, getattr(self, "{name}").weight)',
    "get_submodule": 'x = F.linear(x, self.get_submodule("{name}").weight)',
    "get_parameter": 'x = F.linear(x, self.get_parameter("{name}.weight"))',
    "_parameters": 'x = F.linear(x, {m}._parameters["weight"])',
    "__dict__": 'x = F.linear(x, self.__dict__["_modules"]["{name}"].weight)',
    "a property": "x = F.linear(x, self.{p})",
    "a method": "x = self.{p}(x)",
    "state_dict": 'x = F.linear(x, self.state_dict()["{name}.weight"])',
    "named_parameters": 'x = F.linear(x, dict(self.named_parameters())["{name}.weight"])',
    "parameters": "x = F.linear(x, next({m}.parameters()))",
    "parameters of self": "x = x * sum(p.sum() for p in self.parameters())",
    "count of parameters": "x = x * (1 + len(list(self.parameters())) / 100)",
    "children": "x = F.linear(x, [c for c in self.children() if c is {m}][0].weight)",
    "modules": "x = x * (1 + len(list(self.modules())) / 100)",
    "class of a layer": "x = {m}(x) * (2 if type({m}) is nn.Linear else 3)",
    "class of a layer, among others": "x = {m}(x) * (2 if {m}.__class__ in (nn.Linear, nn.Conv1d) else 3)",
    "class of a layer, looked up": "x = {m}(x) * {{nn.Linear: 2.0}}.get(type({m}), 3.0)",
    "class of two layers": "x = {m}(x) * (2 if type({m}) is type(nn.Linear(1, 1)) else 3)",
    "forward of the class": "x = nn.Linear.forward({m}, x)",
    "forward": "x = {m}.forward(x)",
    "functional_call": "x = torch.func.functional_call({m}, dict({m}.named_parameters()), (x,))",
    "functional_call, other weights": (
        'x = torch.func.functional_call({m}, {{"weight": {m}.weight * 2}}, (x,))'
    ),
    "deepcopy of the weight": "x = F.linear(x, {m}.weight.detach().clone())",
    "data": "x = F.linear(x, {m}.weight.data)",
    "einsum": 'x = torch.einsum("bti,oi->bto", x, {m}.weight)',
    "multiply and sum": "x = (x.unsqueeze(-2) * {m}.weight).sum(-1)",
    "rows": "x = torch.cat([F.linear(x, {m}.weight[:2]), F.linear(x, {m}.weight[2:])], -1)",
    "a partial": "x = self.part_{name}(x)",
    "a closure over the weight": "x = self.close_{name}(x)",
    "a list of weights": "x = F.linear(x, self.list_{name}[0])",
}

CALLERS = {
    "a lambda": ("self.{n} = lambda x: {m}(x)", "x = self.{n}(x)"),
    "a lambda with a default": ("self.{n} = lambda x, f={m}: f(x)", "x = self.{n}(x)"),
    "a dict of lambdas": ('self.{n} = {{"a": lambda x: {m}(x)}}', 'x = self.{n}["a"](x)'),
    "a dict of layers": ('self.{n} = {{"a": {m}}}', 'x = self.{n}["a"](x)'),
    "a list of layers": ("self.{n} = [{m}]", "for one in self.{n}:\n    x = one(x)"),
    "a tuple of layers": ("self.{n} = ({m}, torch.tanh)", "for one in self.{n}:\n    x = one(x)"),
    "another name": ("self.{n} = {m}", "x = self.{n}(x)"),
    "a partial": ("self.{n} = functools.partial({m})", "x = self.{n}(x)"),
    "a bound method": ("self.{n} = {m}.forward", "x = self.{n}(x)"),
    "an object": ("self.{n} = Holder({m})", "x = self.{n}.one(x)"),
    "an object that calls": ("self.{n} = Holder({m})", "x = self.{n}.apply(x)"),
    "a registry": ("self.{n} = register({m})", "x = REGISTRY[self.{n}](x)"),
    "a child that is handed it": ("self.{n} = Handed({m})", "x = self.{n}(x)"),
    "a child that reads it": ("self.{n} = Reads({m})", "x = self.{n}(x)"),
    "a child that hides it": ("self.{n} = Hides({m})", "x = self.{n}(x)"),
    "a wrapper": ("self.{n} = Delegates({m})", "x = self.{n}(x) * self.{n}.in_features"),
    "a wrapper that reads it": ("self.{n} = Delegates({m})", "x = F.linear(x, self.{n}.weight)"),
    "compose": ("self.{n} = compose({m}, torch.tanh)", "x = self.{n}(x)"),
    "map": ("self.{n} = [{m}]", "x = next(iter(map(lambda f: f(x), self.{n})))"),
    "reduce": ("self.{n} = [{m}, {m}]", "x = functools.reduce(lambda t, f: f(t), self.{n}, x)"),
    "a tie": ("self.{n} = nn.Linear({D}, {D})\nself.{n}.weight = {m}.weight", "x = self.{n}(x)"),
    "a tie of a parameter": ("self.{n} = {m}.weight", "x = F.linear({m}(x).tanh(), self.{n})"),
    "a view": (
        "self.{n} = nn.Linear({D}, {D})\nself.{n}.weight.data = {m}.weight.data",
        "x = self.{n}(x)",
    ),
    "a tied embedding": (
        "self.{n} = nn.Embedding({D}, {D})\nself.{n}.weight = {m}.weight",
        "x = x + self.{n}(torch.tensor([1, 0, 1]))",
    ),
}
"""What ``__init__`` and ``forward`` say; the layer itself is called before."""

_BEFORE = {
    "product(": "def product(x, weight):\n    return F.linear(x, weight)",
    "applied(": "def applied(layer, x):\n    return F.linear(x, layer.weight, layer.bias)",
    "Holder(": (
        "class Holder:\n    def __init__(self, one):\n        self.one = one\n\n"
        "    def apply(self, x):\n        return F.linear(x, self.one.weight)"
    ),
    "REGISTRY": (
        "REGISTRY = []\n\n\ndef register(layer):\n    REGISTRY.append(layer)\n"
        "    return len(REGISTRY) - 1"
    ),
    "Handed(": (
        "class Handed(nn.Module):\n    def __init__(self, one):\n        super().__init__()\n"
        "        self.one = one\n\n    def forward(self, x):\n        return self.one(x)"
    ),
    "Reads(": (
        "class Reads(nn.Module):\n    def __init__(self, one):\n        super().__init__()\n"
        "        self.one = one\n\n    def forward(self, x):\n        return x @ self.one.weight.T"
    ),
    "Hides(": (
        "class Hides(nn.Module):\n    def __init__(self, one):\n        super().__init__()\n"
        "        self.hidden = [one]\n\n    def forward(self, x):\n"
        "        return F.linear(x, self.hidden[0].weight)"
    ),
    "Delegates(": (
        "class Delegates(nn.Module):\n    def __init__(self, one):\n        super().__init__()\n"
        "        self.one = one\n\n    def __getattr__(self, name):\n        try:\n"
        "            return super().__getattr__(name)\n        except AttributeError:\n"
        '            return getattr(super().__getattr__("one"), name)\n\n'
        "    def forward(self, x):\n        return self.one(x)"
    ),
    "compose(": "def compose(f, g):\n    def both(x):\n        return g(f(x))\n    return both",
    "Doubled(": (
        "class Doubled(nn.Linear):\n    def forward(self, input):\n"
        "        return super().forward(input) * 2"
    ),
}


# No forward of transformers, timm, torchvision and diffusers reads a weight so (of 8,776 in 958 files).
_PAST = frozenset(
    {
        *(
            "get_parameter",
            "_parameters",
            "__dict__",
            "state_dict",
            "named_parameters",
            "parameters",
        ),
        *("a partial", "a closure over the weight", "a list of weights"),
    }
)
"""Readers that look past the attribute of the layer."""


def add_reader(s: Scope) -> None:
    """A read of a weight from outside its layer."""
    c = s.choices
    name = c.feature(
        "reader", [name for name in READERS for _ in range(1 if name in _PAST else 20)]
    )
    text = READERS[name]
    module = s.linear()
    called = c.pick([True, False])
    values = {"m": module, "name": module.removeprefix("self."), "p": s.fresh("kernel")}
    if name == "a property":
        s.member("@property\ndef {p}(self):\n    return {m}.weight".format(**values))
    if name == "a method":
        s.member("def {p}(self, x):\n    return F.linear(x, {m}.weight)".format(**values))
    if name == "a partial":
        s.init.append(
            "self.part_{name} = functools.partial(F.linear, weight={m}.weight)".format(**values)
        )
    if name == "a closure over the weight":
        s.init.append("self.close_{name} = lambda x, w={m}.weight: F.linear(x, w)".format(**values))
    if name == "a list of weights":
        s.init.append("self.list_{name} = [{m}.weight]".format(**values))
    _declare(s, text)
    if called:
        s.add(f"x = {module}(x)")
    s.add(*text.format(**values).splitlines())


def add_caller(s: Scope) -> None:
    """A layer that is kept or called in a roundabout way."""
    c = s.choices
    init, text = CALLERS[c.feature("caller", list(CALLERS))]
    values = {"m": s.linear(), "n": s.fresh("other"), "D": s.width}
    _declare(s, init + text)
    if c.pick([True, False]):
        s.add(f"x = {values['m']}(x)")
    s.init += init.format(**values).splitlines()
    s.add(*text.format(**values).splitlines())


def _declare(s: Scope, text: str) -> None:
    for name, source in _BEFORE.items():
        if name in text:
            s.source.before(source)


HOOKS = {
    "scales the output": "register_forward_hook(lambda module, args, out: out * 2)",
    "changes the input": "register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))",
    "with keywords": (
        "register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)"
    ),
    "reads the weight": (
        "register_forward_hook(lambda module, args, out: out + F.linear(args[0], module.weight))"
    ),
    "reads the weight before": (
        "register_forward_pre_hook(lambda module, args: (args[0] @ module.weight.T,))"
    ),
    "records": "register_forward_hook(SEEN.hook)",
    "gradients": "register_full_backward_hook(lambda module, grad, out: None)",
}


def add_hook(s: Scope) -> None:
    """A hook on a layer, on the block or on the model; from the start or later."""
    c = s.choices
    hook = HOOKS[c.feature("hook", list(HOOKS))]
    s.source.before(
        "class Seen:\n    count = 0\n\n    def hook(self, module, args, out):\n"
        "        self.count += 1\n\n\nSEEN = Seen()"
    )
    module = s.linear()
    s.add(f"x = {module}(x)")
    where = c.pick(["layer", "class"]) if "weight" not in hook else "layer"
    late = c.has("change/a hook", 3)
    target = module.removeprefix("self.") if where == "layer" else ""
    path = ".".join(part for part in (s.path[:-1], target) if part)
    owner = f'm.get_submodule("{path}")' if path else "m"
    (s.source.changes if late else s.source.setup).append(f"{owner}.{hook}")


WRITES = {
    "+=": "r = x\nx = {m}(x)\nx += r",
    "-= of itself": "x = {m}(x)\nx -= x.mean()",
    "*= a number": "x = {m}(x)\nx *= 2",
    "add_": "r = x\nx = {m}(x).add_(r)",
    "add_ with a factor": "x = {m}(x)\nx.add_(1.0, alpha=2)",
    "relu_": "x = {m}(x).relu_()",
    "F.relu in place": "x = F.relu({m}(x), inplace=True)",
    "ReLU in place": "x = self.{n}({m}(x))",
    "mul_ then used": "y = {m}(x)\nz = y * 1\ny.mul_(3)\nx = y + z",
    "a slice": "x = {m}(x)\nx[..., 0] = 0.5",
    "a slice of another": "y = x * 1\ny[:, 0] = {m}(x)[:, 1]\nx = y",
    "augmented slice": "x = {m}(x)\nx[:, 1:] += 1.0",
    "a view": "x = {m}(x)\ny = x.view(-1)\ny.mul_(2)",
    "a chunk": "x = {m}(x)\na, b = x.chunk(2, -1)\na = a * 1\nx = torch.cat([a, b], -1)",
    "index_put": "x = {m}(x)\nx[torch.tensor([0])] = 1.5",
    "masked_fill_": "x = {m}(x)\nx.masked_fill_(torch.eye(3, {D}, dtype=torch.bool), 0.25)",
    "copy_": "y = torch.zeros(2, 3, {D}, dtype=x.dtype)\ny.copy_({m}(x))\nx = y",
    "zero_ of a copy": "x = {m}(x)\ny = x.clone()\ny.zero_()\nx = x + y",
    "index_add_": (
        "y = torch.zeros(2, 3, {D}, dtype=x.dtype)\n"
        "y.index_add_(1, torch.tensor([0, 2, 0]), {m}(x))\nx = y"
    ),
    "data": "x = {m}(x)\nx.data.mul_(2)",
    "detach": "x = {m}(x)\nx.detach().mul_(2)",
    "the input": "x = x * 1\ny = {m}(x)\nx = x * 2 + y",
    "out= of add": (
        "with torch.no_grad():\n    y = torch.empty_like(x)\n    torch.add(x, 1, out=y)\n"
        "x = {m}(x) + y"
    ),
    "squeeze_": "x = {m}(x).unsqueeze_(0).squeeze_(0)",
    "transpose_": "x = {m}(x).transpose_(1, 2).transpose_(1, 2)",
    "dropout in place": "x = F.dropout({m}(x), 0.5, self.training, inplace=True)",
    "two readers": "y = {m}(x)\nx = y.view(2, 3, -1)\nx += 1\nx = x * y",
}


def add_write(s: Scope) -> None:
    """An operation in place, behind a layer whose output may be written into."""
    text = WRITES[s.choices.feature("write", list(WRITES))]
    values = {"m": s.linear(), "n": s.fresh("act"), "D": s.width}
    if "{n}" in text:
        s.init.append(f"self.{values['n']} = nn.ReLU(inplace=True)")
    s.add(*text.format(**values).splitlines())
