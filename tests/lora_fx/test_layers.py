"""Who may import whom, what an import costs, and what is public: read from the source tree."""

from __future__ import annotations

import ast
import importlib.util
import os
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
# Packages, each of which imports from those above it alone. A module that lies directly in a folder
# counts as a package of its own.
LAYERS = (
    "lora_fx.errors",
    "lora_fx.garbage",
    "lora_fx.versions",
    "lora_fx.torch_private",
    "lora_fx.digests",
    "lora_fx.extras",
    "lora_fx.progress",
    "lora_fx.files",
    "lora_fx.adapter_files",
    "lora_fx.converted_files",
    "lora_fx.gguf_files",
    "lora_fx.servers",
    "lora_fx.config",
    "lora_fx.ir",
    "lora_fx.formats",
    "lora_fx.runtime.modules",
    "lora_fx.runtime.kernels",
    "lora_fx.runtime.rows",
    "lora_fx.runtime.loss",
    "lora_fx.runtime.memory",
    "lora_fx.runtime",
    "lora_fx.kinds",
    "lora_fx.passes.graph",
    "lora_fx.passes.patterns",
    "lora_fx.passes.parameters",
    "lora_fx.passes.capture",
    "lora_fx.passes.match",
    "lora_fx.passes.plan",
    "lora_fx.passes.lowrank",
    "lora_fx.passes.insert",
    "lora_fx.passes.optimize",
    "lora_fx.passes.effective",
    "lora_fx.passes.trainers",
    "lora_fx.passes.merge",
    "lora_fx.passes.quantize",
    "lora_fx.passes.oracle",
    "lora_fx.passes.pipeline",
    "lora_fx.passes.kept",
    "lora_fx.adapters",
    "lora_fx.methods",
    "lora_fx.checkpoint",
    "lora_fx.extraction",
    "lora_fx.export.report",
    "lora_fx.export.arguments",
    "lora_fx.export.failures",
    "lora_fx.export.trace",
    "lora_fx.export.decoder_cache",
    "lora_fx.export.tasks",
    "lora_fx.export.providers",
    "lora_fx.export.ort",
    "lora_fx.export.deferred",
    "lora_fx.export.staging",
    "lora_fx.export.copy",
    "lora_fx.export.mixtures",
    "lora_fx.export.adapter_manifest",
    "lora_fx.export.inspection",
    "lora_fx.export.factor_model",
    "lora_fx.export.adapter_file",
    "lora_fx.export.adapter_store",
    "lora_fx.export.adapter_bank",
    "lora_fx.export.prepare",
    "lora_fx.export.fuse",
    "lora_fx.export.convert",
    "lora_fx.export.decoder",
    "lora_fx.export.generation_settings",
    "lora_fx.export.generation",
    "lora_fx.export.session",
    "lora_fx.export.verify",
    "lora_fx.export.targets",
    "lora_fx.export.quantize",
    "lora_fx.export.onnx",
    "lora_fx.conversion",
    "lora_fx.folders",
    "lora_fx.delivery",
    "lora_fx.api",
    "lora_fx.peft",
    "lora_fx.axolotl",
    "lora_fx.tools.models",
    "lora_fx.tools.adapter_folder",
    "lora_fx.tools.convert_files",
    "lora_fx.tools.extract_files",
    "lora_fx.tools.merge_files",
    "lora_fx.tools.planned_weights",
    "lora_fx.tools.cluster",
    "lora_fx.tools.fit",
    "lora_fx.tools.draw",
    "lora_fx.tools.timeline",
    "lora_fx.tools.threads",
    "lora_fx.tools.demo",
    "lora_fx.tools.bench",
    "lora_fx.tools.zoo",
    "lora_fx.tools.cli",
    "lora_fx.__main__",
)
# Their modules are named things that nobody outside the tools imports. They are not in the wheel.
LISTS = ("lora_fx.tools.bench", "lora_fx.tools.zoo")
# Optional packages and the one layer that may import them.
CONFINED = {
    "onnx": "lora_fx.export",
    "onnx_ir": "lora_fx.export",
    "onnxruntime": "lora_fx.export",
    "onnxscript": "lora_fx.export",
    "rich": "lora_fx.tools",
    "triton": "lora_fx.runtime",
    "typer": "lora_fx.tools",
}
LOADED_WHEN_NEEDED = (
    "bitsandbytes",
    "gguf",
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
    "triton",
    "typer",
)
PUBLIC = {
    "compare",
    "convert_adapter",
    "inspect_adapter",
    "keep_quantized",
    "status",
    "as_peft_model",
    "hotswap_adapter",
    "prepare_for_kbit_training",
    "prepare_hotswap",
    "active_adapters",
    "adapter_ids",
    "adapter_losses",
    "train_together",
    "adapter_names",
    "adapter_penalty",
    "adapter_state_dict",
    "add_adapter",
    "add_weighted_adapter",
    "delete_adapter",
    "disable_adapter",
    "set_adapter",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "Delivery",
    "DeliveryError",
    "VllmServer",
    "sync",
    "sync_callback",
    "ExportError",
    "LogitsError",
    "LoraConfig",
    "LoraFxError",
    "MergeError",
    "NoMatchError",
    "OnnxSession",
    "OutputPathError",
    "ParityError",
    "PartialMatchError",
    "ProcessError",
    "ProviderError",
    "QuantizationError",
    "__version__",
    "CheckReport",
    "capture",
    "check",
    "correct_gradients",
    "export_onnx",
    "extract_adapter",
    "extract_files",
    "graphs",
    "initialize",
    "lightning_callback",
    "load_adapter",
    "load_adapter_state_dict",
    "merge",
    "merge_files",
    "parameter_groups",
    "plan",
    "plan_migration",
    "plan_quantization",
    "print_trainable_parameters",
    "quantize",
    "quantized_parameters",
    "reference",
    "register_format",
    "register_adapter_kind",
    "register_pattern",
    "replace_lora_weights_loftq",
    "resize_adapter",
    "rewrite",
    "save_adapter",
    "save_onnx_adapter",
    "trainable_parameters",
    "trainer_callback",
    "verify",
    "visualize",
}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    deferred: bool  # inside a function or under TYPE_CHECKING: not run by importing the module
    inside: bool = False  # names a module of a package, and not the package


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
                inside = origin in NAMES and not {origin, member} & set(LAYERS)
                yield Import(member if member in NAMES else origin, node.lineno, deferred, inside)
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
    if mine is None:
        return f"{module.name} is in no package of LAYERS: add it there and to docs/architecture.md"
    if theirs is None:
        return f"{target} is in no package: import from the package that defines the name"
    if mine == theirs:
        return f"{module.name} imports itself" if target == module.name else None
    if LAYERS.index(theirs) > LAYERS.index(mine):
        return f"{mine} lies below {theirs}"
    if imported.inside and theirs not in LISTS:
        return f"import from {theirs}, whose __init__ says what is public, and not from its modules"
    return None


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
        ("lora_fx.errors", "import lora_fx.config", "lies below"),
        ("lora_fx.ir.plan", "from lora_fx.passes.match import Match", "lies below"),
        (
            "lora_fx.runtime.kernels.branch",
            "def f():\n    from lora_fx.api import plan",
            "lies below",
        ),
        ("lora_fx.api", "from lora_fx.tools.cli import main", "lies below"),
        ("lora_fx.passes.match.marks", "from lora_fx.passes.merge import x", "lies below"),
        ("lora_fx.passes.match.marks", "from lora_fx import LoraConfig", "in no package"),
        ("lora_fx.passes.match.marks", "from passes import graph", "import it as"),
        ("lora_fx.passes.match.marks", "import onnx.helper", "only lora_fx.export"),
        (
            "lora_fx.passes.match.marks",
            "from lora_fx.passes.graph.nodes import users",
            "import from",
        ),
        ("lora_fx", "from lora_fx.tools.draw import visualize", "must not load"),
        ("lora_fx.passes.match.marks", "from lora_fx.passes.graph import users", None),
        ("lora_fx.passes.match.marks", "from lora_fx.passes.match.readers import x", None),
        ("lora_fx.export.session", "import onnxruntime", None),
        ("lora_fx", "def f():\n    from lora_fx.tools.draw import visualize", None),
    ],
)
def test_the_rule_itself(name: str, source: str, reason: str | None) -> None:
    module = Module(name, ROOT / "x.py", ast.parse(source))
    (imported,) = module.imports()
    found = problem(module, imported)
    assert found is None if reason is None else found is not None and reason in found


