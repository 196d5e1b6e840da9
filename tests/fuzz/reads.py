"""What a forward reads besides tensors: where a value is kept, what it decides, and how it changes later."""

from __future__ import annotations

import dataclasses

from tests.fuzz.source import Scope

__all__ = [
    "AROUND",
    "GOES_ON",
    "PLACES",
    "STATES",
    "USES",
    "Place",
    "add_read",
    "add_state",
    "write_read",
    "write_state",
]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a value is kept.

    ``{n}`` is a name of its own, ``{v}`` the value, ``{o}`` the one that it is changed to, ``{C}`` the class.

    Attributes:
        read: How ``forward`` reads it.
        init: Statements of ``__init__``.
        before: What stands before the class.
        member: What stands in the class.
        change: A statement on ``{m}``, the module that has it.
        number: Whether only numbers can be kept so.
    """

    read: str
    init: str = ""
    before: str = ""
    member: str = ""
    change: str = ""
    number: bool = False


PLACES = {
    "attribute": Place("self.{n}", "self.{n} = {v}", change="{m}.{n} = {o}"),
    "getattr": Place('getattr(self, "{n}")', "self.{n} = {v}", change="{m}.{n} = {o}"),
    "getattr with a default": Place('getattr(self, "{n}", {v})', "", change="{m}.{n} = {o}"),
    "vars": Place('vars(self)["{n}"]', "self.{n} = {v}", change="{m}.{n} = {o}"),
    "config": Place(
        "self.{n}.k",
        "self.{n} = Config()\nself.{n}.k = {v}",
        "class Config:\n    pass",
        change="{m}.{n}.k = {o}",
    ),
    "config, replaced": Place(
        "self.{n}.k",
        "self.{n} = Settings({v})",
        "@dataclasses.dataclass\nclass Settings:\n    k: object = None",
        change="{m}.{n} = Settings({o})",
    ),
    "frozen dataclass": Place(
        "self.{n}.k",
        "self.{n} = Frozen({v})",
        "@dataclasses.dataclass(frozen=True)\nclass Frozen:\n    k: object = None",
        change="{m}.{n} = dataclasses.replace({m}.{n}, k={o})",
    ),
    "slots": Place(
        "self.{n}.k",
        "self.{n} = Slotted()\nself.{n}.k = {v}",
        'class Slotted:\n    __slots__ = ("k",)',
        change="{m}.{n}.k = {o}",
    ),
    "nested config": Place(
        "self.{n}.inner.k",
        "self.{n} = Config()\nself.{n}.inner = Config()\nself.{n}.inner.k = {v}",
        "class Config:\n    pass",
        change="{m}.{n}.inner.k = {o}",
    ),
    "dict": Place('self.{n}["a"]', 'self.{n} = {{"a": {v}}}', change='{m}.{n}["a"] = {o}'),
    "dict.get": Place(
        'self.{n}.get("a", {v})', 'self.{n} = {{"b": 0}}', change='{m}.{n}["a"] = {o}'
    ),
    "nested dict": Place(
        'self.{n}["a"]["b"]',
        'self.{n} = {{"a": {{"b": {v}}}}}',
        change='{m}.{n}["a"]["b"] = {o}',
    ),
    "list": Place("self.{n}[0]", "self.{n} = [{v}, 0]", change="{m}.{n}[0] = {o}"),
    "tuple": Place("self.{n}[-1]", "self.{n} = (0, {v})", change="{m}.{n} = (0, {o})"),
    "global": Place(
        "{n}",
        before="{n} = {v}",
        change='globals()["{n}"] = {o}',
    ),
    "global dict": Place('{n}["a"]', before='{n} = {{"a": {v}}}', change='{n}["a"] = {o}'),
    "class attribute": Place("self.{n}", member="{n} = {v}", change="{C}.{n} = {o}"),
    "default": Place(
        "take_{n}()",
        before="def take_{n}(value={v}):\n    return value",
        change="take_{n}.__defaults__ = ({o},)",
    ),
    "closure": Place(
        "self.{n}()",
        "self.{n} = keep({v})",
        "def keep(value):\n    def kept():\n        return value\n    return kept",
        change="{m}.{n} = keep({o})",
    ),
    "closure over a list": Place(
        "self.{n}()",
        "self.cell_{n} = [{v}]\nself.{n} = keep_place(self.cell_{n}, 0)",
        "def keep_place(values, place):\n    def kept():\n        return values[place]\n    return kept",
        change="{m}.cell_{n}[0] = {o}",
    ),
    "partial": Place(
        "self.{n}()",
        "self.{n} = functools.partial(identity, {v})",
        "def identity(value):\n    return value",
        change="{m}.{n} = functools.partial(identity, {o})",
    ),
    "property": Place(
        "self.{n}",
        "self._{n} = {v}",
        member="@property\ndef {n}(self):\n    return self._{n}",
        change="{m}._{n} = {o}",
    ),
    "method": Place(
        "self.{n}()",
        "self._{n} = {v}",
        member="def {n}(self):\n    return self._{n}",
        change="{m}._{n} = {o}",
    ),
    "static method": Place(
        "self.{n}({v})",
        member="@staticmethod\ndef {n}(value):\n    return value",
    ),
    "class method": Place(
        "self.{n}()",
        member="kept_{n} = {v}\n\n@classmethod\ndef {n}(cls):\n    return cls.kept_{n}",
        change="{C}.kept_{n} = {o}",
    ),
    "cached property": Place(
        "self.{n}",
        "self._{n} = {v}",
        member="@functools.cached_property\ndef {n}(self):\n    return self._{n}",
    ),
    "helper": Place(
        "read_{n}(self)",
        "self.{n} = {v}",
        "def read_{n}(module):\n    return module.{n}",
        change="{m}.{n} = {o}",
    ),
    "__getattr__ of an object": Place(
        "self.{n}.k",
        "self.{n} = Answers({{'k': {v}}})",
        "class Answers:\n    def __init__(self, values):\n        self.values = values\n"
        "    def __getattr__(self, name):\n        if name.startswith('_') or name == 'values':\n"
        "            raise AttributeError(name)\n        return self.values[name]",
        change="{m}.{n}.values['k'] = {o}",
    ),
    "child": Place(
        "self.{n}.k",
        "self.{n} = nn.Identity()\nself.{n}.k = {v}",
        change="{m}.{n}.k = {o}",
    ),
    "child, replaced": Place(
        "self.{n}.k",
        "self.{n} = nn.Identity()\nself.{n}.k = {v}",
        change="{m}.{n} = nn.Identity()\n{m}.{n}.k = {o}",
    ),
    "NumPy array": Place(
        "self.{n}[0]", "self.{n} = np.array([{v}])", change="{m}.{n}[0] = {o}", number=True
    ),
    "NumPy number": Place(
        "self.{n}", "self.{n} = np.float64({v})", change="{m}.{n} = np.float64({o})", number=True
    ),
    "tensor": Place(
        "self.{n}",
        "self.{n} = torch.tensor(float({v}), dtype=torch.float64)",
        change="{m}.{n} = torch.tensor(float({o}), dtype=torch.float64)",
        number=True,
    ),
    "buffer": Place(
        "self.{n}",
        'self.register_buffer("{n}", torch.tensor(float({v})))',
        change="{m}.{n}.fill_({o})",
        number=True,
    ),
    "list of objects": Place(
        "self.{n}[1].k",
        "self.{n} = [Config(), Config()]\nself.{n}[1].k = {v}",
        "class Config:\n    pass",
        change="{m}.{n}[1].k = {o}",
    ),
    "list of objects, one replaced": Place(
        "self.{n}[1].k",
        "self.{n} = [Settings(0), Settings({v})]",
        "@dataclasses.dataclass\nclass Settings:\n    k: object = None",
        change="{m}.{n}[1] = Settings({o})",
    ),
    "dict of functions": Place(
        'self.{n}["a"]()',
        'self.{n} = {{"a": lambda: {v}, "b": abs}}',
        change='{m}.{n}["a"] = lambda: {o}',
    ),
    "OrderedDict": Place(
        'self.{n}["a"]', "self.{n} = collections.OrderedDict(a={v})", change='{m}.{n}["a"] = {o}'
    ),
    "defaultdict": Place(
        'self.{n}["a"]',
        "self.{n} = collections.defaultdict(int, a={v})",
        change='{m}.{n}["a"] = {o}',
    ),
    "deque": Place(
        "self.{n}[0]", "self.{n} = collections.deque([{v}, 0])", change="{m}.{n}[0] = {o}"
    ),
    "named tuple": Place(
        "self.{n}.k",
        "self.{n} = Named({v})",
        'Named = collections.namedtuple("Named", "k")',
        change="{m}.{n} = Named({o})",
    ),
    "dict of a class of its own": Place(
        'self.{n}["a"]',
        "self.{n} = Table(a={v})",
        "class Table(dict):\n    pass",
        change='{m}.{n}["a"] = {o}',
    ),
    "UserDict": Place(
        'self.{n}["a"]', "self.{n} = collections.UserDict(a={v})", change='{m}.{n}["a"] = {o}'
    ),
    "view of a dict": Place(
        'self.{n}["a"]',
        "self.of_{n} = {{'a': {v}}}\nself.{n} = types.MappingProxyType(self.of_{n})",
        change='{m}.of_{n}["a"] = {o}',
    ),
    "namespace": Place(
        "self.{n}.k", "self.{n} = types.SimpleNamespace(k={v})", change="{m}.{n}.k = {o}"
    ),
    "bytes that change": Place(
        "self.{n}[0]", "self.{n} = bytearray([3])", change="{m}.{n}[0] = 5", number=True
    ),
    "fraction": Place(
        "float(self.{n})",
        'self.{n} = fractions.Fraction("{v}")',
        change='{m}.{n} = fractions.Fraction("{o}")',
        number=True,
    ),
    "number of a class of its own": Place(
        "self.{n}",
        "self.{n} = Number({v})",
        "class Number(float):\n    pass",
        change="{m}.{n} = Number({o})",
        number=True,
    ),
    "weak reference": Place(
        "self.{n}().k",
        "self.of_{n} = Config()\nself.of_{n}.k = {v}\nself.{n} = weakref.ref(self.of_{n})",
        "class Config:\n    pass",
        change="{m}.{n}().k = {o}",
    ),
    "global object": Place(
        "{n}.k",
        before="class Config:\n    pass\n\n{n} = Config()\n{n}.k = {v}",
        change="{n}.k = {o}",
    ),
    "global object, replaced": Place(
        "{n}.k",
        before="@dataclasses.dataclass\nclass Settings:\n    k: object = None\n\n{n} = Settings({v})",
        change='globals()["{n}"] = Settings({o})',
    ),
    "object in globals()": Place(
        'globals()["{n}"].k',
        before="class Config:\n    pass\n\n{n} = Config()\n{n}.k = {v}",
        change="{n}.k = {o}",
    ),
    "method of a global object": Place(
        "{n}.get()",
        before="class Holder:\n    def __init__(self, k):\n        self.k = k\n"
        "    def get(self):\n        return self.k\n\n{n} = Holder({v})",
        change="{n}.k = {o}",
    ),
    "global list of objects": Place(
        "{n}[0].k",
        before="class Config:\n    pass\n\n{n} = [Config()]\n{n}[0].k = {v}",
        change="{n}[0].k = {o}",
    ),
    "global dict of functions": Place(
        '{n}["a"]()', before='{n} = {{"a": lambda: {v}}}', change='{n}["a"] = lambda: {o}'
    ),
    "global dict of classes": Place(
        '{n}["a"].k',
        before="class Of_{n}:\n    k = {v}\n\n{n} = {{'a': Of_{n}}}",
        change="Of_{n}.k = {o}",
    ),
    "closure over an object": Place(
        "read_{n}()",
        before="class Config:\n    pass\n\ndef keep_object(value):\n    held = Config()\n"
        "    held.k = value\n    def kept():\n        return held.k\n    kept.held = held\n"
        "    return kept\n\nread_{n} = keep_object({v})",
        change="read_{n}.held.k = {o}",
    ),
    "context variable": Place(
        "{n}.get()",
        before='{n} = contextvars.ContextVar("{n}")\n{n}.set({v})',
        change="{n}.set({o})",
    ),
    "environment": Place(
        'float(os.environ.get("FUZZ_{n}", 1))',
        before='os.environ["FUZZ_{n}"] = "{v}"',
        change='os.environ["FUZZ_{n}"] = "{o}"',
        number=True,
    ),
    "getattr of a class": Place('getattr(type(self), "{n}", {v})', change="{C}.{n} = {o}"),
    "object of a class": Place(
        "type(self).{n}.k",
        before="class Config:\n    pass",
        member="{n} = Config()\n{n}.k = {v}",
        change="{C}.{n}.k = {o}",
    ),
    "dict of a class": Place(
        '{C}.{n}["a"]', member='{n} = {{"a": {v}, "b": abs}}', change='{C}.{n}["a"] = {o}'
    ),
    "class as a config": Place(
        "self.{n}.k",
        "self.{n} = Of_{n}",
        "class Of_{n}:\n    k = {v}",
        change="Of_{n}.k = {o}",
    ),
    "static method of a class": Place(
        "Of_{n}.get()",
        before="class Of_{n}:\n    k = {v}\n    @staticmethod\n    def get():\n        return Of_{n}.k",
        change="Of_{n}.k = {o}",
    ),
    "property of a class": Place(
        "Of_{n}.k",
        before="class Meta_{n}(type):\n    @property\n    def k(cls):\n        return cls.kept\n\n"
        "class Of_{n}(metaclass=Meta_{n}):\n    kept = {v}",
        change="Of_{n}.kept = {o}",
    ),
    "descriptor": Place(
        "self.{n}",
        before="class Gives:\n    def __init__(self, k):\n        self.k = k\n"
        "    def __get__(self, owner, cls):\n        return self.k",
        member="{n} = Gives({v})",
        change='{C}.__dict__["{n}"].k = {o}',
    ),
    "method, replaced": Place(
        "self.{n}()",
        member="def {n}(self):\n    return {v}",
        change="{C}.{n} = lambda self: {o}",
    ),
    "class method, replaced": Place(
        "self.{n}()",
        member="@classmethod\ndef {n}(cls):\n    return {v}",
        change="{C}.{n} = classmethod(lambda cls: {o})",
    ),
    "property, replaced": Place(
        "self.{n}",
        member="@property\ndef {n}(self):\n    return {v}",
        change="{C}.{n} = property(lambda self: {o})",
    ),
    "method of a config, replaced": Place(
        "self.{n}.get()",
        "self.{n} = Of_{n}()",
        "class Of_{n}:\n    def get(self):\n        return {v}",
        change="Of_{n}.get = lambda self: {o}",
    ),
    "function, replaced": Place(
        "take_{n}()",
        before="def take_{n}():\n    return {v}",
        change='globals()["take_{n}"] = lambda: {o}',
    ),
    "hook for attributes": Place(
        "self.{n}",
        member="def __getattr__(self, name):\n    if name == '{n}':\n        return {v}\n"
        "    return super().__getattr__(name)",
        change="{C}.{n} = {o}",
    ),
    "attrgetter": Place(
        'operator.attrgetter("{n}")(self)', "self.{n} = {v}", change="{m}.{n} = {o}"
    ),
    "attrgetter of a path": Place(
        'operator.attrgetter("{n}.k")(self)',
        "self.{n} = Config()\nself.{n}.k = {v}",
        "class Config:\n    pass",
        change="{m}.{n}.k = {o}",
    ),
    "itemgetter": Place(
        'operator.itemgetter("a")(self.{n})', 'self.{n} = {{"a": {v}}}', change='{m}.{n}["a"] = {o}'
    ),
    "methodcaller": Place(
        'operator.methodcaller("{n}")(self)',
        "self._{n} = {v}",
        member="def {n}(self):\n    return self._{n}",
        change="{m}._{n} = {o}",
    ),
    "shallow copy": Place(
        "copy.copy(self.{n}).k",
        "self.{n} = Config()\nself.{n}.k = {v}",
        "class Config:\n    pass",
        change="{m}.{n}.k = {o}",
    ),
    "asdict": Place(
        'dataclasses.asdict(self.{n})["k"]',
        "self.{n} = Settings({v})",
        "@dataclasses.dataclass\nclass Settings:\n    k: object = None",
        change="{m}.{n}.k = {o}",
    ),
    "astuple": Place(
        "dataclasses.astuple(self.{n})[0]",
        "self.{n} = Settings({v})",
        "@dataclasses.dataclass\nclass Settings:\n    k: object = None",
        change="{m}.{n}.k = {o}",
    ),
    "vars of a config": Place(
        'vars(self.{n})["k"]',
        "self.{n} = Config()\nself.{n}.k = {v}",
        "class Config:\n    pass",
        change="{m}.{n}.k = {o}",
    ),
    "__dict__ of a config": Place(
        'self.{n}.__dict__["k"]',
        "self.{n} = Config()\nself.{n}.k = {v}",
        "class Config:\n    pass",
        change="{m}.{n}.k = {o}",
    ),
    "values of a config": Place(
        "list(vars(self.{n}).values())[0]",
        "self.{n} = Config()\nself.{n}.k = {v}",
        "class Config:\n    pass",
        change="{m}.{n}.k = {o}",
    ),
    "keyword arguments kept": Place(
        "take_value(**self.{n})",
        'self.{n} = {{"value": {v}}}',
        "def take_value(value):\n    return value",
        change='{m}.{n}["value"] = {o}',
    ),
    "arguments kept": Place(
        "take_value(*self.{n})",
        "self.{n} = [{v}]",
        "def take_value(value):\n    return value",
        change="{m}.{n}[0] = {o}",
    ),
    "items of a dict": Place(
        "[b for a, b in self.{n}.items()][0]",
        'self.{n} = {{"a": {v}}}',
        change='{m}.{n}["a"] = {o}',
    ),
    "longer dict": Place(
        "list(self.{n}.values())[-1]", 'self.{n} = {{"a": {v}}}', change='{m}.{n}["b"] = {o}'
    ),
    "pop of a copy": Place(
        'dict(self.{n}).pop("a")', 'self.{n} = {{"a": {v}}}', change='{m}.{n}["a"] = {o}'
    ),
    "chain of dicts": Place(
        'collections.ChainMap(self.{n}, {{"b": 1}})["a"]',
        'self.{n} = {{"a": {v}}}',
        change='{m}.{n}["a"] = {o}',
    ),
    "merged dicts": Place(
        '({{"b": 1}} | self.{n})["a"]', 'self.{n} = {{"a": {v}}}', change='{m}.{n}["a"] = {o}'
    ),
    "unpacked": Place(
        "(lambda pair: pair[1])((0, *self.{n}))", "self.{n} = [{v}]", change="{m}.{n}[0] = {o}"
    ),
    "sorted by": Place(
        "sorted(self.{n}, key=lambda one: one.rank)[0].k",
        "self.{n} = [Ranked(1, 3.0), Ranked(0, {v})]",
        "@dataclasses.dataclass\nclass Ranked:\n    rank: int\n    k: object",
        change="{m}.{n}[1].k = {o}",
    ),
    "order of objects": Place(
        "sorted(self.{n}, key=lambda one: one.rank)[0].k",
        "self.{n} = [Ranked(1, {o}), Ranked(0, {v})]",
        "@dataclasses.dataclass\nclass Ranked:\n    rank: int\n    k: object",
        change="{m}.{n}[1].rank = 5",
    ),
    "length of an object": Place(
        "len(self.{n})",
        "self.{n} = Sized(2)",
        "class Sized:\n    def __init__(self, k):\n        self.k = k\n"
        "    def __len__(self):\n        return self.k",
        change="{m}.{n}.k = 3",
        number=True,
    ),
    "object that is iterated": Place(
        "list(self.{n})[0]",
        "self.{n} = Iterated({v})",
        "class Iterated:\n    def __init__(self, k):\n        self.k = k\n"
        "    def __iter__(self):\n        yield self.k",
        change="{m}.{n}.k = {o}",
    ),
    "object with items": Place(
        "self.{n}[0]",
        "self.{n} = Indexed({v})",
        "class Indexed:\n    def __init__(self, k):\n        self.k = k\n"
        "    def __getitem__(self, place):\n        return self.k",
        change="{m}.{n}.k = {o}",
    ),
    "object that is called": Place(
        "self.{n}()",
        "self.{n} = Called({v})",
        "class Called:\n    def __init__(self, k):\n        self.k = k\n"
        "    def __call__(self):\n        return self.k",
        change="{m}.{n}.k = {o}",
    ),
    "object as a number": Place(
        "float(self.{n})",
        "self.{n} = Weighs({v})",
        "class Weighs:\n    def __init__(self, k):\n        self.k = k\n"
        "    def __float__(self):\n        return float(self.k)",
        change="{m}.{n}.k = {o}",
        number=True,
    ),
    "object that is multiplied": Place(
        "(1 * self.{n})",
        "self.{n} = Factor({v})",
        "class Factor:\n    def __init__(self, k):\n        self.k = k\n"
        "    def __rmul__(self, other):\n        return other * self.k",
        change="{m}.{n}.k = {o}",
        number=True,
    ),
    "object that is compared": Place(
        "(2.0 if self.{n} == 1 else 3.0)",
        "self.{n} = Alike(True)",
        "class Alike:\n    def __init__(self, k):\n        self.k = k\n"
        "    def __eq__(self, other):\n        return self.k",
        change="{m}.{n}.k = False",
        number=True,
    ),
    "object that contains": Place(
        "(2.0 if 1 in self.{n} else 3.0)",
        "self.{n} = Contains(True)",
        "class Contains:\n    def __init__(self, k):\n        self.k = k\n"
        "    def __contains__(self, other):\n        return self.k",
        change="{m}.{n}.k = False",
        number=True,
    ),
    "truth of an object": Place(
        "(2.0 if self.{n} else 3.0)",
        "self.{n} = Says(True)",
        "class Says:\n    def __init__(self, k):\n        self.k = k\n"
        "    def __bool__(self):\n        return self.k",
        change="{m}.{n}.k = False",
        number=True,
    ),
    "text of an object": Place(
        "len(str(self.{n}))",
        'self.{n} = Spelled("ab")',
        "class Spelled:\n    def __init__(self, k):\n        self.k = k\n"
        "    def __str__(self):\n        return self.k",
        change='{m}.{n}.k = "abc"',
        number=True,
    ),
    "text as JSON": Place(
        "json.loads(self.{n})[0]", 'self.{n} = "[0.5]"', change='{m}.{n} = "[0.25]"', number=True
    ),
    "text that is matched": Place(
        '(2.0 if re.match(self.{n}, "abc") else 3.0)',
        'self.{n} = "a"',
        change='{m}.{n} = "b"',
        number=True,
    ),
    "eval": Place('eval("self.{n}")', "self.{n} = {v}", change="{m}.{n} = {o}"),
    "format": Place(
        'float("{{}}".format(self.{n}))', "self.{n} = {v}", change="{m}.{n} = {o}", number=True
    ),
    "percent": Place(
        'float("%s" % self.{n})', "self.{n} = {v}", change="{m}.{n} = {o}", number=True
    ),
    "square root": Place(
        "math.sqrt(abs(self.{n}))", "self.{n} = {v}", change="{m}.{n} = {o}", number=True
    ),
    "square root of NumPy": Place(
        "float(np.sqrt(abs(self.{n})))", "self.{n} = {v}", change="{m}.{n} = {o}", number=True
    ),
    "accumulate": Place(
        "list(itertools.accumulate(self.{n}))[-1]",
        "self.{n} = [1, {v}]",
        change="{m}.{n}[1] = {o}",
        number=True,
    ),
    "starmap": Place(
        "list(itertools.starmap(take_second, [self.{n}]))[0]",
        "self.{n} = (0, {v})",
        "def take_second(a, b):\n    return b",
        change="{m}.{n} = (0, {o})",
    ),
    "generator": Place(
        "next(self.{n}())",
        "self._{n} = {v}",
        member="def {n}(self):\n    yield self._{n}",
        change="{m}._{n} = {o}",
    ),
    "recursion": Place(
        "self.{n}(3)",
        "self._{n} = {v}",
        member="def {n}(self, depth):\n    return self._{n} if not depth else self.{n}(depth - 1)",
        change="{m}._{n} = {o}",
    ),
    "partial method": Place(
        "self.{n}()",
        "self._{n} = {v}",
        member="def of_{n}(self, add):\n    return self._{n}\n\n"
        "{n} = functools.partialmethod(of_{n}, 1)",
        change="{m}._{n} = {o}",
    ),
    "single dispatch": Place(
        "read_{n}(self)",
        "self.{n} = {v}",
        "@functools.singledispatch\ndef read_{n}(module):\n    return module.{n}",
        change="{m}.{n} = {o}",
    ),
    "method by name": Place(
        'getattr(self, "get_" + "{n}")()',
        "self._{n} = {v}",
        member="def get_{n}(self):\n    return self._{n}",
        change="{m}._{n} = {o}",
    ),
    "fget": Place(
        "type(self).{n}.fget(self)",
        "self._{n} = {v}",
        member="@property\ndef {n}(self):\n    return self._{n}",
        change="{m}._{n} = {o}",
    ),
    "function of the class": Place(
        "type(self).{n}(self)",
        "self._{n} = {v}",
        member="def {n}(self):\n    return self._{n}",
        change="{m}._{n} = {o}",
    ),
    "__getattribute__": Place(
        "self.{n}.k",
        "self.{n} = Asks()\nself.{n}.kept = {v}",
        "class Asks:\n    def __getattribute__(self, name):\n"
        "        return object.__getattribute__(self, 'kept' if name == 'k' else name)",
        change="{m}.{n}.kept = {o}",
    ),
    "in a context": Place(
        "inside_{n}(self)",
        "self.{n} = {v}",
        "@contextlib.contextmanager\ndef given_{n}(module):\n    yield module.{n}\n\n"
        "def inside_{n}(module):\n    with given_{n}(module) as value:\n        return value",
        change="{m}.{n} = {o}",
    ),
    "try and finally": Place(
        "self.{n}()",
        "self._{n} = {v}",
        member="def {n}(self):\n    try:\n        return self._{n}\n    finally:\n        pass",
        change="{m}._{n} = {o}",
    ),
    "attribute or else": Place(
        "self.{n}()",
        "",
        member="def {n}(self):\n    try:\n        return self._{n}\n    except AttributeError:\n"
        "        return {v}",
        change="{m}._{n} = {o}",
    ),
    "key or else": Place(
        "self.{n}()",
        "self._{n} = {{'b': 1}}",
        member="def {n}(self):\n    try:\n        return self._{n}['a']\n    except KeyError:\n"
        "        return {v}",
        change="{m}._{n}['a'] = {o}",
    ),
    "shared config, replaced in one place": Place(
        "(self.{n}a.c.k, self.{n}b.c.k)[1]",
        "self.{n}a, self.{n}b = nn.Identity(), nn.Identity()\nself.{n}a.c = Settings({v})\n"
        "self.{n}b.c = self.{n}a.c",
        "@dataclasses.dataclass\nclass Settings:\n    k: object = None",
        change="{m}.{n}b.c = Settings({o})",
    ),
    "number of children": Place(
        "len(list(self.{n}.children()))",
        "self.{n} = nn.Sequential(nn.Identity())",
        change="{m}.{n}.append(nn.Identity())",
        number=True,
    ),
    "class of a child": Place(
        "(2.0 if isinstance(self.{n}, nn.Identity) else 3.0)",
        "self.{n} = nn.Identity()",
        change="{m}.{n} = nn.Tanh()",
        number=True,
    ),
    "name of a class": Place(
        "(2.0 if type(self.{n}).__name__ == 'Identity' else 3.0)",
        "self.{n} = nn.Identity()",
        change="{m}.{n} = nn.Tanh()",
        number=True,
    ),
    "setting of a layer": Place(
        "self.{n}.eps",
        "self.{n} = nn.LayerNorm(2, eps={v})",
        change="{m}.{n}.eps = {o}",
        number=True,
    ),
    "extra representation": Place(
        "len(self.{n}.extra_repr())",
        "self.{n} = nn.Dropout(0.5)",
        change="{m}.{n}.p = 0.25",
        number=True,
    ),
    "size of a buffer": Place(
        "self.{n}.shape[0]",
        'self.register_buffer("{n}", torch.ones(2))',
        change="{m}.{n} = torch.ones(3)",
        number=True,
    ),
    "length of a buffer": Place(
        "len(self.{n})",
        'self.register_buffer("{n}", torch.ones(2))',
        change="{m}.{n} = torch.ones(3)",
        number=True,
    ),
    "dtype of a buffer": Place(
        # Not whether it is fp32: the oracle runs the model in fp64.
        "(3.0 if self.{n}.dtype == torch.int64 else 2.0)",
        'self.register_buffer("{n}", torch.ones(2))',
        change="{m}.{n} = torch.ones(2, dtype=torch.int64)",
        number=True,
    ),
    "whether a parameter is trained": Place(
        "(2.0 if self.{n}.requires_grad else 3.0)",
        "self.{n} = nn.Parameter(torch.ones(2), requires_grad=False)",
        number=True,
    ),
    "module": Place(
        "helpers_{n}.k",
        before='helpers_{n} = types.ModuleType("helpers_{n}")\nhelpers_{n}.k = {v}',
        change="helpers_{n}.k = {o}",
    ),
    "array": Place(
        "self.{n}[0]", 'self.{n} = array.array("d", [2.0])', change="{m}.{n}[0] = 3.0", number=True
    ),
    "decimal": Place(
        "float(self.{n})",
        'self.{n} = decimal.Decimal("{v}")',
        change='{m}.{n} = decimal.Decimal("{o}")',
        number=True,
    ),
    "date": Place(
        "self.{n}.day",
        "self.{n} = datetime.date(2020, 1, 2)",
        change="{m}.{n} = datetime.date(2020, 1, 3)",
        number=True,
    ),
    "thread local": Place(
        "{n}.k", before="{n} = threading.local()\n{n}.k = {v}", change="{n}.k = {o}"
    ),
    "flag": Place(
        "(2.0 if Mode_{n}.ON in self.{n} else 3.0)",
        "self.{n} = Mode_{n}.ON",
        "class Mode_{n}(enum.Flag):\n    ON = 1\n    OFF = 2",
        change="{m}.{n} = Mode_{n}.OFF",
        number=True,
    ),
    "function's attribute": Place(
        "read_{n}.k",
        before="def read_{n}():\n    pass\n\nread_{n}.k = {v}",
        change="read_{n}.k = {o}",
    ),
    "type variable": Place(
        "self.{n}.__args__[0].k",
        "self.{n} = list[Of_{n}]",
        "class Of_{n}:\n    k = {v}",
        change="Of_{n}.k = {o}",
    ),
    "buffer's item": Place(
        "self.{n}.item()",
        'self.register_buffer("{n}", torch.tensor(float({v})))',
        change="{m}.{n}.fill_({o})",
        number=True,
    ),
}

USES = {
    "times": "x = x * {r}",
    "in a call": "x = torch.add(x, x, alpha={r})",
    "clamp": "x = x.clamp(min=-{r})",
    "if": "if {r} == {v}:\n{a}\nelse:\n{b}",
    "if not": "if not {r} == {v}:\n{b}\nelse:\n{a}",
    "greater": "if {r} > 1:\n{a}\nelse:\n{b}",
    "truth": "if {r}:\n{a}",
    "or": "x = x * ({r} or 3.0)",
    "in": "if {r} in ({v}, 5):\n{a}\nelse:\n{b}",
    "is None": "if {r} is None:\n{a}\nelse:\n{b}",
    "isinstance": "if isinstance({r}, float):\n{a}\nelse:\n{b}",
    "type": "if type({r}) is int:\n{a}\nelse:\n{b}",
    "match": "match {r}:\n    case {v}:\n{aa}\n    case _:\n{bb}",
    "f-string": 'x = x * {{"{v}": 2.0}}.get(f"""{{{r}}}""", 3.0)',
    "str": 'x = x * (2.0 if str({r}) == "{v}" else 3.0)',
    "lookup": "x = x * {{{v}: 2.0}}.get({r}, 3.0)",
    "try": "try:\n    x = x * {{{v}: 2.0}}[{r}]\nexcept KeyError:\n{a}",
    "hash": "x = x * (hash({r}) % 7 + 1)",
    "range": "for _ in range(int({r})):\n    x = x + 0.5",
    "while": "i = 0\nwhile i < {r}:\n    x = x.tanh()\n    i += 1",
    "assert": "assert {r} is not None\nx = x * 2",
    "walrus": "if (k := {r}) == {v}:\n    x = x * k\nelse:\n    x = x / 3",
    "lambda": "x = (lambda t: t * {r})(x)",
    "comprehension": "x = sum([x * k for k in ({r}, 1)])",
    "max": "x = x * max({r}, 1)",
    "ternary": "x = x * 2 if {r} == {v} else x / 3",
    "with a layer": "x = {l}(x) if {r} == {v} else {k}(x)",
    "which layer": 'x = getattr(self, "{l.name}" if {r} == {v} else "{k.name}")(x)',
}

_NUMBERS = [("0.5", "2.0"), ("2", "3"), ("1", "2"), ("0.0", "-1.0")]
_ANY = [*_NUMBERS, ("True", "False"), ('"a"', '"b"'), ("None", "0.5"), ("1", "1.0"), ("1", "True")]
_COMPARISONS = {
    "if",
    "if not",
    "truth",
    "in",
    "is None",
    "isinstance",
    "type",
    "ternary",
    "with a layer",
    "which layer",
    "match",
    "lookup",
    "str",
}


def add_read(s: Scope) -> None:
    """A value that decides something, and maybe another one later."""
    c = s.choices
    place = PLACES[c.feature("read", list(PLACES))]
    use = c.feature("use", list(USES))
    if use == "hash" and "torch.tensor" in place.init:
        use = "times"  # the hash of a tensor is that of the object: another one in each copy
    free = use in _COMPARISONS and not place.number
    value, other = c.pick(_ANY if free else _NUMBERS)
    write_read(
        s, place, use, value, other, change=bool(place.change) and c.has("change/what was read", 3)
    )


def write_read(s: Scope, place: Place, use: str, value: str, other: str, *, change: bool) -> None:
    """Adds a value, and what it decides.

    Args:
        s: The class.
        place: Where it is kept.
        use: What it decides; a key of :data:`USES`.
        value: The value, as text.
        other: What it is changed to.
        change: Whether it is.
    """
    values = {"n": s.fresh("k"), "v": value, "o": other, "C": s.name}
    if place.init:
        s.init += place.init.format(**values).splitlines()
    if place.before:
        s.source.before(place.before.format(**values))
    if place.member:
        s.member(place.member.format(**values))
    _add_use(s, use, place.read.format(**values), value)
    if change:
        owner = f'm.get_submodule("{s.path[:-1]}")' if s.path else "m"
        s.source.changes += place.change.format(**values, m=owner).splitlines()


def _add_use(s: Scope, use: str, read: str, value: str) -> None:
    text = USES[use]
    values: dict[str, object] = {"r": read, "v": value}
    if "{a}" in text or "{aa}" in text:
        one = s.statement()
        values["a"], values["aa"] = _block(one, 4), _block(one, 8)
    if "{b}" in text or "{bb}" in text:
        two = s.statement()
        values["b"], values["bb"] = _block(two, 4), _block(two, 8)
    if "{l" in text:
        values["l"], values["k"] = _Layer(s.linear()), _Layer(s.linear())
    if value.startswith('"') and use == "str":
        values["v"] = value.strip('"')
    s.add(*text.format(**values).splitlines())


class _Layer:
    """A layer, and its name alone."""

    def __init__(self, text: str) -> None:
        self.text, self.name = text, text.removeprefix("self.")

    def __str__(self) -> str:
        return self.text

    def __format__(self, spec: str) -> str:
        return format(self.text, spec)


def _block(lines: list[str], width: int) -> str:
    return "\n".join(" " * width + line for line in lines)


STATES: dict[str, tuple[str, ...]] = {
    "counter": ("self.{n} = 0", "self.{n} += 1\nx = x * self.{n}"),
    "counter that decides": ("self.{n} = 0", "self.{n} += 1\nif self.{n} > 1:\n    x = x * 3"),
    "counter behind": ("self.{n} = 0", "x = x + self.{n}\nself.{n} = self.{n} + 1"),
    "counter of an object": (
        "self.{n} = Config()\nself.{n}.k = 0",
        "self.{n}.k += 1\nx = x * self.{n}.k",
    ),
    "counter in a dict": ('self.{n} = {{"a": 0}}', 'self.{n}["a"] += 1\nx = x * self.{n}["a"]'),
    "list": ("self.{n} = []", "self.{n}.append(1)\nx = x * len(self.{n})"),
    "iterator": ("self.{n} = iter([1.0, 2.0, 3.0, 4.0] * 5)", "x = x * next(self.{n})"),
    "random": ("self.{n} = random.Random(0)", "x = x * self.{n}.random()"),
    "NumPy generator": ("self.{n} = np.random.default_rng(0)", "x = x * float(self.{n}.random())"),
    "torch generator": (
        "self.{n} = torch.Generator().manual_seed(0)",
        "x = x * torch.rand((), generator=self.{n}, dtype=torch.float64).to(x.dtype)",
    ),
    "buffer": (
        'self.register_buffer("{n}", torch.zeros(()))',
        "self.{n} += 1\nx = x * self.{n}",
    ),
    "buffer, replaced": (
        'self.register_buffer("{n}", torch.ones(()))',
        "self.{n} = self.{n} * 2\nx = x * self.{n}",
    ),
    "cache": (
        "self.{n} = None",
        "if self.{n} is None:\n    self.{n} = x.detach().mean()\nx = x * (1 + self.{n})",
    ),
    "cached call": (
        "self.{n} = {{}}",
        "if 1 not in self.{n}:\n    self.{n}[1] = 2.0\n    x = x * 3\nx = x * self.{n}[1]",
    ),
    "global counter": ("self.{n} = 0", "self.{n} = count(self.{n})\nx = x * self.{n}"),
    "output kept": ("self.{n} = None", "self.{n} = x.detach()\nx = x * 2"),
    "output of the last call": (
        "self.{n} = 0.0",
        "y = x.detach()\nx = x + self.{n}\nself.{n} = y",
    ),
}


_COUNTING = """
def counting():
    k = 0
    def add():
        nonlocal k
        k += 1
        return k
    return add

