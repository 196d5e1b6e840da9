"""Inputs that need not be given: each is an initializer as well, whose value stands for no adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora_fx.export.adapters.manifest import MANIFEST_KEY, Manifest

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["make_overridable"]


def make_overridable(model: ir.Model, manifest: Manifest) -> None:
    """Give every adapter input a default, so that the file alone is the base model.

    The default is zeros of rank 1 (a gain of 1), see :attr:`SiteInputs.least_rank`: a product with them is
    zero and costs next to nothing. Only these inputs are initializers: what is both is no constant to an
    optimizer, and the weights have to stay that.

    Args:
        model: Changed in place. Its inputs have the names of the manifest.
        manifest: The adapter inputs.
    """
    import onnx_ir as ir

    inputs = {value.name: value for value in model.graph.inputs}
    for site in manifest.sites:
        for one in site.inputs():
            value = inputs[one.name]
            dtype = value.dtype
            assert dtype is not None
            neutral = np.full(one.sized(site.least_rank), one.neutral, dtype.numpy())
            value.const_value = ir.tensor(neutral, dtype=dtype, name=one.name)
            model.graph.register_initializer(value)
            _feed_as_stored(value)
    model.metadata_props[MANIFEST_KEY] = manifest.to_json()


def _feed_as_stored(value: ir.Value) -> None:
    """Let a Gemm read a factor as it is given, where it read the transpose of its transpose."""
    for node, _ in list(value.uses()):
        if node.op_type != "Transpose" or list(node.attributes.get_ints("perm", (1, 0))) != [1, 0]:
            continue
        for gemm, place in list(node.outputs[0].uses()):
            if gemm.op_type == "Gemm" and place < 2:
                flag = ("transA", "transB")[place]
                gemm.attributes.add(_flag(flag, 1 - gemm.attributes.get_int(flag, 0)))
                gemm.replace_input_with(place, value)
        if not list(node.outputs[0].uses()) and not node.outputs[0].is_graph_output():
            node.graph.remove(node, safe=True)


def _flag(name: str, value: int) -> ir.Attr:
    import onnx_ir as ir

    return ir.AttrInt64(name, value)