def printed(code: str, folder: Path, *given: str) -> str:
    """What a program prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *given],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_but_what_is_asked_for(tmp_path: Path) -> None:
    code = "import sys, lora_fx; lora_fx.LoraConfig; print('torch' in sys.modules)"
    assert printed(code, tmp_path) == "False"


def test_names_are_loaded_from_where_types_say_they_are() -> None:
    said = {
        name.name: node.module
        for node in ast.walk(MODULES["lora_fx"].tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_fx.")
        for name in node.names
    }
    assert said == lora_fx._HOME_OF


def test_modules_are_there_after_the_import_of_the_package(tmp_path: Path) -> None:
    code = "import lora_fx; print(lora_fx.passes.match.__name__, hasattr(lora_fx, 'nothing'))"
    assert printed(code, tmp_path) == "lora_fx.passes.match False"


# What a user's program has loaded after its first rewrite.
EVERYTHING = (
    "import lora_fx; lora_fx.rewrite, lora_fx.load_adapter, lora_fx.add_adapter, lora_fx.passes"
)


A_PLAN = """
import torch, lora_fx
lora_fx.plan(torch.nn.Sequential(torch.nn.Linear(2, 2)), lora_fx.LoraConfig(target_modules=["0"]))
"""


@pytest.mark.parametrize(
    "code",
    [
        EVERYTHING,
        A_PLAN,
        "import lora_fx; lora_fx.trainer_callback",
        "import lora_fx; lora_fx.sync, lora_fx.sync_callback, lora_fx.VllmServer",
        # PyTorch's own export looks for Triton.
        "import torch._dynamo, lora_fx.export.onnx, lora_fx.export.session, lora_fx.export.report",
    ],
    ids=["everything", "a plan", "a callback", "delivery", "export"],
)
def test_no_optional_package_is_loaded(code: str, tmp_path: Path) -> None:
    left_out = {"triton"} if "_dynamo" in code else set()
    found = f"sorted({set(LOADED_WHEN_NEEDED) - left_out!r} & set(sys.modules))"
    assert not printed(f"import sys\n{code}\nprint(*{found})", tmp_path)


ALONE = """
import importlib, os, sys
import networkx, numpy, safetensors, torch, torch.export