"""
GOES_ON = frozenset(
    {
        *("context variable", "counter by global", "counter by nonlocal", "counter of a class"),
        *("counter of a function", "counter of a global object", "counter of its own class"),
        *("counter in the environment", "global iterator", "global random", "list as a default"),
    }
)
"""What a rewrite moves on: a trace runs the code of a forward once, and puts back what the model holds."""

AROUND: dict[str, tuple[str, ...]] = {
    "counter of a global object": (
        "",
        "{n}.k += 1\nx = x * {n}.k",
        "class Counts:\n    k = 0\n\n{n} = Counts()",
    ),
    "counter of a class": ("", "Of_{n}.k += 1\nx = x * Of_{n}.k", "class Of_{n}:\n    k = 0"),
    "counter of its own class": (
        "",
        "type(self).{n} = getattr(type(self), '{n}', 0) + 1\nx = x * type(self).{n}",
    ),
    "counter in a global dict": ("", '{n}["a"] += 1\nx = x * {n}["a"]', '{n} = {{"a": 0}}'),
    "global list": ("", "{n}.append(1)\nx = x * len({n})", "{n} = []"),
    "global list of objects": ("", "{n}.append(abs)\nx = x * len({n})", "{n} = [abs]"),
    "counter by global": (
        "",
        "x = x * add_{n}()",
        "{n} = 0\n\ndef add_{n}():\n    global {n}\n    {n} += 1\n    return {n}",
    ),
    "counter by nonlocal": (
        "",
        "x = x * next_{n}()",
        _COUNTING + "next_{n} = counting()",
    ),
    "counter of a function": (
        "",
        "count_{n}.k += 1\nx = x * count_{n}.k",
        "def count_{n}():\n    pass\n\ncount_{n}.k = 0",
    ),
    "list as a default": (
        "",
        "x = x * longer_{n}()",
        "def longer_{n}(seen=[]):\n    seen.append(1)\n    return len(seen)",
    ),
    "global iterator": ("", "x = x * next({n})", "{n} = itertools.count(1)"),
    "global random": ("", "x = x * {n}.random()", "{n} = random.Random(0)"),
    "random of Python": ("", "x = x * (random.random() + 1)"),
    "random of NumPy": ("", "x = x * float(np.random.rand())"),
    "context variable": (
        "",
        "{n}.set({n}.get() + 1)\nx = x * {n}.get()",
        '{n} = contextvars.ContextVar("{n}", default=0)',
    ),
    "counter in the environment": (
        "",
        'k = int(os.environ.get("STATE_{n}", 0)) + 1\nos.environ["STATE_{n}"] = str(k)\nx = x * k',
    ),
    "cached function": (
        "",
        "x = x * kept_{n}(x.shape[0])",
        "@functools.lru_cache\ndef kept_{n}(size):\n    return size + 0.5",
    ),
    "counter of a config": (
        "self.{n} = types.SimpleNamespace(k=0)",
        "self.{n}.k += 1\nx = x * self.{n}.k",
    ),
}
"""What a call leaves behind outside of the model: in ``__init__``, in ``forward``, and before the class."""


def add_state(s: Scope) -> None:
    """Something that a call leaves behind for the next."""
    write_state(s, s.choices.feature("state", list(STATES)))


def write_state(s: Scope, state: str) -> None:
    """Adds something that a call leaves behind.

    Args:
        s: The class.
        state: A key of :data:`STATES` or :data:`AROUND`.
    """
    init, text, *before = {**STATES, **AROUND}[state]
    values = {"n": s.fresh("n")}
    s.source.before("class Config:\n    pass")
    if "count(" in text:
        s.source.before("def count(value):\n    return value + 1")
    for one in before:
        s.source.before(one.format(**values))
    s.init += init.format(**values).splitlines()
    s.source.stateful = True
    s.add(*text.format(**values).splitlines())
