"""Runs a program beside its oracle, and says what came of it.

The actions of a program, in order:

- ``merge``, ``merge requantized``: the adapters are folded in, and the merged model makes the calls;
- ``reload``: they are saved, and loaded into a fresh model, which makes the calls;
- ``call``: the adapted model makes the calls; outputs are compared, gradients of what is trained and of x;
- ``change``: ``change(model)`` of the program, on both;
- ``disable``, ``enable``: the adapters are switched off, and on again;
- ``switch NAME,...``: other adapters are made active;
- ``copy``, ``pickle``: a copy takes the adapted model's place;
- ``export``, ``export inputs``: the model is written as an ONNX file, and run in ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import io
import itertools
import logging
import pickle
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx.ir.record import require_record
from tests.fuzz.oracle import Adapter, Dense, adapters_of, randomize
from tests.fuzz.program import Outcome, Program
from tests.fuzz.rounding import FACTOR, SAMPLES, Noise

__all__ = ["imported", "judge"]

_numbers = itertools.count()

# In fp64 nothing that a program of a few small operations loses is near it, and nothing that is wrong is
# below it.
_DOUBLE = 1e-8
# The rounding of fp64.
_ROUNDING = 2.0**-52
_NAMES = ("default", "second", "third")


class _Ended(Exception):
    """The program has come to an end before its last action.

    ``error`` says how far numbers were apart, if that is what ended it.
    """

    def __init__(self, kind: str, stage: str, detail: str, error: float | None = None) -> None:
        super().__init__(detail)
        self.kind, self.stage, self.detail, self.error = kind, stage, detail, error


def judge(program: Program) -> Outcome:
    """Runs a program; never raises on account of it."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lora_fx").setLevel(logging.CRITICAL)
        run = None
        try:
            with imported(program.source, Path(folder)) as module:
                run = _Run(program, module, Path(folder))
                run.all()
        except _Ended as end:
            sites, rejected = (run.sites, run.rejected) if run else (0, 0)
            if end.error is not None and run and run.unstable(end.error):
                return Outcome("unstable", end.stage, end.detail, sites, rejected)
            return Outcome(end.kind, end.stage, end.detail, sites, rejected)
        return Outcome("equal", "", "", run.sites, run.rejected)


@contextlib.contextmanager
def imported(source: str, folder: Path) -> Iterator[ModuleType]:
    """The program as a module of its own, with a file: captures read the source of what they trace."""
    name = f"fuzzed_{next(_numbers)}"
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    except _Ended:
        raise
    except Exception as exc:
        raise _Ended("invalid", "source", _told(exc)) from exc
    finally:
        del sys.modules[name]


