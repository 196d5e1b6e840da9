"""Writes random programs: what a model does, how it is called and changed, and how it is adapted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.fuzz.arguments import add_argument, add_decorator
from tests.fuzz.choices import Choices
from tests.fuzz.products import add_elementwise, add_layer, add_product
from tests.fuzz.program import Program
from tests.fuzz.readers import add_caller, add_hook, add_reader, add_write
from tests.fuzz.reads import add_read, add_state
from tests.fuzz.source import Scope, Source

__all__ = ["write_program"]

_WIDTHS = (4, 6, 8)
# A row of one block in a format of blocks.
_BLOCK = 64
_TENSOR = re.compile(r"\bx\(2, 3, (\d+)\)")


def write_program(choices: Choices) -> Program:
    """One program."""
    source = Source(choices)
    root = Scope(source, "Net", "", choices.pick([*_WIDTHS * 8, _BLOCK]))
    width = root.width
    tokens = choices.has("input/token ids", 6)
    if tokens:
        root.init.append(f"self.emb = nn.Embedding(7, {width})")
        root.add("x = self.emb(x)")
    given = _fill(root, most=4)
    root.body = root.body or ["x = x * 2"]
    if not any("nn.Linear" in line for line in root.init) or choices.chance(2):
        # There is something to adapt in every program.
        root.add(f"x = {root.linear()}(x)")
    _finish(root)
    for _ in range(choices.count(1, 2)):
        first = "ids(2, 3)" if tokens else f"x(2, 3, {width})"
        source.calls.append(_call(choices, first, given))
    return _adapted(choices, source)


# --- what a module does --------------------------------------------------------------------------


def _block(s: Scope) -> None:
    """A module of its own, once, twice, or in a list."""
    c = s.choices
    how = c.feature("block", ["once", "twice", "a list", "two names", "a subclass", "inherited"])
    name, attribute = s.fresh("Block"), s.fresh("block")
    several = how == "a list"
    child = Scope(
        s.source, name, f"{s.path}{attribute}.{'0.' if several else ''}", s.width, s.depth + 1
    )
    given = _fill(child, most=2)
    if child.width != s.width:
        child.add(f"x = {child.linear(s.width)}(x)")
        child.width = s.width
    if how in ("a subclass", "inherited"):
        child.name = f"{name}Base"
    _finish(child)
    if how == "a subclass":
        arguments = "x, *args, **kwargs"
        s.source.classes.append(
            f"class {name}({name}Base):\n    def forward(self, {arguments}):\n"
            f"        return super().forward({arguments}) * 2"
        )
    if how == "inherited":
        s.source.classes.append(f"class {name}({name}Base):\n    pass")
    extra = "".join(f", {c.pick(one)}" for one in _fitting(given))
    call = f"(x{extra})"
    if several:
        s.init.append(f"self.{attribute} = nn.ModuleList([{name}() for _ in range(2)])")
        s.add(f"for block in self.{attribute}:", f"    x = block{call}")
        return
    s.init.append(f"self.{attribute} = {name}()")
    s.add(f"x = self.{attribute}{call}")
    if how == "twice":
        s.add(f"x = self.{attribute}{call}")
    if how == "two names":
        s.init.append(f"self.{attribute}b = self.{attribute}")
        s.add(f"x = self.{attribute}b{call}")


def _again(s: Scope) -> None:
    """A layer that was called already, once more."""
    fitting = [name for name, width in s.layers if width == s.width]
    if fitting:
        s.choices.features.append("move/again")
        s.add(f"x = {s.choices.pick(fitting)}(x)")
    else:
        s.add(*s.statement())


_MOVES: dict[str, tuple[int, Callable[[Scope], None]]] = {
    "layer": (4, add_layer),
    "product": (4, add_product),
    "elementwise": (2, add_elementwise),
    "read": (4, add_read),
    "block": (3, _block),
    "again": (1, _again),
    "write": (2, add_write),
    "reader": (2, add_reader),
    "caller": (2, add_caller),
    "state": (1, add_state),
    "hook": (1, add_hook),
}
"""What a forward is made of, and how often."""


def _fill(s: Scope, most: int) -> list[list[str]]:
    """Writes a forward; what calls may give for its arguments."""
    c = s.choices
    given = []
    names = [name for name, (weight, _) in _MOVES.items() for _ in range(weight)]
    if s.depth == 2:
        names = [name for name in names if name != "block"]
    for number in range(most):
        # A question before each, and not a number before all: leaving out one shrinks a program.
        if number and not c.pick([False, True, True]):
            break
        if c.has("move/argument", 4) and not s.arguments:
            given.append(add_argument(s))
        else:
            name = c.feature("move", names)
            _MOVES[name][1](s)
    return given


def _finish(s: Scope) -> None:
    text = str(s)
    if s.choices.has("move/decorator", 10):
        own = add_decorator(s)
        text = text.replace("    def forward(", f"    @{own}\n    def forward(")
    s.source.classes.append(text)


def _fitting(given: list[list[str]]) -> list[list[str]]:
    """What a parent may write for its child's arguments: its own x where calls give a tensor."""
    parts = [
        [_TENSOR.sub(r"x[..., :1].expand(2, 3, \1)", one) for one in options if one]
        for options in given
    ]
    return [options for options in parts if options]


