"""Sessions that run an exported file."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from lora_fx.errors import ConfigError, ExportError, some
from lora_fx.export import ort
from lora_fx.export import providers as onnx_providers
from lora_fx.export.adapter_bank import AdapterBank
from lora_fx.export.adapter_file import values_of
from lora_fx.export.adapter_manifest import (
    AdapterInput,
    Manifest,
    ParameterInput,
    SiteInputs,
    TokenInputs,
)
from lora_fx.export.adapter_store import AdapterChoice, AdapterStore, HeldAdapter
from lora_fx.export.decoder_cache import ENCODER_KEY, TASK_KEY
from lora_fx.export.fuse import ONE_ROW_CHUNKS_KEY, Provider, check_attention
from lora_fx.export.generation import Generates
from lora_fx.export.inspection import read_defaults
from lora_fx.ir import is_base

__all__ = ["MAX_SHAPES", "OnnxSession", "StaticRunner", "filled_up"]

_log = logging.getLogger("lora_fx")


# Runs at fixed shapes and fixed addresses, which a CUDA graph needs.
#
# A captured graph replays its kernels on the same memory. So every input, output and factor has a buffer
# that never moves. A run copies its inputs into their buffers. A switch of adapters copies the factors,
# padded with zeros to the highest rank.

MAX_SHAPES = 16
"""Largest number of combinations of input shapes that get their own graph and buffers."""

_GRAPH_ID = "gpu_graph_id"
_NO_CAPTURE = "-1"


@dataclass(frozen=True)
class _Graph:
    """CUDA graph of one combination of input shapes: its buffers and its binding."""

    inputs: Mapping[str, Any]
    outputs: tuple[Any, ...]
    binding: Any
    options: Any


@dataclass(eq=False)
class StaticRunner:
    """Runner of a session with CUDA graphs, on fixed buffers and one run at a time.

    Args:
        runtime: The onnxruntime module.
        session: The session of ONNX Runtime.
        outputs: The outputs of the file.
        manifest: The adapter inputs; None for a file without adapters.
        max_rank: The rank that factors are padded to.
        device: Device of the session.
        path: The file.
    """

    runtime: Any
    session: Any
    outputs: Sequence[ort.Port]
    manifest: Manifest | None
    max_rank: int
    device: torch.device
    path: Path

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._graphs: dict[tuple[tuple[str, tuple[int, ...]], ...], _Graph] = {}
        self._loaded: HeldAdapter | None = None
        self._factors: dict[str, Any] = {}

    def run(
        self,
        feeds: Mapping[str, Any],
        adapter: HeldAdapter,
        device: torch.device,
    ) -> list[Any]:
        """Run the graph of these input shapes once. The first run of new shapes captures the graph.

        Args:
            feeds: Values for the inputs of the model.
            adapter: The adapter to run with.
            device: Device of the results.

        Returns:
            Values that own their memory, in the order of the outputs.

        Raises:
            ExportError: ONNX Runtime fails, or there are too many shapes.
        """
        with ort.run_errors(lambda: feeds, ", in a graph"), self._lock:
            self._switch(adapter)
            graph = self._graph(feeds)
            for name, value in feeds.items():
                ort.write(graph.inputs[name], ort.to_tensor(value))
            self.session.run_with_iobinding(graph.binding, graph.options)
            return [self._taken(value, device) for value in graph.outputs]

    def _switch(self, adapter: HeldAdapter) -> None:
        """Copy the factors of an adapter into the buffers, unless they already hold them."""
        if self._loaded is adapter:
            return
        self._loaded = None  # after an error, incomplete buffers are written again
        targets = self.manifest.targets if self.manifest else ()
        own = self.manifest.parameters if self.manifest else ()
        # Without an adapter, parameters have the base's values.
        lost = [parameter.name for parameter in own if parameter.name not in adapter.values]
        values = {**adapter.values, **(read_defaults(self.path, lost) if lost else {})}
        for site in targets:
            for input_ in site.inputs():
                value = filled_up(site, input_, values.get(input_.name), self.max_rank)
                if input_.name not in self._factors:
                    self._factors[input_.name] = self._buffer(value.shape, ort.element_of(value))
                ort.write(self._factors[input_.name], value)
        self._loaded = adapter

    def _graph(self, feeds: Mapping[str, Any]) -> _Graph:
        key = tuple((name, tuple(value.shape())) for name, value in sorted(feeds.items()))
        if key not in self._graphs:
            if len(self._graphs) >= MAX_SHAPES:
                raise ExportError(
                    f"a session with cuda_graph=True keeps buffers for {MAX_SHAPES} combinations of input "
                    "shapes, and this is one more: pad the inputs to a few sizes, or run it without"
                )
            self._graphs[key] = self._prepared(feeds, len(self._graphs) + 1)
        return self._graphs[key]

    def _prepared(self, feeds: Mapping[str, Any], number: int) -> _Graph:
        inputs = {
            name: self._buffer(value.shape(), value.element_type()) for name, value in feeds.items()
        }
        for name, value in feeds.items():
            ort.write(inputs[name], ort.to_tensor(value))
        # A first run tells the sizes of the outputs. It must not be captured, because their memory moves.
        binding = self._bound(inputs)
        for port in self.outputs:
            binding.bind_output(port.name, self.device.type, self.device.index)
        self.session.run_with_iobinding(binding, self._options(_NO_CAPTURE))
        outputs = tuple(
            self._buffer(value.shape(), value.element_type()) for value in binding.get_outputs()
        )
        binding = self._bound(inputs)
        for port, value in zip(self.outputs, outputs, strict=True):
            binding.bind_ortvalue_output(port.name, value)
        return _Graph(inputs, outputs, binding, self._options(str(number)))

    def _bound(self, inputs: Mapping[str, Any]) -> Any:
        binding = self.session.io_binding()
        for name, value in (*inputs.items(), *self._factors.items()):
            binding.bind_ortvalue_input(name, value)
        return binding

    def _options(self, graph: str) -> Any:
        options = self.runtime.RunOptions()
        options.add_run_config_entry(_GRAPH_ID, graph)
        return options

    def _buffer(self, shape: Sequence[int], element: Any) -> Any:
        return ort.allocate(self.runtime, shape, element, self.device)

    def _taken(self, buffer: Any, device: torch.device) -> Any:
        """Copy an output out of its buffer to ``device``, because the next run writes into the buffer."""
        taken = ort.allocate(self.runtime, buffer.shape(), buffer.element_type(), device)
        if self.device.type == "cpu" or torch.cuda.is_available():
            value = ort.to_tensor(buffer)
        else:
            value = torch.from_numpy(buffer.numpy())
        ort.write(taken, value if device.type != "cpu" else value.cpu())
        return taken


def filled_up(
    site: SiteInputs | ParameterInput | TokenInputs,
    entry: AdapterInput,
    value: Tensor | None,
    max_rank: int,
) -> Tensor:
    """Return a factor padded to the highest rank. The padding is zero, and so adds nothing.

    Args:
        site: The site of the factor, or the parameter.
        entry: The input.
        value: The value, or None for an adapter that is not at this site.
        max_rank: The highest rank. A grouped convolution takes the next multiple of its groups.
    """
    groups = site.groups
    rank = -(-max_rank // groups) * groups
    axis = entry.rank_axis
    if value is None:
        return entry.fill(rank)
    if axis is None:
        return value
    whole = entry.fill(rank)
    if entry.role == "A" and groups > 1:
        # The ranks are ordered by group, so each group is padded separately.
        size = len(value) // groups
        whole.view(groups, -1, *whole.shape[1:])[:, :size] = value.view(
            groups, size, *value.shape[1:]
        )
        return whole
    whole.narrow(axis, 0, value.shape[axis]).copy_(value)
    return whole


class OnnxSession(Generates):
    """Exported model, loaded and ready to run.

    Threads may share a session, because concurrent runs have separate bindings. An adapter is bound once and
    not for each run.

    Args:
        path: The ``.onnx`` file; its external data, and the encoder of an encoder-decoder, have to
            lie in the same folder.
        provider: "cuda", "cpu" or "webgpu". ONNX Runtime's names, alone or in a list, mean the same:
            ``["CPUExecutionProvider"]``. There is no fallback to another provider.
        providers: The same as ``provider``, by the name that ``onnxruntime.InferenceSession`` has for it.
        provider_options: Options of ONNX Runtime's provider, as it takes them; its CPU provider has none.
        session_options: An ``onnxruntime.SessionOptions`` with threads, profiling and the like. Each
            session adds its own settings to it, so sessions that differ need separate objects.
        low_memory: True to leave weights in their files and map them into memory, which is slower.
        tf32: True to let CUDA compute fp32 products in TF32, with ten bits of mantissa. PyTorch does
            not by default either.
        cuda_graph: True to capture a CUDA graph for each combination of input shapes and replay it. This
            helps models that are bound by kernel launches. Runs then go one at a time.
        max_rank: The highest rank of an adapter, or of a weighted sum. CUDA graphs need it if the file
            takes adapters: every adapter then runs at this rank.

    Attributes:
        inputs: Inputs of ``run``. Inputs for adapters are left out, because ``adapter=`` feeds them.
        outputs: Outputs of ``run``.
        metadata: Metadata entries of the file.
        encoder: The session of the encoder, for the decoder of an encoder-decoder, else None.

    Raises:
        ProviderError: The provider is unknown, not installed, lacks libraries or a device, or has
            no kernel for an operation of the file.
        ExportError: The file is missing, damaged or no ONNX model. A tool took adapter inputs out of it.
        ConfigError: The arguments contradict each other.
    """

    def __init__(
        self,
        path: str | Path,
        provider: onnx_providers.ProviderName = "cuda",
        *,
        providers: onnx_providers.ProviderName | None = None,
        provider_options: Mapping[str, str] | None = None,
        session_options: Any = None,
        low_memory: bool = False,
        tf32: bool = False,
        cuda_graph: bool = False,
        max_rank: int | None = None,
    ) -> None:
        provider = onnx_providers.chosen_provider(provider if providers is None else providers)
        onnx_providers.check_arguments(
            provider, provider_options, max_rank, tf32=tf32, cuda_graph=cuda_graph
        )
        self.path = Path(path)
        self._swapping = threading.Lock()  # both files of a model always have the same adapters
        self._runtime = onnx_providers.import_onnxruntime()
        options = dict(provider_options or {})
        if provider == "cuda":
            graphs = {"enable_cuda_graph": "1"} if cuda_graph else {}
            options = {"use_tf32": str(int(tf32)), **graphs, **options}
        settings = onnx_providers.session_settings(
            self._runtime, session_options, low_memory=low_memory
        )
        self._session = onnx_providers.load(self._runtime, self.path, provider, options, settings)
        self.provider: Provider = provider
        self._device, self._cache_place = _places(provider, int(options.get("device_id", 0)))
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        manifest = Manifest.from_metadata(self.metadata)
        self._limits: dict[str, int] = json.loads(self.metadata.get(ort.AXIS_LIMITS_KEY, "{}"))
        self._inner_sizes: list[str] = json.loads(self.metadata.get(ort.INNER_SIZES_KEY, "[]"))
        self._store = self._adapter_store(manifest, max_rank)
        axes: dict[str, str] = json.loads(self.metadata.get(ort.AXES_KEY, "{}"))
        self._fed = frozenset({*manifest.inputs, *manifest.choosing} if manifest else ())
        ports = [ort.port_of(value, axes) for value in self._session.get_inputs()]
        self.inputs = tuple(port for port in ports if port.name not in self._fed)
        self.outputs = tuple(ort.port_of(value, axes) for value in self._session.get_outputs())
        cache = next(
            (value.dtype for value in self.inputs if value.name.startswith("past_key_values.")), ""
        )
        check_attention(self.metadata, provider, self._runtime.__version__, cache, self.path.name)
        self.encoder: OnnxSession | None = None
        if ENCODER_KEY in self.metadata:
            self.encoder = OnnxSession(
                self._encoder_path(),
                provider,
                provider_options=provider_options,
                session_options=session_options,
                low_memory=low_memory,
                tf32=tf32,
                max_rank=max_rank,
            )
        self._replays_graphs = cuda_graph
        self._static = self._static_runner(manifest, max_rank) if cuda_graph else None
        if provider != "cpu":
            onnx_providers.warn_of_work(
                self._session, onnx_providers.PROVIDERS[provider], self.path.name
            )

    def _adapter_store(self, manifest: Manifest | None, max_rank: int | None) -> AdapterStore:
        """Return the store for the adapters of the file."""
        arguments = self._runtime, manifest, self._device, self.path.name, max_rank
        fixed = _check_inputs(self._session, manifest, self.path.name)
        if manifest is not None and manifest.bank is not None:
            return AdapterBank(*arguments, self.path, fixed)
        return AdapterStore(*arguments)

    def _encoder_path(self) -> Path:
        """Return the path of the encoder of an encoder-decoder.

        Raises:
            ExportError: The file is not there.
        """
        path = self.path.with_name(self.metadata[ENCODER_KEY])
        if not path.is_file():
            raise ExportError(
                f"{self.path.name} is the decoder of a model whose encoder is {path.name}, and that is not "
                f"in {path.parent}: keep both files, and their data, in one folder"
            )
        return path

    def __repr__(self) -> str:
        return f"OnnxSession({str(self.path)!r}, provider={self.provider!r})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigError(
            f"a session of {self.path.name} holds a loaded model and cannot be copied or pickled: open the "
            "file again (OnnxSession(path)), or share the session, which threads may"
        )

    def placement(self) -> onnx_providers.PlacementReport:
        """Return which provider runs which node.

        Raises:
            ExportError: This ONNX Runtime does not report it.
        """
        return onnx_providers.read_placement(self._session, onnx_providers.PROVIDERS[self.provider])

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return self._store.names

    def load_adapter(
        self,
        name: str,
        source: nn.Module | str | os.PathLike[str] | Mapping[str, Any],
        *,
        adapter_name: str | None = None,
    ) -> None:
        """Load an adapter onto the device. Calls of :meth:`run` choose it by its name.

        Args:
            name: Name of the adapter in the session. An adapter of the same name is replaced; runs that have
                begun end with the old one.
            source: An ``.onnx_adapter`` file, an adapter folder of PEFT, a rewritten model, or values by
                the names of the inputs.
            adapter_name: Name of the adapter in a model; by default the only one, or the only active one.

        Raises:
            CheckpointError: The adapter is missing, damaged or for another model, has another dtype, lacks
                one of two factors, or has values that are not finite. The session is unchanged.
            ConfigError: The file takes no adapters, or an argument is not valid.
        """
        manifest = self._store.manifest
        untyped: object = name
        if not isinstance(untyped, str) or not untyped or is_base(untyped):
            raise ConfigError(f"the name of an adapter is {name!r}: give another text")
        values = values_of(source, adapter_name, manifest)
        description = str(source) if isinstance(source, str | os.PathLike) else f"adapter {name!r}"
        with self._swapping:
            for part in self._parts():
                part._store.load(name, values, description)

    def unload_adapter(self, name: str) -> None:
        """Remove an adapter and free its memory.

        Raises:
            ConfigError: There is no adapter of this name.
        """
        with self._swapping:
            for part in self._parts():
                part._store.unload(name)

    def run(
        self,
        inputs: Mapping[str, Any] | Sequence[Any] | Tensor | np.ndarray[Any, Any],
        *,
        adapter: AdapterChoice = None,
    ) -> dict[str, Any]:
        """Run the model once.

        Args:
            inputs: Arrays or tensors by name, or in the order of ``self.inputs``. Tensors on
                the session's device are not copied. A decoder without a cache in ``inputs`` begins a text:
                its caches are empty, and a missing mask covers all tokens.
            adapter: The name of a loaded adapter, a dict of names to weights, or None for the base
                model. Weighted changes are added up exactly, and the last few sums are cached. A file with a
                bank also takes a list with a name, or None, for each row of the batch.

        Returns:
            Outputs by name. They are tensors on the device of the first tensor among the inputs, or numpy
            arrays if there is none.

        Raises:
            ExportError: Names, dtypes, ranks or sizes do not fit, or two axes of one name have different
                sizes. An axis has size 0, but the outputs would not be empty. The model fails.
            ConfigError: There is no such adapter, or a weight is no finite number.
        """
        names = [port.name for port in self.inputs]
        generates = TASK_KEY in self.metadata
        if isinstance(inputs, Mapping) and (fed := self._fed.intersection(inputs)):
            raise ExportError(
                f"the session feeds {some(sorted(fed), 3)} of {self.path.name} itself: leave it out, and "
                "choose by name, with adapter='name' or a list of names"
            )
        complete = ort.with_empty_caches(inputs, self.inputs) if generates else inputs
        arguments = ort.inputs_by_name(complete, names, self.path.name)
        feeds = {
            port.name: ort.feed(self._runtime, port, arguments[port.name], self._device)
            for port in self.inputs
        }
        ort.check_axes(self.inputs, arguments, self._limits, self.path.name, task=generates)
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        ort.settle(tensors)
        device = tensors[0].device if tensors else None
        if self._takes_one_row(arguments):
            return self._run_rows(arguments, adapter)
        stays = device is not None and device.type == self._device.type
        target = self._device if stays else ort.CPU
        results = self._execute(feeds, adapter, target, take=partial(ort.unwrap, device=device))
        return {port.name: result for port, result in zip(self.outputs, results, strict=True)}

    def _takes_one_row(self, arguments: Mapping[str, Any]) -> bool:
        """Return True for a call that ONNX Runtime's attention can only run row by row.

        Such a call has a past and several new tokens in several rows. Only a direct caller of :meth:`run`
        makes one: :meth:`generate` reads a prompt at once and then one token at a time.
        """
        if ONE_ROW_CHUNKS_KEY not in self.metadata:
            return False
        sizes: dict[int | str | None, int] = {}
        for port in self.inputs:
            sizes.update(zip(port.shape, arguments[port.name].shape, strict=True))
        several = sizes.get("batch", 1) > 1 and sizes.get("sequence", 1) > 1
        return several and sizes.get("past_length", 0) > 0

    def _run_rows(self, arguments: Mapping[str, Any], adapter: AdapterChoice) -> dict[str, Any]:
        """Run each row of a batch alone, and concatenate the outputs. All inputs have the batch first."""
        count = len(arguments[self.inputs[0].name])
        choices = adapter if isinstance(adapter, (list, tuple)) else [adapter] * count
        self._store.chosen(adapter).check_rows(count, self.path.name)
        with self._swapping:  # so that no adapter changes between rows
            adapters: list[Any] = [self._store.chosen(choice) for choice in choices]
        rows = [
            self.run(
                {name: value[row : row + 1] for name, value in arguments.items()}, adapter=choice
            )
            for row, choice in enumerate(adapters)
        ]
        joined: dict[str, Any] = {}
        for port in self.outputs:
            parts = [row[port.name] for row in rows]
            tensors = isinstance(parts[0], Tensor)
            joined[port.name] = torch.cat(parts) if tensors else np.concatenate(parts)
        return joined

    def _value(self, port: ort.Port, value: Tensor) -> Any:
        return ort.feed(self._runtime, port, value, self._device)

    def _run_held(self, feeds: Mapping[str, Any], adapters: Any) -> list[Any]:
        return self._execute(feeds, adapters[self], self._device)

    def _binding(self, adapters: Any, rows: int) -> Any:
        adapters[self].check_rows(rows, self.path.name)
        binding = adapters[self].bound.fresh(self._session)
        for name, value in adapters[self].fed.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def _run_bound(self, binding: Any, shapes: Callable[[], Mapping[str, Sequence[int]]]) -> None:
        ort.settle((), self._device)
        with ort.run_errors(shapes):
            if self._device.type == "cpu":
                self._session.run_with_iobinding(binding)
                return
            binding.synchronize_inputs()
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()

    def _execute(
        self,
        feeds: Mapping[str, Any],
        adapter: AdapterChoice | HeldAdapter = None,
        device: torch.device = ort.CPU,
        take: Callable[[Any], Any] | None = None,
    ) -> list[Any]:
        """Run the file once on ONNX Runtime values by input name, and return the outputs in order.

        Outputs are on ``device``. ``take`` is applied to each output.
        """
        held_adapter = self._store.chosen(adapter)
        shapes = {name: value.shape() for name, value in feeds.items()}
        if held_adapter.rows is not None:
            held_adapter.check_rows(
                next(shape[0] for shape in shapes.values() if shape), self.path.name
            )
        empty_shapes = ort.empty_outputs(
            self.inputs,
            self.outputs,
            shapes,
            self.path.name,
            inner=self._inner_sizes,
            task=TASK_KEY in self.metadata,
        )
        if empty_shapes is not None:
            values = [
                ort.empty_value(self._runtime, port, shape, device)
                for port, shape in zip(self.outputs, empty_shapes, strict=True)
            ]
            return values if take is None else list(map(take, values))
        ort.settle((), self._device)
        if self._static is not None:
            values = self._static.run(feeds, held_adapter, device)
            return values if take is None else list(map(take, values))
        feeds = {**feeds, **held_adapter.fed}
        return ort.bound_run(
            self._session, feeds, held_adapter.bound, self.outputs, device, take=take
        )

    def _static_runner(self, manifest: Manifest | None, max_rank: int | None) -> StaticRunner:
        if manifest is not None and manifest.bank is not None:
            raise ConfigError(
                f"{self.path.name} has a bank of adapters, whose size changes with what is loaded, and a "
                "CUDA graph has fixed sizes: open it without cuda_graph, or export with adapters='inputs'"
            )
        if manifest is not None and max_rank is None:
            raise ConfigError(
                f"{self.path.name} takes adapters: with cuda_graph=True give max_rank, the highest rank that "
                "one will have. A graph has fixed shapes, so that every adapter is filled up to that"
            )
        runtime, session = self._runtime, self._session
        options = max_rank or 0, self._device, self.path
        return StaticRunner(runtime, session, self.outputs, manifest, *options)

    def _hold(self, adapter: AdapterChoice) -> dict[OnnxSession, HeldAdapter]:
        """Look up an adapter in the session of each file of the model, with no load or unload in between."""
        with self._swapping:
            return {part: part._store.chosen(adapter) for part in self._parts()}

    def _parts(self) -> tuple[OnnxSession, ...]:
        # Both files of an encoder-decoder list every site of an adapter, whichever applies it.
        return (self,) if self.encoder is None else (self, self.encoder)


def _check_inputs(session: Any, manifest: Manifest | None, file: str) -> bool:
    """Raise if a tool removed inputs that choose adapters from a file.

    Returns:
        True if the file has its adapters, but no further ones can be loaded.

    Raises:
        ExportError: The message names the inputs and what to do.
    """
    if manifest is None:
        return False
    values = (*session.get_inputs(), *session.get_overridable_initializers())
    lost, constant = manifest.missing({value.name for value in values})
    if lost:
        raise ExportError(
            f"{file} lacks {len(lost)} inputs for adapters, so that every run would be that of the base "
            f"model: {some(lost, 3)}. A tool took them for constants, as optimizers do with inputs that "
            "have a default. Export the model with required_inputs=True before such a tool"
        )
    if constant:
        _log.warning(
            "a tool made constants of %s in %s: it runs the adapters that it has, and loads no others",
            some(constant, 3),
            file,
        )
    return bool(constant) or (manifest.bank is not None and manifest.required)


def _places(provider: str, index: int) -> tuple[torch.device, torch.device | ort.Place]:
    """Return the device of inputs and factors of a session, and the place of its caches.

    PyTorch has no memory on WebGPU. Inputs are copied to it with each run, and a cache stays on it.
    """
    if provider == "webgpu":
        return ort.CPU, ort.Place(provider, index)
    device = torch.device(provider, index)
    return device, device
