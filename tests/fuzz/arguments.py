"""Arguments of a forward besides x: optional and required, tensors and others, and how calls give them."""

from __future__ import annotations

import dataclasses

from tests.fuzz.source import Scope

__all__ = ["ARGUMENTS", "DECORATORS", "Argument", "add_argument", "add_decorator"]


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument, what is done with it, and what may be given for it.

    Attributes:
        declared: How ``forward`` declares it; ``{n}`` is its name.
        text: What is done with it; ``{a}`` and ``{b}`` are bodies of branches.
        given: What calls give; an empty string for nothing.
    """

    declared: str
    text: str
    given: tuple[str, ...]


_TENSOR = ("", "x(2, 3, 1)", "None")
_NUMBER = ("", "2.0", "0.5")
_MODE = ('"a"', '"b"')
_FLAG = ("True", "False")
_KIND = "class Kind(enum.Enum):\n    ONE = 1\n    TWO = 2"

ARGUMENTS = {
    "optional tensor": Argument("{n}=None", "if {n} is not None:\n    x = x + {n}", _TENSOR),
    "optional tensor, else": Argument(
        "{n}=None", "if {n} is None:\n{a}\nelse:\n    x = x * {n}", _TENSOR
    ),
    "optional tensor, replaced": Argument(
        "{n}=None", "{n} = x.mean(-1, keepdim=True) if {n} is None else {n}\nx = x - {n}", _TENSOR
    ),
    "optional tensor, truth of None": Argument(
        "{n}=None", "x = x + (0.5 if {n} is None else {n})", _TENSOR
    ),
    "optional tensor, isinstance": Argument(
        "{n}=None", "if isinstance({n}, torch.Tensor):\n    x = x + {n}\nelse:\n{a}", _TENSOR
    ),
    "optional tensor, identity": Argument(
        "{n}=None", "x = x * 2 if {n} is x else x", ("", "x(2, 3, 1)")
    ),
    "optional tensor, type": Argument(
        "{n}=None", "x = x * 2 if type({n}) is torch.Tensor else x", _TENSOR
    ),
    "required tensor": Argument("{n}", "x = x + {n}", ("x(2, 3, 1)",)),
    "required tensor in a product": Argument("{n}", "x = x + {l}({n})", ("x(2, 3, {D})",)),
    "tensor as an operand of in": Argument("{n}", "x = x * 2 if {n} in (1, 2) else x", ("1", "3")),
    "optional number": Argument("{n}=1.0", "x = x * {n}", _NUMBER),
    "optional number, compared": Argument("{n}=1.0", "if {n} > 1:\n{a}\nelse:\n{b}", _NUMBER),
    "optional number, is None": Argument(
        "{n}=None", "if {n} is not None:\n    x = x * {n}", _NUMBER
    ),
    "optional flag": Argument("{n}=False", "if {n}:\n{a}", ("", "True", "False")),
    "optional flag, not": Argument("{n}=True", "if not {n}:\n{a}", ("", "True", "False")),
    "optional string": Argument('{n}="a"', 'if {n} == "a":\n{a}\nelse:\n{b}', ("", *_MODE)),
    "optional function": Argument(
        "{n}=torch.tanh", "x = {n}(x)", ("", "torch.sigmoid", "lambda t: t * 2")
    ),
    "required string": Argument("{n}", 'if {n} == "a":\n{a}\nelse:\n{b}', _MODE),
    "required string, the other way round": Argument(
        "{n}", 'if "a" == {n}:\n{a}\nelse:\n{b}', _MODE
    ),
    "required string, in": Argument("{n}", 'if {n} in ("a", "c"):\n{a}\nelse:\n{b}', _MODE),
    "required string, in a dict": Argument("{n}", 'x = x * {{"a": 2.0, "b": 3.0}}[{n}]', _MODE),
    "required string, get": Argument("{n}", 'x = x * {{"a": 2.0}}.get({n}, 3.0)', _MODE),
    "required string, heads": Argument("{n}", "x = self.{h}[{n}](x)", _MODE),
    "required string, getattr": Argument("{n}", 'x = getattr(self, "{h}_" + {n})(x)', _MODE),
    "required string, match": Argument(
        "{n}", 'match {n}:\n    case "a":\n        x = x * 2\n    case _:\n        x = x * 3', _MODE
    ),
    "required string, f-string": Argument("{n}", 'x = x * (2 if f"{{{n}}}" == "a" else 3)', _MODE),
    "required string, str": Argument("{n}", 'x = x * (2 if str({n}) == "a" else 3)', _MODE),
    "required string, method": Argument("{n}", 'x = x * (2 if {n}.startswith("a") else 3)', _MODE),
    "required string, hash": Argument("{n}", 'x = x * (2 if hash({n}) == hash("a") else 3)', _MODE),
    "required string, try": Argument(
        "{n}", 'try:\n    x = x * {{"a": 2.0}}[{n}]\nexcept KeyError:\n{a}', _MODE
    ),
    "required flag": Argument("{n}", "if {n}:\n{a}\nelse:\n{b}", _FLAG),
    "required flag, is": Argument("{n}", "if {n} is True:\n{a}\nelse:\n{b}", _FLAG),
    "required flag, times": Argument("{n}", "x = x * (1 + {n})", _FLAG),
    "required flag, and": Argument("{n}", "x = x * (({n} and 2.0) or 3.0)", _FLAG),
    "required enum": Argument(
        "{n}", "if {n} == Kind.ONE:\n{a}\nelse:\n{b}", ("Kind.ONE", "Kind.TWO")
    ),
    "required enum, is": Argument(
        "{n}", "if {n} is Kind.ONE:\n{a}\nelse:\n{b}", ("Kind.ONE", "Kind.TWO")
    ),
    "required number": Argument("{n}", "x = x * {n}", ("2.0", "3")),
    "required number, range": Argument("{n}", "for _ in range({n}):\n{a}", ("1", "2")),
    "required number, int": Argument(
        "{n}", "x = x[:, int({n}):].mean(1, keepdim=True) + x", ("1", "2")
    ),
    "required number, index": Argument("{n}", "x = x + x[:, {n}].unsqueeze(1)", ("1", "2")),
    "required dict": Argument(
        "{n}", 'x = x * {n}["k"] if "k" in {n} else x', ('{{"k": 2.0}}', '{{"j": 2.0}}')
    ),
    "required list of tensors": Argument(
        "{n}", "for one in {n}:\n    x = x + one", ("[x(2, 3, 1)]", "[x(2, 3, 1), x(2, 3, 1)]")
    ),
    "list of tensors, len": Argument(
        "{n}", "x = x * len({n}) + {n}[0]", ("[x(2, 3, 1)]", "[x(2, 3, 1), x(2, 3, 1)]")
    ),
    "tuple of tensors, unpacked": Argument(
        "{n}", "a, b = {n}\nx = x + a * b", ("(x(2, 3, 1), x(2, 3, 1))",)
    ),
    "dict of tensors": Argument("{n}", 'x = x + {n}["k"]', ('{{"k": x(2, 3, 1)}}',)),
    "mask": Argument(
        "{n}=None",
        "if {n} is not None:\n    x = x.masked_fill({n}, 0.5)",
        ("", "x(2, 3, 1) > 0", "None"),
    ),
    "*args": Argument("*{n}", "x = x * (len({n}) + 1)", ("", "2.0")),
    "*args, used": Argument("*{n}", "for one in {n}:\n    x = x * one", ("", "2.0")),
    "**kwargs, get": Argument("**{n}", 'x = x * {n}.get("scale", 3.0)', ("", "scale=2.0")),
    "**kwargs, in": Argument("**{n}", 'if "scale" in {n}:\n{a}\nelse:\n{b}', ("", "scale=2.0")),
    "**kwargs, setdefault": Argument(
        "**{n}", '{n}.setdefault("scale", 3.0)\nx = x * {n}["scale"]', ("", "scale=2.0")
    ),
    "**kwargs, truth": Argument("**{n}", "if {n}:\n{a}", ("", "scale=2.0")),
    "**kwargs, ignored": Argument("**{n}", "x = x * 2", ("", "scale=2.0")),
    "keyword only": Argument("*, {n}=1.0", "x = x * {n}", ("", "{n}=2.0")),
}


def add_argument(s: Scope) -> list[str]:
    """An argument, and what calls may give for it: texts of positional or keyword arguments."""
    c = s.choices
    kind = ARGUMENTS[c.feature("argument", list(ARGUMENTS))]
    name = s.fresh("arg")
    values: dict[str, object] = {"n": name, "D": s.width}
    text = kind.text
    if "Kind" in text:
        s.source.before(_KIND)
    for place in "ab":
        if f"{{{place}}}" in text:
            values[place] = "\n".join("    " + line for line in s.statement())
    if "{l}" in text:
        values["l"] = s.linear()
    if "{h}" in text:
        values["h"] = s.fresh("heads")
        if "getattr" in text:
            for mode in "ab":
                s.init.append(f"self.{values['h']}_{mode} = nn.Linear({s.width}, {s.width})")
        else:
            s.init.append(
                f"self.{values['h']} = nn.ModuleDict("
                f'{{key: nn.Linear({s.width}, {s.width}) for key in "ab"}})'
            )
    s.arguments.append(kind.declared.format(**values))
    given = [one.format(**values) for one in kind.given]
    s.add(*text.format(**values).splitlines())
    keyword = not kind.declared.startswith("*") and c.has("call/by keyword", 3)
    return [
        f"{name}={one}" if keyword and one and "=" not in one.split("(")[0] else one
        for one in given
    ]


DECORATORS = {
    "wraps": (
        "def twice(f):\n    @functools.wraps(f)\n    def inner(*args, **kwargs):\n"
        "        return f(*args, **kwargs) * 2\n    return inner"
    ),
    "no wraps": (
        "def twice(f):\n    def inner(self, x, *args, **kwargs):\n"
        "        return f(self, x, *args, **kwargs) * 2\n    return inner"
    ),
    "looks at len(args)": (
        "def twice(f):\n    @functools.wraps(f)\n    def inner(*args, **kwargs):\n"
        "        return f(*args, **kwargs) * (len(args) + 1)\n    return inner"
    ),
    "looks at kwargs": (
        "def twice(f):\n    @functools.wraps(f)\n    def inner(*args, **kwargs):\n"
        "        return f(*args, **kwargs) * (2 if kwargs else 3)\n    return inner"
    ),
    "counts": (
        "def twice(f):\n    @functools.wraps(f)\n    def inner(self, *args, **kwargs):\n"
        "        self.calls = getattr(self, 'calls', 0) + 1\n"
        "        return f(self, *args, **kwargs) * self.calls\n    return inner"
    ),
    "no_grad off": "def twice(f):\n    return torch.enable_grad()(f)",
    "catches": (
        "def twice(f):\n    @functools.wraps(f)\n    def inner(*args, **kwargs):\n"
        "        try:\n            return f(*args, **kwargs)\n        except ValueError:\n"
        "            return args[1]\n    return inner"
    ),
}


def add_decorator(s: Scope) -> str:
    """A decorator of ``forward``; how the class names it."""
    name = s.choices.feature("decorator", list(DECORATORS))
    own = s.fresh("twice")
    s.source.before(DECORATORS[name].replace("twice", own))
    s.source.stateful |= name == "counts"
    return own