def _call(c: Choices, first: str, given: list[list[str]]) -> str:
    parts = [first]
    keywords = []
    for options in given:
        text = c.pick(options)
        name, _, value = text.partition("=")
        if name.isidentifier() and value and not value.startswith("="):
            keywords.append(f'"{name}": {value}')
        elif text:
            parts.append(text)
    named = f"{{{', '.join(keywords)}}}"
    return f'("forward", ({", ".join(parts)},), {named})'


# --- how it is adapted ---------------------------------------------------------------------------


def _adapted(c: Choices, source: Source) -> Program:
    text = str(source)
    several_layers = text.count("nn.Linear(") > 1
    # A bias on B needs one in the base, as in PEFT.
    biased = "bias=False" not in text and "nn.Parameter" not in text
    configs = [_config(c, several_layers, biased)]
    if c.has("adapters/several", 6):
        configs.append(_config(c, several_layers, biased))
    actions = _actions(c, source, len(configs) > 1)
    frontend, example = _capture(c, source)
    optimize = not c.has("config/not optimized", 4)
    whole = frontend == "export" or (frontend == "auto" and example)
    if whole or any(feature.startswith(_RAW) for feature in c.features):
        # What is loaded is fused in any case.
        fused = (optimize or "reload" in actions) and c.may(
            "combination/products in one graph, fused"
        )
        optimize = optimize and fused
        actions = [name for name in actions if fused or name != "reload"]
    dtype = c.feature("dtype", ["float64"] * 12 + ["float32"] * 2 + ["bfloat16"])
    quantize = ""
    # The last product is the output head, which stays dense.
    if dtype == "float32" and several_layers and c.has("quantized/base", 3):
        blocks = f"nn.Linear({_BLOCK}, {_BLOCK})" in text
        quantize = c.feature("quantized", ["nf4", "int8"] if blocks else ["int8"])
    # A file takes seconds, and only what can be differentiated is known to export.
    if source.grad and not quantize:
        for how in ("export", "export inputs"):
            if c.has(f"action/{how}", 120):
                dtype = "float32"
                actions.append(how)
    again = optimize and c.has("config/inputs made again", 2)
    features = tuple(dict.fromkeys(c.features))
    return Program(
        text,
        tuple(configs),
        frontend,
        example,
        optimize,
        dtype,
        quantize,
        tuple(actions),
        features,
        memory="balanced" if again else "fast",
    )


def _actions(c: Choices, source: Source, several: bool) -> list[str]:
    """What is done with the adapted model. Merges come before calls that leave something behind."""
    actions = [
        name
        for name, one_in in (("merge", 2), ("reload", 4), ("copy", 8), ("pickle", 12))
        if c.has(f"action/{name}", one_in)
    ]
    actions.append("call")
    if source.changes:
        actions += ["change", "call"]
    if several:
        actions += ["switch second", "call", "switch default,second", "call"]
    if not source.stateful:
        if c.has("action/disable", 4):
            actions += ["disable", "call"]
        if c.has("action/merge at the end", 6):
            actions.append("merge")
    return actions


def _capture(c: Choices, source: Source) -> tuple[str, bool]:
    """The front-end, and whether there are example inputs."""
    frontend = c.feature("frontend", ["auto"] * 40 + ["regions", "symbolic", "export"])
    example = frontend == "export" or c.has("frontend/example inputs", 3)
    if source.stateful and example and not c.may("combination/state and example inputs"):
        return "auto", False
    return frontend, example


_RAW = ("product/", "reader/", "layer/Parameter", "caller/a child that", "caller/a tie of")
"""What puts several products into one graph."""


def _config(c: Choices, several_layers: bool, biased: bool) -> dict[str, Any]:
    """A configuration that selects something and can be merged."""
    config: dict[str, Any] = {"r": c.pick([2, 4, 2]), "lora_alpha": c.pick([3, 8])}
    kinds = ["plain"] * 6 + ["rslora", "dora", "dora", "dropout"] + ["lora_bias"] * biased
    kind = c.feature("config", kinds)
    config |= {
        "plain": {},
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "lora_bias": {"lora_bias": True},
        "dropout": {"lora_dropout": 0.25},
    }[kind]
    others = ["default", "default", "all-linear"] * several_layers
    targets = c.feature("targets", ["everything"] * 4 + others)
    if targets == "all-linear":
        config["target_modules"] = "all-linear"
    elif targets == "everything":
        config["target_modules"] = ".*"
    return config