for name in sys.argv[1:]:
    if name in sys.modules:
        continue
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(name, error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_module_can_be_imported_first(tmp_path: Path) -> None:
    """Modules that import each other can be imported in one order alone."""
    pytest.importorskip("typer")
    pytest.importorskip("onnxruntime")
    # The script of another exporter runs where that is installed.
    names = [name for name in MODULES if not name.endswith("peer_script")]
    if importlib.util.find_spec("triton") is None:
        names.remove("lora_fx.runtime.kernels.triton_kernels")
    assert not printed(ALONE, tmp_path, *names)


def test_import_loads_no_compiler(tmp_path: Path) -> None:
    """Dynamo takes seconds to import, and whoever does not compile need not wait for it."""
    code = f"import sys, torch; before = set(sys.modules); {EVERYTHING}; print(*set(sys.modules) - before)"
    loaded = printed(code, tmp_path).split()
    assert "lora_fx" in loaded
    assert not [name for name in loaded if name.split(".")[:2] == ["torch", "_dynamo"]]


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
    if not within(module.name, "lora_fx.tools"):
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
    packages = {name for name, module in MODULES.items() if module.is_package}
    assert sorted(listed) == sorted(packages - {*LISTS})


def test_no_module_is_private() -> None:
    """What is private is what a package's __init__ does not export."""
    assert not [
        name
        for name in MODULES
        if name.rpartition(".")[2].startswith("_") and name != "lora_fx.__main__"
    ]


def test_every_package_is_a_layer() -> None:
    """A list that names what is not there would say nothing of it."""
    assert [layer for layer in LAYERS if layer not in MODULES] == []


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {module.path.parent for module in MODULES.values()}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
