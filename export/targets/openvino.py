"""``target="openvino"``: an IR for OpenVINO, ``openvino_model.xml`` and ``openvino_model.bin``.

Factors are inputs of the IR, not states. The CPU plugin of OpenVINO 2026.4 treats a state in a product as a
constant: it silently keeps the first value. With inputs, products and convolutions are right.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lora_fx.errors import ExportError
from lora_fx.export.staging import Staging, write_errors
from lora_fx.export.targets.programs import ProgramSession, ProgramTarget, TracedProgram
from lora_fx.extras import load_optional

__all__ = ["OpenVinoTarget"]


def _openvino() -> Any:
    return load_optional("openvino", "target='openvino'", "lora-fx[openvino]", error=ExportError)


def _converted(program: ExportedProgram) -> Any:
    """Convert a program to a model of OpenVINO.

    ``openvino.convert_model`` calls the same front end, but sends telemetry about each call.
    """
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    front_end = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchFXPythonDecoder.from_exported_program(program)
    model = front_end.convert(front_end.load(decoder))
    apply_moc_transformations(model, cf=False, smart_reshape=True)
    return model


class OpenVinoTarget(ProgramTarget):
    """Target for OpenVINO."""

    name = "openvino"
    runtime = "OpenVINO"
    package = "openvino"
    model = "openvino_model.xml"
    dynamic = True

    def check(self, *, task: str | None, adapters: str | None, dtype: str | None) -> None:
        """Raise for options that OpenVINO does not support, or if its package is missing."""
        super().check(task=task, adapters=adapters, dtype=dtype)
        _openvino()

    def data_name(self, file: Path) -> str | None:
        """Return ``openvino_model.bin``."""
        return f"{file.stem}.bin"

    def write(self, program: TracedProgram, stage: Staging) -> None:
        """Convert a program, and name its inputs and outputs."""
        self.refuse_quantized(program)
        openvino = _openvino()
        try:
            model = _converted(program.trace.program)
        except Exception as error:
            raise self.refusal(error) from error
        names = program.trace.input_names, program.outputs
        for ports, port_names in zip((model.inputs, model.outputs), names, strict=True):
            for port, name in zip(ports, port_names, strict=True):
                port.get_tensor().set_names({name})
        rows = zip(model.get_parameters(), names[0], program.trace.labels(), strict=True)
        for parameter, name, labels in rows:
            parameter.set_friendly_name(name)
            # Without fixed sizes, a convolution does not take factors.
            sizes = [size if isinstance(size, int) else -1 for size in labels]
            parameter.set_partial_shape(openvino.PartialShape(sizes))
        model.validate_nodes_and_infer_types()
        for key, value in program.metadata().items():
            model.set_rt_info(value, ["lora_fx", key.removeprefix("lora_fx.")])
        with write_errors(stage.target):
            openvino.save_model(model, str(stage.model), compress_to_fp16=False)

    def start(self, program: TracedProgram, file: Path) -> ProgramSession:
        """Compile the IR for the CPU."""
        return _Session(program, file)

    def write_adapter(self, stem: Path, values: Mapping[str, Tensor]) -> Path:
        """Write ``NAME.safetensors``, whose tensors have the names of the inputs."""
        from safetensors.torch import save_file

        path = stem.with_name(f"{stem.name}.safetensors")
        save_file(dict(values), path)
        return path


class _Session(ProgramSession):
    def __init__(self, program: TracedProgram, file: Path) -> None:
        super().__init__(program)
        openvino = _openvino()
        self.provider = f"OpenVINO {openvino.__version__.partition('-')[0]}, CPU"
        # Otherwise OpenVINO may compute in bf16 on servers, which is faster but not exact.
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        self._request = (
            openvino.Core().compile_model(str(file), "CPU", exact).create_infer_request()
        )

    def call(self, tensors: list[Tensor]) -> list[Tensor]:
        results = self._request.infer([tensor.cpu().numpy() for tensor in tensors])
        return [torch.from_numpy(value.copy()) for value in results.values()]
