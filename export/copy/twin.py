"""A model to export in place of the caller's: same weights, own modules, in eval mode.

Export switches modes, turns caches off and changes dtypes. All of it happens on a copy of the
module structure that shares the parameters, so that the argument is untouched also after an error.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_fx.errors import CaptureError, ExportError
from lora_fx.export.copy.quantized_weight import StandIn, hold_quantized
from lora_fx.formats import quantization_of
from lora_fx.passes.graph import share_copy
from lora_fx.passes.merge import KEPT_IN_FP32
from lora_fx.runtime import AdapterModule

__all__ = [
    "DTYPES",
    "Casts",
    "dtype_name",
    "exportable_twin",
    "unwrapped",
]


class Casts:
    """Casts parameters; those over the same memory become one parameter.

    So tied weights stay tied, and copies of one model that share its weights share the cast ones, too.

    Args:
        keep: Takes each tensor that is made, see ``Scratch.keep``.
    """

    def __init__(self, keep: Callable[[Tensor], Tensor]) -> None:
        self.keep = keep
        # The source is held so that no other tensor comes to lie at its address.
        self._made: dict[Hashable, tuple[Tensor, nn.Parameter]] = {}

    def __call__(self, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        """A frozen parameter of ``dtype`` with the values of ``parameter``."""
        key = (_memory(parameter), dtype)
        if key not in self._made:
            cast = nn.Parameter(self.keep(parameter.detach().to(dtype)), requires_grad=False)
            self._made[key] = parameter, cast
        return self._made[key][1]


def _memory(tensor: Tensor) -> Hashable:
    # A subclass (a quantized weight) or an empty tensor may have no address.
    if type(tensor) is not nn.Parameter or tensor.data_ptr() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_CASTABLE = (*DTYPES.values(), torch.float64)


def exportable_twin(
    model: nn.Module, dtype: str | None, casts: Casts, *, to_rewrite: bool = False
) -> nn.Module:
    """Copy the modules of ``model``, share its parameters, and make the copy fit for export.

    Args:
        model: Any module.
        dtype: One of ``DTYPES`` to cast to (only then are parameters copied), None to keep.
        casts: Makes the parameters that are cast.
        to_rewrite: Whether quantized weights stay what their libraries make, which a rewrite knows.

    Returns:
        The copy, in eval mode, without key-value caches, mixtures of experts as grouped
        products.

    Raises:
        ExportError: The weights are on the meta device or on several, or a module holds
            something that cannot be copied.
    """
    _check_devices(model)
    target = None if dtype is None else DTYPES[dtype]
    try:
        twin = share_copy(model)
    except CaptureError as error:
        raise ExportError(str(error)) from error
    twin.eval()
    _compute_parametrized(twin)
    if not to_rewrite:
        hold_quantized(twin)
    if target is not None:
        _cast_parameters(twin, target, casts)
        _cast_buffers(twin, target)
    for module in twin.modules():
        config = vars(module).get("config")
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]
        if getattr(config, "_experts_implementation", None) is not None:
            # The others loop over what the input chose, or copy a matrix for each row.
            config._experts_implementation = "grouped_mm"  # type: ignore[union-attr]
    return twin


def dtype_name(model: nn.Module) -> str:
    """What most weights are in: a key of ``DTYPES``, or torch's name ("int8").

    Adapters do not count, nor do weights whose values are made when they are needed: these follow the others.
    """
    counts: dict[torch.dtype, int] = {}
    for parameter in _plain_parameters(model):
        counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    most = max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
    names = {dtype: name for name, dtype in DTYPES.items()}
    return names.get(most, str(most).removeprefix("torch."))


def _plain_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, AdapterModule):
            continue
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen or quantization_of(parameter) is not None:
                continue
            seen.add(id(parameter))
            yield parameter


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what ``torch.compile`` and DDP wrap around it."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def _check_devices(model: nn.Module) -> None:
    devices: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        devices.setdefault(parameter.device, name)
    for device, name in devices.items():
        if device.type == "meta":
            raise ExportError(
                f"'{name}' is on the meta device and has no values: load the weights first"
            )
    if len(devices) > 1:
        where = ", ".join(f"'{name}' on {device}" for device, name in devices.items())
        raise ExportError(f"the model is on several devices ({where}): move it to one first")


def _compute_parametrized(twin: nn.Module) -> None:
    """Make constants of weights that are computed from others (``torch.nn.utils.parametrize``)."""
    for module in twin.modules():
        if not parametrize.is_parametrized(module):
            continue
        # Not remove_parametrizations: it writes into the originals and edits the class, and both are the
        # caller's. Graphs of ours call what computes the weight, as the class does.
        computed: Any = module.parametrizations
        for name in list(computed):
            with torch.no_grad():
                computed[name] = _Computed(getattr(module, name).detach().clone())


class _Computed(nn.Module):
    """A weight in the place of what computes it."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value, requires_grad=False)

    def forward(self) -> torch.Tensor:
        return self.value


def _cast_parameters(twin: nn.Module, target: torch.dtype, casts: Casts) -> None:
    for module in twin.modules():
        if isinstance(module, StandIn):
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.dtype not in _CASTABLE or parameter.dtype == target:
                continue
            module._parameters[name] = casts(parameter, target)


def _cast_buffers(twin: nn.Module, target: torch.dtype) -> None:
    for module in twin.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or buffer.dtype not in _CASTABLE:
                continue
            kept = name in KEPT_IN_FP32
            module._buffers[name] = buffer.to(torch.float32 if kept else target)