class _Run:
    """One run of a program.

    Attributes:
        sites: How many operations were adapted.
        rejected: How many were refused with a reason.
    """

    def __init__(self, program: Program, module: ModuleType, folder: Path) -> None:
        self.program, self.module, self.folder = program, module, folder
        self.dtype: torch.dtype = getattr(torch, program.dtype)
        self.sites = self.rejected = 0
        self.changed = False
        self.active: tuple[str, ...] = (_NAMES[0],)
        self.enabled = True
        self.values: dict[str, Tensor] = {}
        self.adapted: nn.Module
        self.adapters: dict[str, list[Adapter]] = {}
        # What the oracle has been through: calls with these adapters, or None for a change.
        self.past: list[list[Adapter] | None] = []

    def all(self) -> None:
        """Every action in turn."""
        before = self._check_valid()
        plain = self._rewrite()
        if self.program.quantize:
            try:
                before = self._outputs(self._base(), grad=False)
            except Exception as exc:
                # Code that reads the weight by itself does not know how it is stored, nor does its library.
                raise _Ended("refused", "quantized base", _told(exc)) from exc
        self.oracle = self._fresh_oracle()
        for action in self.program.actions:
            name, _, argument = action.partition(" ")
            getattr(self, f"_do_{name}")(argument)
        if not self.changed:
            with self._stage("purity"):
                after = self._outputs(plain, grad=False)
            if any(not _same_bits(a, b) for a, b in zip(before, after, strict=True)):
                raise _Ended("silent", "purity", "the argument of rewrite computes something else")

    # --- the models ------------------------------------------------------------------------------

    def _build(self) -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = self.module.build()
        return model.to(self.dtype).eval()

    def _base(self) -> nn.Module:
        model = self._build()
        if not self.program.quantize:
            return model
        with self._stage("quantize"):
            return lora_fx.quantize(model, self.program.quantize)

    def _calls(self, leaves: bool = False) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
        def cast(value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value.clone()
            value = value.to(self.dtype).clone()
            return value.requires_grad_() if leaves and self.module.GRAD else value

        calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = pytree.tree_map_only(
            Tensor, cast, self.module.calls()
        )
        return calls

    def _check_valid(self) -> list[list[Any]]:
        """The outputs of the original; a program that fails without lora_fx is none."""
        try:
            for model in (self._build(), self._build().double()):
                cast = next(iter(model.parameters())).dtype
                for method, args, kwargs in self._calls(leaves=True):
                    args, kwargs = _as(cast, (args, kwargs))
                    with torch.set_grad_enabled(self.module.GRAD):
                        output = _entry(model, method)(*args, **kwargs)
                    if self.module.GRAD:
                        _backward(output)
            outputs = self._outputs(self._build(), grad=False)
        except Exception as exc:
            # A counter in place, in a block that is called twice: the original cannot be trained.
            kind = "refused" if "modified by an inplace operation" in str(exc) else "invalid"
            raise _Ended(kind, "original", _told(exc)) from exc
        if not all(bool(x.isfinite().all()) for out in outputs for x in out if _is_float(x)):
            raise _Ended("invalid", "original", "the outputs are not finite")
        return outputs

    def _rewrite(self) -> nn.Module:
        """Makes the adapted model, and returns the argument."""
        program = self.program
        plain = self._base()
        if program.quantize:
            self.values = _dequantized(plain, self._build())
        example = self._example()
        with self._stage("rewrite"):
            config = lora_fx.LoraConfig(**{"seed": 0, **program.configs[0]})
            self.adapted = lora_fx.rewrite(
                plain,
                config,
                example,
                frontend=program.frontend,  # type: ignore[arg-type]
                optimize=program.optimize,
                memory=program.memory,  # type: ignore[arg-type]
            ).eval()
            self.rejected = len(require_record(self.adapted).base.matches.rejections)
            for name, options in zip(_NAMES[1:], program.configs[1:], strict=False):
                lora_fx.add_adapter(
                    self.adapted, lora_fx.LoraConfig(**{"seed": 0, **options}), name
                )
        self._find_adapters()
        generator = torch.Generator().manual_seed(7)
        for adapters in self.adapters.values():
            randomize(adapters, generator)
        self.sites = len(self.adapters[_NAMES[0]])
        return plain

    def _find_adapters(self) -> None:
        names = lora_fx.adapter_names(self.adapted)
        self.adapters = {name: adapters_of(self.adapted, name) for name in names}

    def _chosen(self) -> list[Adapter]:
        if not self.enabled:
            return []
        return [one for name in self.active for one in self.adapters[name]]

    def _fresh_oracle(self) -> Dense:
        oracle = Dense(self._build())
        oracle.set_base(self.values)
        if self.changed:
            self.module.change(oracle.model)
        oracle.write(self._chosen())
        return oracle

    def _new_oracle(self, _: Noise | None) -> Dense:
        return self._fresh_oracle()

    def _aged_oracle(self, mode: Noise | None) -> Dense:
        """An oracle that has been through what the one beside the adapted model has."""
        oracle = Dense(self._build())
        oracle.set_base(self.values)
        for one in self.past:
            if one is None:
                self.module.change(oracle.model)
            else:
                oracle.write(one)
                self._replayed(oracle, mode)
        oracle.write(self._chosen())
        return oracle

    # --- the actions -----------------------------------------------------------------------------

    def _do_call(self, _: str) -> None:
        self._compare(
            "call" if not self.changed else "call after change",
            self.adapted,
            self.oracle,
            self._aged_oracle,
        )
        self.past.append(self._chosen())

    def _do_merge(self, how: str) -> None:
        with self._stage("merge"):
            merged = lora_fx.merge(self.adapted, requantize=how == "requantized")
        self._compare("merged", merged, self._fresh_oracle(), self._new_oracle, trained=False)

    def _do_reload(self, _: str) -> None:
        with self._stage("save"):
            folder = self.folder / "adapter"
            lora_fx.save_adapter(self.adapted, folder, self.active[0], force=True)
        with self._stage("load"):
            loaded = lora_fx.load_adapter(
                self._base(),
                folder if self.active[0] == _NAMES[0] else folder / self.active[0],
                frontend=self.program.frontend,  # type: ignore[arg-type]
                example_inputs=self._example(),
            ).eval()
            if self.changed:
                self.module.change(loaded)
        active, self.active = self.active, self.active[:1]
        self._compare("loaded", loaded, self._fresh_oracle(), self._new_oracle, trained=False)
        self.active = active

    def _example(self) -> Any:
        return self._first() if self.program.example else None

    def _first(self) -> Any:
        """The first call's arguments as example inputs: a tuple, or a dict where some are keywords."""
        _, args, kwargs = self._calls()[0]
        if not kwargs:
            return args
        named = inspect.signature(self.module.Net.forward).bind(None, *args, **kwargs).arguments
        flat = dict(itertools.islice(named.items(), 1, None))
        for name, value in list(flat.items()):
            if value is kwargs or value == kwargs:
                del flat[name]
                flat.update(kwargs)
        return None if "args" in flat else flat

    def _do_change(self, _: str) -> None:
        self.changed = True
        if self.program.quantize:
            base = self._base()
            try:
                self.module.change(base)
                self._outputs(base, grad=False)
            except Exception as exc:
                raise _Ended("refused", "quantized base", _told(exc)) from exc
        try:
            self.module.change(self.oracle.model)
        except Exception as exc:
            raise _Ended("invalid", "change", _told(exc)) from exc
        with self._stage("change"):
            self.module.change(self.adapted)
        self.past.append(None)
        self.oracle.write(self._chosen())

    def _do_disable(self, _: str) -> None:
        self.enabled = False
        self.oracle.write([])
        with self._stage("disable"), lora_fx.disable_adapter(self.adapted):
            self._compare("disabled", self.adapted, self.oracle, self._aged_oracle)
        self.past.append([])
        self.enabled = True
        self.oracle.write(self._chosen())

    def _do_switch(self, names: str) -> None:
        self.active = tuple(names.split(","))
        with self._stage("switch"):
            lora_fx.set_adapter(self.adapted, list(self.active))
        self.oracle.write(self._chosen())

    def _do_copy(self, _: str) -> None:
        try:
            copy.deepcopy(self._build())
        except TypeError:  # the original cannot be copied: nothing is claimed
            return
        except RuntimeError:  # results of autograd, which a call leaves behind
            pass
        if not self._copies_apart(copy.deepcopy):
            return
        with self._stage("copy"):
            self.adapted = copy.deepcopy(self.adapted)
            self._find_adapters()
        self.oracle.write(self._chosen())

    def _copies_apart(self, copied: Callable[[nn.Module], nn.Module]) -> bool:
        """Whether a copy of the original goes on as it is when the original is spoilt.

        ``copy.deepcopy`` copies no functions: what a closure leads to is the original's. So is what the code
        of a pickled model finds by a name.
        """
        original = self._build()
        twin = self._twin(original, copied)
        if twin is None:
            return True
        expected = self._outputs(copied(original), grad=False)
        with torch.no_grad():
            for value in (*original.parameters(), *original.buffers()):
                value.zero_()
        found = self._outputs(twin, grad=False)
        if not all(_same_bits(a, b) for a, b in zip(expected, found, strict=True)):
            return False
        # What is changed in a copy has to be what the copy reads.
        changed, original = self._build(), self._build()
        twin = self._twin(original, copied)
        for one in (changed, twin):
            with contextlib.suppress(Exception):
                self.module.change(one)
        expected, found = (
            [_try(_entry(one, method), args, kwargs) for method, args, kwargs in self._calls()]
            for one in (changed, twin)
        )
        return all(
            _same_bits(pytree.tree_leaves(a), pytree.tree_leaves(b))
            for a, b in zip(expected, found, strict=True)
            if not isinstance(a, Exception)
        )

    def _twin(
        self, original: nn.Module, copied: Callable[[nn.Module], nn.Module]
    ) -> nn.Module | None:
        """A copy; None if there is none."""
        try:
            return copied(original)
        except RuntimeError:
            # Results of autograd, which the copy of an adapted model goes without: a call replaces them.
            self._outputs(original, grad=False)
        try:
            return copied(original)
        except RuntimeError:
            return None

    def _do_pickle(self, _: str) -> None:
        try:
            pickle.dumps(self._build())
        except Exception:  # noqa: BLE001  the original cannot be pickled: nothing is claimed
            return
        if not self._copies_apart(_pickled):
            return
        with self._stage("pickle"):
            self.adapted = _pickled(self.adapted)
            self._find_adapters()
        self.oracle.write(self._chosen())

    def _do_export(self, how: str) -> None:
        _, args, kwargs = self._calls()[0]
        example = self._first()
        if len(self.active) > 1:
            how = ""  # a file holds one adapter
        with self._stage("export"), contextlib.redirect_stderr(io.StringIO()):
            path = self.folder / f"model {how}.onnx"
            lora_fx.export_onnx(self.adapted, path, example, adapters=how or None)  # type: ignore[arg-type]
            session = lora_fx.OnnxSession(path, provider="cpu")
            adapter = None
            if how == "inputs":
                file = self.folder / "one.onnx_adapter"
                lora_fx.save_onnx_adapter(self.adapted, file, base=path)
                session.load_adapter("one", file)
                adapter = "one"
            found = session.run(_fed(example), adapter=adapter)
        expected = self._aged_oracle(None)
        args, kwargs = _as(torch.float64, (args, kwargs))
        with torch.no_grad():  # as a file runs
            exact = expected.model(*args, **kwargs)
        # Whoever exports computes in fp32 at best: kernels of ONNX Runtime for fp64 are few.
        for a, b in zip(_tensors(found), _tensors(exact), strict=True):
            self._check("exported", a, b, 1e-4 * float(b.abs().max().clamp_min(1e-3)))

    def unstable(self, error: float) -> bool:
        """Whether the rounding of fp64 itself, cancellation and all, may move a result as far."""
        try:
            exact = self._sensitive(None)
            moved = [self._sensitive(Noise(_ROUNDING, sample)) for sample in range(SAMPLES)]
        except Exception:  # noqa: BLE001  then nothing excuses the difference
            return False
        return any(
            error <= FACTOR * float((a - b).abs().max())
            for sample in moved
            for a, b in zip(exact, sample, strict=True)
            if a.numel()
        )

    def _sensitive(self, mode: Noise | None) -> list[Tensor]:
        """What the oracle computes: outputs, and gradients of inputs and of what is trained."""
        oracle = self._fresh_oracle()
        found: list[Tensor] = []
        for method, args, kwargs in _as(torch.float64, self._calls(leaves=True)):
            with mode or contextlib.nullcontext():
                with torch.set_grad_enabled(self.module.GRAD):
                    output = _entry(oracle.model, method)(*args, **kwargs)
                if self.module.GRAD:
                    _backward(output)
            found += [x.detach() for x in _tensors(output)]
            if self.module.GRAD:
                found += [x.grad for x in _tensors((args, kwargs)) if x.grad is not None]
                found += [x.detach() for x in oracle.gradients().values()]
        return found

    # --- comparing -------------------------------------------------------------------------------

    @property
    def _unit(self) -> float:
        """How much one rounding is at most, relatively, where that is more than that of fp64."""
        if self.dtype == torch.bfloat16:
            return 2.0**-8
        low = self.dtype == torch.float32 or self.program.quantize or self.module.LOW
        return 2.0**-23 if low else 0.0

    def _compare(
        self, stage: str, model: nn.Module, oracle: Dense, fresh: Any, trained: bool = True
    ) -> None:
        """The calls on both, one by one."""
        trained = trained and self.module.GRAD and not self._unit
        calls = self._calls(leaves=trained)
        bounds = self._bounds(fresh) if self._unit else None
        doubles = self._calls(leaves=trained)
        for number, (method, args, kwargs) in enumerate(calls):
            _, exact_args, exact_kwargs = _as(torch.float64, doubles[number])
            with torch.set_grad_enabled(trained):
                expected = _try(_entry(oracle.model, method), exact_args, exact_kwargs)
                found = _try(_entry(model, method), args, kwargs)
            if isinstance(expected, Exception):
                if isinstance(found, (type(expected), lora_fx.LoraFxError)):
                    raise _Ended("equal", "", "")
                raise _Ended("silent", stage, f"the original raises {_told(expected)}")
            if isinstance(found, Exception):
                raise _ended(stage, found)
            self._outputs_agree(stage, found, expected, bounds and bounds[number])
            if trained:
                self._gradients_agree(
                    stage, oracle, found, expected, (args, kwargs), (exact_args, exact_kwargs)
                )

    def _outputs_agree(self, stage: str, found: Any, expected: Any, bounds: Any) -> None:
        left, right = pytree.tree_leaves(found), pytree.tree_leaves(expected)
        if len(left) != len(right):
            raise _Ended("silent", stage, f"{len(left)} outputs instead of {len(right)}")
        for place, (a, b) in enumerate(zip(left, right, strict=True)):
            if not isinstance(b, Tensor):
                if a != b:
                    raise _Ended("silent", stage, f"output {a!r} instead of {b!r}")
            else:
                self._check(stage, a, b, bounds[place] if bounds else _limit(b))

    def _gradients_agree(
        self, stage: str, oracle: Dense, found: Any, expected: Any, inputs: Any, exact_inputs: Any
    ) -> None:
        chosen = self._chosen()
        factors = [(one, name, p) for one in chosen for name, p in one.trained.items()]
        for _, _, p in factors:
            p.grad = None
        with self._stage(f"backward of {stage}"):
            _backward(found)
        _backward(expected)
        exact = oracle.gradients()
        for adapter, name, p in factors:
            if p not in exact:
                continue
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            what = f"gradient of {name} of {adapter.planned.name}"
            self._check(
                f"backward of {stage}", grad, exact[p].reshape(grad.shape), _limit(exact[p]), what
            )
        for a, b in zip(_tensors(inputs), _tensors(exact_inputs), strict=True):
            if a.requires_grad and b.requires_grad:
                left = torch.zeros_like(a) if a.grad is None else a.grad
                right = torch.zeros_like(b) if b.grad is None else b.grad
                self._check(f"backward of {stage}", left, right, _limit(right), "gradient of x")

    def _bounds(self, fresh: Any) -> list[list[float]]:
        """By how much rounding may change each tensor of each call's output."""
        exact = self._replayed(fresh(None), None)
        limits = [[0.0] * len(out) for out in exact]
        for sample in range(SAMPLES):
            mode = Noise(self._unit, sample)
            moved = self._replayed(fresh(mode), mode)
            for limit, out, other in zip(limits, exact, moved, strict=True):
                for place, (a, b) in enumerate(zip(out, other, strict=True)):
                    if _is_float(a) and a.numel():
                        limit[place] = max(limit[place], FACTOR * float((a - b).abs().max()))
        return limits

    def _replayed(self, oracle: Dense, mode: Noise | None) -> list[list[Any]]:
        outputs = []
        with torch.no_grad():
            for method, args, kwargs in _as(torch.float64, self._calls()):
                with mode or contextlib.nullcontext():
                    result = _try(_entry(oracle.model, method), args, kwargs)
                outputs.append([] if isinstance(result, Exception) else pytree.tree_leaves(result))
        return outputs

    def _outputs(self, model: nn.Module, grad: bool) -> list[list[Any]]:
        with torch.set_grad_enabled(grad):
            return [
                pytree.tree_leaves(_entry(model, method)(*args, **kwargs))
                for method, args, kwargs in self._calls()
            ]

    def _check(
        self, stage: str, found: Any, exact: Tensor, limit: float, what: str = "output"
    ) -> None:
        if not isinstance(found, Tensor):
            raise _Ended("silent", stage, f"{what}: {type(found).__name__} instead of a tensor")
        if found.shape != exact.shape:
            raise _Ended(
                "silent",
                stage,
                f"{what}: shape {tuple(found.shape)} instead of {tuple(exact.shape)}",
            )
        if not exact.is_floating_point() or not exact.numel():
            if not torch.equal(found, exact):
                raise _Ended("silent", stage, f"{what}: other values")
            return
        error = float((found.detach().double() - exact.detach().double()).abs().max())
        if not error <= limit:
            scale = float(exact.detach().abs().max())
            detail = f"{what}: error {error:.3g} of {scale:.3g}, allowed {limit:.3g}"
            raise _Ended("silent", stage, detail, error)

    @contextlib.contextmanager
    def _stage(self, stage: str) -> Iterator[None]:
        try:
            yield
        except _Ended:
            raise
        except Exception as exc:
            raise _ended(stage, exc) from exc


def _ended(stage: str, exc: Exception) -> _Ended:
    # A pass that fails is an exception that nobody foresaw, whatever its type.
    unforeseen = re.match(r"pass '[\w-]+' failed: ", str(exc)) is not None
    foreseen = isinstance(exc, lora_fx.LoraFxError) and not unforeseen
    kind = "refused" if foreseen else "raw"
    return _Ended(kind, stage, _told(exc))


def _told(exc: BaseException) -> str:
    """The error, and where it was raised."""
    frames = traceback.extract_tb(exc.__traceback__)
    own = [f for f in frames if "fuzz/judge" not in f.filename.replace("\\", "/")]
    place = f" [{Path(own[-1].filename).name}:{own[-1].lineno}]" if own else ""
    return f"{type(exc).__name__}: {exc}{place}"


def _try(function: Any, args: Any, kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except Exception as exc:  # noqa: BLE001  it is handed on, and judged by whoever called
        return exc


def _entry(model: nn.Module, method: str) -> Any:
    """What a caller calls: the model itself, with its hooks, or another method of it."""
    return model if method == "forward" else getattr(model, method)


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(values) if _is_float(x)]


def _as(dtype: torch.dtype, values: Any) -> Any:
    """A copy of the floating-point tensors in another dtype, leaves where those were."""

    def cast(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)

    return pytree.tree_map_only(Tensor, cast, values)


def _backward(output: Any) -> None:
    """From fixed cotangents: neither ones, which hide what sums to a constant, nor random."""
    wanted = [x for x in _tensors(output) if x.requires_grad]
    if wanted:
        waves = [torch.arange(1, x.numel() + 1, dtype=torch.float64).mul(0.7).cos() for x in wanted]
        grads = [w.view(x.shape).to(x) for w, x in zip(waves, wanted, strict=True)]
        torch.autograd.backward(wanted, grads)


def _limit(exact: Tensor) -> float:
    if not exact.is_floating_point() or not exact.numel():
        return 0.0
    return _DOUBLE * max(float(exact.detach().abs().max()), 1e-3)


def _pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def _same_bits(a: Iterable[Any], b: Iterable[Any]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def _fed(example: Any) -> Any:
    """What a file takes of example inputs: tensors. The rest is fixed in it."""
    if isinstance(example, dict):
        return {name: value for name, value in example.items() if _holds_tensor(value)}
    return tuple(filter(_holds_tensor, example))


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _dequantized(model: nn.Module, original: nn.Module) -> dict[str, Tensor]:
    """The values of the weights that a library stores in few bits, by that library's own functions.

    A weight that code applies as it lies, ``x @ w``, is stored turned. Which way is nearer to the original
    says whether it is.
    """
    values: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "Params4bit":
            import bitsandbytes.functional as bnb

            value = bnb.dequantize_4bit(parameter.data, parameter.quant_state).detach()
        elif hasattr(parameter, "dequantize") and type(parameter.data) is not Tensor:
            value = parameter.dequantize().detach()
        else:
            continue
        before = original.get_parameter(name).detach()
        ways = [one for one in (value, value.mT) if one.shape == before.shape]
        values[name] = min(ways, key=lambda one: float((one - before).abs().sum()))
    return values
