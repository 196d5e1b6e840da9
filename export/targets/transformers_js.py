"""``target="transformers.js"``: the folder that transformers.js loads in a browser or in Node.

``onnx/model.onnx`` (``onnx/model_fp16.onnx``), its weights in ``model.onnx_data``, ``config.json`` and the
tokenizer. transformers.js requires the axis name ``batch_size``, and fp32 inputs and outputs.
Source: transformers.js 4, ``src/models/session.js``, ``src/configs.js`` and ``src/models/modeling_utils.js``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from lora_fx.errors import ExportError
from lora_fx.export.copy import unwrapped
from lora_fx.export.ort import AXES_KEY
from lora_fx.export.targets.base import TaskName, Written, add_tokenizer, write_json
from lora_fx.passes.graph import original_class

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["TransformersJsTarget"]

_AXES: Final = {
    "batch": "batch_size",
    "sequence": "sequence_length",
    "past_length": "past_sequence_length",
    "total_length": "total_sequence_length",
}
_SUFFIXES: Final = {"fp16": "_fp16"}


class TransformersJsTarget:
    """Target for transformers.js."""

    name = "transformers.js"
    axes = _AXES

    def task(self, model: nn.Module) -> TaskName | None:
        """Return the task of a model that generates, whose cache ``generate`` of transformers.js needs."""
        decodes: Any = getattr(model, "can_generate", None)
        if decodes is None or not decodes():
            return None
        two = getattr(model.config, "is_encoder_decoder", False)
        return "text2text-generation" if two else "text-generation"

    def check(self, *, task: str | None, adapters: str | None, dtype: str | None) -> None:
        """Raise for tasks, adapters and dtypes that transformers.js does not support."""
        if task == "text2text-generation":
            raise ExportError(
                "target='transformers.js' writes single models: an encoder-decoder has two files of other "
                "names there. Export it without target="
            )
        if adapters in ("inputs", "bank"):
            raise ExportError(
                "transformers.js feeds no adapters to a file: give adapters='merge', and one folder each"
            )
        if dtype == "bf16":
            raise ExportError("transformers.js has no bf16: give dtype='fp16' or 'fp32'")

    def file(self, folder: Path, dtype: str | None) -> Path:
        """Return the path of ``onnx/model.onnx``, with a suffix for the dtype."""
        return folder / "onnx" / f"model{_SUFFIXES.get(dtype or '', '')}.onnx"

    def data_name(self, file: Path) -> str | None:
        """Return the name of the model file with ``_data`` appended."""
        return f"{file.name}_data"

    def example(self, example: object) -> object:
        """Return the example unchanged."""
        return example

    def adapt(self, model: ir.Model) -> None:
        """Rename the axes, and cast inputs and outputs to fp32."""
        _rename_axes(model)
        _as_fp32(model)

    def finish(self, written: Written) -> Mapping[Path, str]:
        """Write ``config.json``, ``generation_config.json`` and the tokenizer."""
        config: Any = getattr(written.model, "config", None)
        if not hasattr(config, "to_json_string"):
            raise ExportError(
                "transformers.js reads config.json, and this model has no config: it is for models of "
                "transformers. Export it without target="
            )
        self.check(task=None, adapters=None, dtype=written.report.dtype)
        external = _has_external(written.file)
        values = json.loads(config.to_json_string(use_diff=False))
        if not values.get("architectures"):
            values["architectures"] = [original_class(unwrapped(written.model)).__name__]
        elsewhere = _external_files(written.root / "config.json")
        if external or elsewhere:
            named = values.setdefault("transformers.js_config", {})
            named["use_external_data_format"] = {**elsewhere, written.file.name: external}
        paths = {write_json(written.folder / "config.json", values): "config.json"}
        generation: Any = getattr(written.model, "generation_config", None)
        if generation is not None:
            path = written.folder / "generation_config.json"
            generation.to_json_file(path)
            paths[path] = path.name
        return paths | add_tokenizer(written.tokenizer, written.folder / "tokenizer")


def _external_files(path: Path) -> dict[str, bool]:
    """Read from an existing config which model files of the folder have external weights."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["transformers.js_config"]
        flags = settings["use_external_data_format"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return {str(k): bool(v) for k, v in flags.items()} if isinstance(flags, dict) else {}


def _has_external(path: Path) -> bool:
    """Return True if the weights of a file are in another file."""
    import onnx_ir as ir

    initializers = ir.load(path).graph.initializers.values()
    return any(isinstance(value.const_value, ir.ExternalTensor) for value in initializers)


def _rename_axes(model: ir.Model) -> None:
    """Rename the axes for transformers.js, and store lora_fx's names in the metadata."""
    import onnx_ir as ir

    known = re.compile(rf"\b({'|'.join(_AXES)})\b")
    inside = [value for node in model.graph.all_nodes() for value in node.outputs]
    for value in (*model.graph.inputs, *inside):
        if value.shape is not None:
            sizes = [
                known.sub(lambda match: _AXES[match[0]], dim.value)
                if isinstance(dim, ir.SymbolicDim) and dim.value
                else dim
                for dim in value.shape
            ]
            value.shape = ir.Shape(sizes)
    model.metadata_props[AXES_KEY] = json.dumps({theirs: own for own, theirs in _AXES.items()})


def _as_fp32(model: ir.Model) -> None:
    """Cast the inputs and outputs of a file in fp16 to fp32. The casts keep every value of fp16 exactly."""
    import onnx_ir as ir

    half = ir.DataType.FLOAT16
    graph = model.graph
    for value in list(graph.inputs):
        if value.dtype != half:
            continue
        inside = ir.node("Cast", [value], {"to": half.value})
        cast = inside.outputs[0]
        cast.name, cast.dtype, cast.shape = f"{value.name}.fp16", half, value.shape
        for user, index in list(value.uses()):
            if user is not inside:
                user.replace_input_with(index, cast)
        graph.insert_before(graph[0], inside)
        value.dtype = ir.DataType.FLOAT
    for index, value in enumerate(list(graph.outputs)):
        if value.dtype != half:
            continue
        name = value.name
        value.name = f"{name}.fp16"
        outside = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value})
        cast = outside.outputs[0]
        cast.name, cast.dtype, cast.shape = name, ir.DataType.FLOAT, value.shape
        graph.append(outside)
        graph.outputs[index] = cast
