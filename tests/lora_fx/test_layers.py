"""Who may import whom, what an import costs, and what is public: read from the source tree."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import lora_fx

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "lora_fx": "lora_fx",
    "lora_fx.passes": "passes",
    "lora_fx.export": "export",
    "lora_fx.tools": "tools",
}
LAYERS = (
    "lora_fx.errors",
    "lora_fx.files",
    "lora_fx.config.starts",
    "lora_fx.config.fields",
    "lora_fx.config.foreign",
    "lora_fx.config.lora_config",
    "lora_fx.config.lora_config",
    "lora_fx.ir.values",
    "lora_fx.formats.weights",
    "lora_fx.formats.weights",
    "lora_fx.formats.repack",
    "lora_fx.formats.made",
    "lora_fx.formats.made",
    "lora_fx.ir.values",
    "lora_fx.ir.record",
    "lora_fx.ir.record",
    "lora_fx.runtime.ops",
    "lora_fx.runtime.decorators",
    "lora_fx.runtime.call_sizes",
    "lora_fx.runtime.watch",
    "lora_fx.runtime.attention",
    "lora_fx.runtime.windows",
    "lora_fx.runtime.experts",
    "lora_fx.runtime.row_rules",
    "lora_fx.runtime.row_tracking",
    "lora_fx.runtime.samples",
    "lora_fx.runtime.masks",
    "lora_fx.runtime.dora",
    "lora_fx.runtime.samples",
    "lora_fx.runtime.dora",
    "lora_fx.runtime.dora",
    "lora_fx.runtime.fused_lora",
    "lora_fx.runtime.fused_lora",
    "lora_fx.runtime.fused_lora",
    "lora_fx.runtime.fused_quantized",
    "lora_fx.runtime.fused_dora",
    "lora_fx.passes",
    "lora_fx.passes.parameters.rewritten",
    "lora_fx.passes.oracle",
    "lora_fx.passes.pipeline",
    "lora_fx.files",
    "lora_fx.quantize",
    "lora_fx.adapters.optim",
    "lora_fx.adapters.quantized_base",
    "lora_fx.status",
    "lora_fx.adapters.switching",
    "lora_fx.adapters.manage",
    "lora_fx.adapters.initialization",
    "lora_fx.checkpoint.files",
    "lora_fx.checkpoint.forms",
    "lora_fx.checkpoint.forms",
    "lora_fx.adapters.settings",
    "lora_fx.checkpoint.keys",
    "lora_fx.checkpoint.grouped",
    "lora_fx.checkpoint.base_weights",
    "lora_fx.checkpoint.joined",
    "lora_fx.adapters.settings",
    "lora_fx.checkpoint.joined",
    "lora_fx.checkpoint.starts",
    "lora_fx.adapters.statistics",
    "lora_fx.adapters.statistics",
    "lora_fx.adapters.eva",
    "lora_fx.initialize",
    "lora_fx.adapters.loftq",
    "lora_fx.checkpoint.state",
    "lora_fx.checkpoint.state",
    "lora_fx.checkpoint.vllm",
    "lora_fx.checkpoint.state",
    "lora_fx.checkpoint.folder",
    "lora_fx.checkpoint.hotswap",
    "lora_fx.adapters.weighted",
    "lora_fx.adapters.weighted",
    "lora_fx.export",
    "lora_fx.api",
    "lora_fx.api",
    "lora_fx.tools",
)
# The other layers are one module each.
FOLDER_LAYERS = ("lora_fx.passes", "lora_fx.export", "lora_fx.tools")
# Passes do not import each other; these, and helpers like passes/graph/nodes.py, are what they share.
SHARED_BY_PASSES = ("lora_fx.passes.patterns.registry", "lora_fx.config.selection")
# Optional packages and the one layer that may import them.
CONFINED = {
    "onnx": "lora_fx.export",
    "onnx_ir": "lora_fx.export",
    "onnxruntime": "lora_fx.export",
    "onnxscript": "lora_fx.export",
    "rich": "lora_fx.tools",
    "typer": "lora_fx.tools",
}
LOADED_WHEN_NEEDED = (
    "bitsandbytes",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "peft",
    "rich",
    "timm",
    "torchao",
    "torchvision",
    "transformers",
    "typer",
)
PUBLIC = {
    "status",
    "hotswap_adapter",
    "prepare_for_kbit_training",
    "prepare_hotswap",
    "active_adapters",
    "adapter_ids",
    "adapter_names",
    "adapter_state_dict",
    "add_adapter",
    "add_weighted_adapter",
    "delete_adapter",
    "disable_adapter",
    "set_adapter",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "ExportError",
    "LoraConfig",
    "LoraFxError",
    "MergeError",
    "NoMatchError",
    "OnnxSession",
    "OutputPathError",
    "ParityError",
    "PartialMatchError",
    "ProviderError",
    "QuantizationError",
    "__version__",
    "CheckReport",
    "capture",
    "check",
    "correct_gradients",
    "export_onnx",
    "graphs",
    "initialize",
    "load_adapter",
    "load_adapter_state_dict",
    "merge",
    "parameter_groups",
    "plan",
    "plan_quantization",
    "print_trainable_parameters",
    "quantize",
    "register_pattern",
    "replace_lora_weights_loftq",
    "rewrite",
    "save_adapter",
    "save_onnx_adapter",
    "trainable_parameters",
    "visualize",
}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    deferred: bool  # inside a function or under TYPE_CHECKING: not run by importing the module


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def layer(self) -> str | None:
        return next((layer for layer in LAYERS if within(self.name, layer)), None)

    def imports(self) -> Iterator[Import]:
        yield from self._imports(self.tree, deferred=False)

    def _imports(self, node: ast.AST, *, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            deferred = True
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, deferred)
        elif isinstance(node, ast.ImportFrom):
            origin = self._origin(node)
            for alias in node.names:
                # `from package import module` imports the module.
                member = f"{origin}.{alias.name}"
                yield Import(member if member in NAMES else origin, node.lineno, deferred)
        for child in ast.iter_child_nodes(node):
            yield from self._imports(child, deferred=deferred)

    def _origin(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        base = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*base, *([node.module] if node.module else [])])

    def bound(self) -> dict[str, bool]:
        """Names bound at the top level, and whether they are made here, not imported."""
        names: dict[str, bool] = {}
        for node in self._top_level(self.tree):
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    names[node.name] = True
                case ast.Assign():
                    targets = [n for t in node.targets for n in ast.walk(t)]
                    names |= {
                        n.id: True
                        for n in targets
                        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
                    }
                case ast.AnnAssign(target=ast.Name(id=name)):
                    names[name] = True
                case ast.Import() | ast.ImportFrom():
                    names |= {(a.asname or a.name).split(".")[0]: False for a in node.names}
        return names

    def _top_level(self, node: ast.AST) -> Iterator[ast.stmt]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If | ast.Try):
                yield from self._top_level(child)
            elif isinstance(child, ast.stmt):
                yield child

    def declared(self) -> list[str] | None:
        """The literal value of ``__all__``."""
        for node in self.tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                    return list(ast.literal_eval(value))
                case ast.AnnAssign(target=ast.Name(id="__all__"), value=ast.expr() as value):
                    return list(ast.literal_eval(value))
        return None


def read_modules() -> dict[str, Module]:
    modules = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])
            modules[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8")))
    return modules


NAMES: set[str] = set()
MODULES = read_modules()
NAMES.update(MODULES)


def problem(module: Module, imported: Import) -> str | None:
    """Why this import is against the rules, or None."""
    target = imported.target
    root = target.partition(".")[0]
    if root in FOLDERS.values() and root != "lora_fx":
        return f"import it as lora_fx.{target}"
    if root in CONFINED and not within(module.name, CONFINED[root]):
        return f"only {CONFINED[root]} may import {root}"
    if root != "lora_fx":
        return None
    if module.name == "lora_fx":
        # The verbs that live in the tools are handed on when they are first asked for.
        if within(target, "lora_fx.tools") and not imported.deferred:
            return "importing lora_fx must not load the tools"
        return None
    mine, theirs = module.layer, next((layer for layer in LAYERS if within(target, layer)), None)
    if theirs is None:
        return f"{target} is in no layer: import from the module that defines the name"
    if mine is None or mine == theirs:
        return sideways(module, target)
    if LAYERS.index(theirs) > LAYERS.index(mine):
        return f"{mine} lies below {theirs}"
    return None


def sideways(module: Module, target: str) -> str | None:
    """Why this import within one layer is against the rules, or None."""
    if module.layer is None:
        return f"{module.name} is in no layer: add it to LAYERS and to docs/architecture.md"
    if module.layer not in FOLDER_LAYERS:
        return f"{module.name} imports itself"
    if module.layer != "lora_fx.passes" or within(target, module.name):
        return None
    if any(within(target, shared) for shared in SHARED_BY_PASSES):
        return None
    if target.startswith("lora_fx.passes._"):
        return None
    if within(target, "lora_fx.passes.capture") and within(module.name, "lora_fx.passes.capture"):
        return None
    return "passes do not import each other: what two of them need goes into a passes/_helper.py"


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_imports_go_downward(module: Module) -> None:
    found = [
        f"{module.path.relative_to(ROOT)}:{imported.line}: {imported.target}: {reason}"
        for imported in module.imports()
        if (reason := problem(module, imported))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("lora_fx.errors", "import lora_fx.config.lora_config", "lies below"),
        ("lora_fx.ir.values", "from lora_fx.passes import match", "lies below"),
        ("lora_fx.runtime.ops", "def f():\n    from lora_fx.api import plan", "lies below"),
        ("lora_fx.api", "from lora_fx.tools.cli.entry import main", "lies below"),
        (
            "lora_fx.passes.match.find_operations",
            "from lora_fx.passes.merge.merging import x",
            "each other",
        ),
        ("lora_fx.passes.graph.nodes", "import lora_fx.passes.match.find_operations", "each other"),
        ("lora_fx.config.selection", "import lora_fx.passes.match.find_operations", "each other"),
        ("lora_fx.passes.match.find_operations", "from lora_fx import LoraConfig", "in no layer"),
        ("lora_fx.passes.match.find_operations", "from passes import _fx", "import it as"),
        ("lora_fx.passes.match.find_operations", "import onnx.helper", "only lora_fx.export"),
        ("lora_fx", "from lora_fx.tools.draw.drawing import visualize", "must not load"),
        (
            "lora_fx.passes.match.find_operations",
            "from lora_fx.passes.graph.nodes import users",
            None,
        ),
        (
            "lora_fx.passes.match.find_operations",
            "from lora_fx.passes.patterns.linear import x",
            None,
        ),
        ("lora_fx.passes.capture.exported", "import lora_fx.passes.capture.symbolic", None),
        ("lora_fx.export.session.onnx_session", "import onnxruntime", None),
        ("lora_fx", "def f():\n    from lora_fx.tools.draw.drawing import visualize", None),
    ],
)
def test_the_rule_itself(name: str, source: str, reason: str | None) -> None:
    module = Module(name, ROOT / "x.py", ast.parse(source))
    (imported,) = module.imports()
    found = problem(module, imported)
    assert found is None if reason is None else found is not None and reason in found


def test_import_loads_no_optional_package(tmp_path: Path) -> None:
    code = f"import sys, lora_fx; print(*sorted(set({LOADED_WHEN_NEEDED!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split()


@pytest.mark.parametrize(
    "module",
    [module for name, module in MODULES.items() if not name.rpartition(".")[2].startswith("_")],
    ids=lambda module: module.name,
)
def test_all_is_the_public_namespace(module: Module) -> None:
    bound = module.bound()
    made_here = {name for name, here in bound.items() if here and not name.startswith("_")}
    declared = module.declared()
    if declared is None:
        assert not made_here, f"{module.name} has no __all__"
        return
    assert len(declared) == len(set(declared))
    if "__getattr__" not in bound:
        assert set(declared) <= set(bound), "__all__ names what is not there"
    # A CLI command is a function that nobody imports.
    if module.layer != "lora_fx.tools":
        assert made_here <= set(declared), "public by name, but not in __all__"


def test_the_public_names() -> None:
    assert set(lora_fx.__all__) == PUBLIC
    assert len(lora_fx.__all__) == len(PUBLIC)
    for name in lora_fx.__all__:
        assert getattr(lora_fx, name) is not None
    # What `from __future__ import annotations` leaves behind is the language's, not ours.
    strays = {
        name
        for name, value in vars(lora_fx).items()
        if not name.startswith("_") and name != "annotations" and not isinstance(value, ModuleType)
    }
    assert strays <= PUBLIC


def test_the_version_is_the_projects() -> None:
    assert lora_fx.__version__ == project()["project"]["version"]


def test_every_package_is_listed() -> None:
    listed = project()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(name for name, module in MODULES.items() if module.is_package)


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {module.path.parent for module in MODULES.values()}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
