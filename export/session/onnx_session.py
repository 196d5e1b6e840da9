"""Running an exported file."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from torch import Tensor, nn

from lora_fx.errors import ConfigError, ExportError
from lora_fx.export.adapters import AdapterChoice, AdapterStore, HeldAdapter, Manifest, values_of
from lora_fx.export.generate import DecoderFile, Generates
from lora_fx.export.ort import (
    AXIS_LIMITS_KEY,
    CPU,
    INNER_SIZES_KEY,
    PROVIDERS,
    Device,
    PlacementReport,
    Port,
    bound_run,
    check_arguments,
    check_axes,
    empty_outputs,
    empty_value,
    feed,
    import_onnxruntime,
    inputs_by_name,
    load,
    port_of,
    read_placement,
    session_settings,
    settle,
    unwrap,
    warn_of_work,
)
from lora_fx.export.session.static_run import StaticRunner
from lora_fx.export.tasks import ENCODER_KEY, TASK_KEY

__all__ = ["OnnxSession", "Port"]


class OnnxSession(Generates):
    """An exported model, loaded and ready to run.

    Threads may share it: each run has bindings of its own.

    Args:
        path: The ``.onnx`` file; its external data, and the encoder of an encoder-decoder, have to
            lie beside it.
        provider: "cuda" or "cpu". What runs is this provider or nothing.
        provider_options: Options of ONNX Runtime's provider, as it takes them; its CPU provider has none.
        session_options: An ``onnxruntime.SessionOptions`` with threads, profiling and the like. The session
            adds to it what it needs, so give each its own where they differ.
        low_memory: Whether to leave weights in their files, mapped into memory, although that is slower.
        tf32: Whether CUDA may compute fp32 products in TF32, with ten bits of mantissa. PyTorch does
            not by default either.
        cuda_graph: Whether to capture a CUDA graph for each combination of input shapes and replay it:
            for models that wait for launches more than for kernels. Runs are one at a time then.
        max_rank: The highest rank of an adapter, or of a weighted sum. CUDA graphs need one where the
            file takes adapters: every adapter runs at this rank.

    Attributes:
        inputs: What ``run`` takes.
        outputs: What it gives.
        metadata: What the file remembers of its export.
        encoder: The session of the encoder, for the decoder of an encoder-decoder, else None.

    Raises:
        ProviderError: The provider is unknown, not installed, lacks libraries or a device, or has
            no kernel for an operation of the file.
        ExportError: The file is missing, damaged or no ONNX model.
        ConfigError: The arguments contradict each other.
    """

    def __init__(
        self,
        path: str | Path,
        provider: Literal["cuda", "cpu"] = "cuda",
        *,
        provider_options: Mapping[str, str] | None = None,
        session_options: Any = None,
        low_memory: bool = False,
        tf32: bool = False,
        cuda_graph: bool = False,
        max_rank: int | None = None,
    ) -> None:
        check_arguments(provider, provider_options, max_rank, tf32=tf32, cuda_graph=cuda_graph)
        self.path = Path(path)
        self._runtime = import_onnxruntime()
        options = dict(provider_options or {})
        if provider == "cuda":
            graphs = {"enable_cuda_graph": "1"} if cuda_graph else {}
            options = {"use_tf32": str(int(tf32)), **graphs, **options}
        settings = session_settings(self._runtime, session_options, low_memory=low_memory)
        self._session = load(self._runtime, self.path, provider, options, settings)
        self.provider: Literal["cuda", "cpu"] = provider
        self._device = Device(provider, int(options.get("device_id", 0)))
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        manifest = Manifest.from_metadata(self.metadata)
        self._limits: dict[str, int] = json.loads(self.metadata.get(AXIS_LIMITS_KEY, "{}"))
        self._inner_sizes: list[str] = json.loads(self.metadata.get(INNER_SIZES_KEY, "[]"))
        self._swapping = threading.Lock()  # two files never have adapters of two loads
        self._store = AdapterStore(self._runtime, manifest, self._device, self.path.name, max_rank)
        self.inputs = tuple(port_of(value) for value in self._session.get_inputs())
        self.outputs = tuple(port_of(value) for value in self._session.get_outputs())
        self.encoder: OnnxSession | None = None
        if ENCODER_KEY in self.metadata:
            beside = self.path.with_name(self.metadata[ENCODER_KEY])
            if not beside.is_file():
                raise ExportError(
                    f"{self.path.name} is the decoder of a model whose encoder is {beside.name}, and that "
                    f"is not in {beside.parent}: keep both files, and their data, in one folder"
                )
            self.encoder = OnnxSession(
                beside,
                provider,
                provider_options=provider_options,
                session_options=session_options,
                low_memory=low_memory,
                tf32=tf32,
                max_rank=max_rank,
            )
        self._static = self._static_runner(manifest, max_rank) if cuda_graph else None
        if provider == "cuda":
            warn_of_work(self._session, PROVIDERS[provider], self.path.name)

    def __repr__(self) -> str:
        return f"OnnxSession({str(self.path)!r}, provider={self.provider!r})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigError(
            f"a session of {self.path.name} holds a loaded model and cannot be copied or pickled: open the "
            "file again (OnnxSession(path)), or share the session, which threads may"
        )

    def placement(self) -> PlacementReport:
        """Which provider runs which node.

        Raises:
            ExportError: This ONNX Runtime does not say.
        """
        return read_placement(self._session, PROVIDERS[self.provider])

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that are loaded."""
        return self._store.names

    def load_adapter(
        self,
        name: str,
        source: nn.Module | str | os.PathLike[str] | Mapping[str, Any],
        *,
        adapter_name: str | None = None,
    ) -> None:
        """Load an adapter onto the device. It runs when :meth:`run` is told so.

        Args:
            name: What to call it. One of this name that is there already is replaced; runs that have
                begun end with that.
            source: An ``.onnx_adapter`` file, an adapter folder of PEFT, a rewritten model, or values by
                the names of the inputs.
            adapter_name: Which adapter of a model; by default the only one, or the only active one.

        Raises:
            CheckpointError: It is missing or damaged, is for another model, has another dtype, lacks one
                of two factors, or holds values that are not finite. The session is as it was.
            ConfigError: The file takes no adapters, or an argument cannot mean anything.
        """
        manifest = self._store.manifest
        values = values_of(source, adapter_name, manifest)
        what = str(source) if isinstance(source, str | os.PathLike) else f"adapter {name!r}"
        with self._swapping:
            for part in self._parts():
                part._store.load(name, values, what)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter and free its memory.

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
            inputs: Arrays or tensors by name, or in the order of ``self.inputs``. What lies on the
                session's device is not copied.
            adapter: The name of a loaded adapter, a dict of names to weights, or None for the base
                model. Weighted changes are added up exactly; the last few sums are kept.

        Returns:
            Outputs by name: tensors, on the device of the first one given, if any of the inputs is
            a tensor, else numpy arrays.

        Raises:
            ExportError: Names, dtypes, ranks or sizes do not fit (also those of two axes that have one
                name), an axis has size 0 and the outputs would have elements all the same, or the model
                fails.
            ConfigError: There is no such adapter, or a weight is no finite number.
        """
        given = self._by_name(inputs)
        feeds = {
            port.name: feed(self._runtime, port, given[port.name], self._device)
            for port in self.inputs
        }
        generates = TASK_KEY in self.metadata
        check_axes(self.inputs, given, self._limits, self.path.name, task=generates)
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        settle(tensors)
        device = tensors[0].device if tensors else None
        stays = device is not None and device.type == self._device.kind
        results = self._execute(feeds, adapter, self._device if stays else CPU)
        pairs = zip(self.outputs, results, strict=True)
        return {port.name: unwrap(result, device) for port, result in pairs}

    def _decoder(self) -> DecoderFile:
        return _OpenDecoder(self)

    def _execute(
        self,
        feeds: Mapping[str, Any],
        adapter: AdapterChoice | HeldAdapter = None,
        device: Device = CPU,
        host: Collection[str] = (),
    ) -> list[Any]:
        """From values of ONNX Runtime, by name, to values in the order of the outputs.

        They lie on ``device``, those that ``host`` names on the CPU.
        """
        held = self._store.chosen(adapter)
        shapes = {name: value.shape() for name, value in feeds.items()}
        nothing = empty_outputs(
            self.inputs,
            self.outputs,
            shapes,
            self.path.name,
            inner=self._inner_sizes,
            task=TASK_KEY in self.metadata,
        )
        if nothing is not None:
            return [
                empty_value(self._runtime, port, shape, CPU if port.name in host else device)
                for port, shape in zip(self.outputs, nothing, strict=True)
            ]
        settle((), self._device)
        if self._static is not None:
            return self._static.run(feeds, held, device, host)
        return bound_run(self._session, feeds, held.bound, self.outputs, device, host)

    def _static_runner(self, manifest: Manifest | None, max_rank: int | None) -> StaticRunner:
        if manifest is not None and max_rank is None:
            raise ConfigError(
                f"{self.path.name} takes adapters: with cuda_graph=True give max_rank, the highest rank that "
                "one will have. A graph has fixed shapes, so that every adapter is filled up to that"
            )
        runtime, session = self._runtime, self._session
        return StaticRunner(runtime, session, self.outputs, manifest, max_rank or 0, self._device)

    def _chosen(self, adapter: AdapterChoice) -> dict[OnnxSession, HeldAdapter]:
        """An adapter as every file of the model has it at this moment."""
        with self._swapping:
            return {part: part._store.chosen(adapter) for part in self._parts()}

    def _parts(self) -> tuple[OnnxSession, ...]:
        # Both files of an encoder-decoder name every place of an adapter, whichever applies it.
        return (self,) if self.encoder is None else (self, self.encoder)

    def _by_name(self, inputs: Any) -> dict[str, Any]:
        return inputs_by_name(inputs, [port.name for port in self.inputs], self.path.name)


class _OpenDecoder:
    """A session as generation sees it."""

    def __init__(self, session: OnnxSession) -> None:
        self._session = session
        self.path = session.path
        self.inputs = session.inputs
        self.outputs = session.outputs
        self.metadata = session.metadata

    @property
    def encoder(self) -> DecoderFile | None:
        encoder = self._session.encoder
        return None if encoder is None else _OpenDecoder(encoder)

    @property
    def replays_graphs(self) -> bool:
        return self._session._static is not None

    def hold(self, adapter: AdapterChoice) -> dict[OnnxSession, HeldAdapter]:
        return self._session._chosen(adapter)

    def value(self, port: Port, value: Tensor) -> Any:
        return feed(self._session._runtime, port, value, self._session._device)

    def run(self, feeds: Mapping[str, Any], held: Any) -> list[Any]:
        session = self._session
        return session._execute(feeds, held[session], session._device, host=("logits",))
