"""Table of formats in ``docs/guides/quantized.md``: each row is what a small model in that format did.

python -m tests.formats            # print it: minutes
python -m tests.formats NVFP4      # only rows with this in their name
python -m tests.formats --write    # into docs/guides/quantized.md

A new format is one :class:`Format` in :data:`FORMATS`. Rows of libraries that are not installed stay as they
are.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.extras import is_installed
from lora_fx.formats import dense, quantization_of
from lora_fx.passes.graph import share_copy
from lora_fx.tools.models import quiet_transformers
from tests.docs.pages import ROOT
from tests.quantized import IDS, llama

__all__ = ["FORMATS", "PAGE", "Format", "Variant", "row_of", "rows_of_page"]

PAGE = ROOT / "docs" / "guides" / "quantized.md"
COLUMNS = ("format", "library", "load", "train", "merge", "load again", "ONNX", "experts")
FROM_PRETRAINED = "`from_pretrained`"
QUANTIZE = "`quantize`"
STATE_DICT = "state dict"
GRADIENTS = 1e-6  # the largest relative error of a factor's gradient
CONFIG = lora_fx.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, seed=0)

Loader = Callable[[Path], Any]


# --- the formats --------------------------------------------------------------------------------------


def from_pretrained(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def save_pretrained(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


@dataclass(frozen=True)
class Variant:
    """A model in a format.

    Attributes:
        write: Writes a checkpoint into a folder.
        loaders: What loads a checkpoint with its weights quantized, by the words for the column *load*.
        schemes: The names in ``SCHEMES`` of the tests that are this format.
        experts: Returns a mixture in this format; None if that was not tried.
        reload: What loads a folder that was saved.
        save: Writes a merged model into a folder.
        again: What loads that folder, by the words for the column *load again*; transformers by default.
        weights: The number of its quantized parameters; 7 for a layer of a Llama.
        matrices: The number of their matrices.
    """

    write: Callable[[Path], None]
    loaders: Mapping[str, Loader]
    schemes: tuple[str, ...] = ()
    experts: Callable[[], Any] | None = None
    reload: Loader = from_pretrained
    save: Callable[[Any, Path], None] = save_pretrained
    again: Mapping[str, Loader] = field(default_factory=dict)
    weights: int = 7
    matrices: int = 7


@dataclass(frozen=True)
class Format:
    """A row of the table.

    Attributes:
        name: The words in its first column.
        library: The module of its library.
        variants: The models that the row stands for, by their names.
    """

    name: str
    library: str
    variants: Mapping[str, Variant]


def write_dense(folder: Path) -> None:
    llama(1).save_pretrained(folder)


def keep_quantized(folder: Path) -> Any:
    with lora_fx.keep_quantized():
        return from_pretrained(folder)


LOADERS: Mapping[str, Loader] = {
    FROM_PRETRAINED: from_pretrained,
    "`keep_quantized`": keep_quantized,
}


def made(format_name: str, **options: Any) -> Loader:
    """``quantize`` with a format."""
    return lambda folder: lora_fx.quantize(from_pretrained(folder), format_name, **options)


def configured(make: Callable[[], Any]) -> Loader:
    """``from_pretrained`` with a configuration."""
    return lambda folder: from_pretrained(folder, quantization_config=make())


def mixture() -> Any:
    """A Qwen3-MoE with random weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return Qwen3MoeForCausalLM(config)


def bits_and_bytes(**options: Any) -> Callable[[], Any]:
    def make() -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**options)

    return make


def torch_ao(bits: int) -> Callable[[], Any]:
    def make() -> Any:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
        from transformers import TorchAoConfig

        four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        return TorchAoConfig(Int8WeightOnlyConfig() if bits == 8 else four)

    return make


def fp8_config() -> Any:
    from transformers import FineGrainedFP8Config

    return FineGrainedFP8Config(weight_block_size=(32, 32))


def write_fp8(folder: Path) -> None:
    from tests.quantized import fp8_layer

    model: Any = llama(1)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            model.set_submodule(name, fp8_layer(layer, (32, 32)))
    model.config.quantization_config = fp8_config()
    model.save_pretrained(folder)


def write_gpt_oss(folder: Path) -> None:
    from tests.lora_fx.test_kept_checkpoints import gpt_oss as write

    write(folder)


def kept_mixture(name: str) -> Callable[[], Any]:
    """A mixture of ``test_kept_checkpoints``."""

    def make() -> Any:
        from tests.lora_fx.test_kept_checkpoints import FOLDERS

        with tempfile.TemporaryDirectory() as folder:
            FOLDERS[name](Path(folder))
            return keep_quantized(Path(folder))

    return make


def compressed_mixture(scheme: str) -> Callable[[], Any]:
    """A mixture of ``test_compressed_experts``."""

    def make() -> Any:
        from tests.lora_fx.test_compressed_experts import write

        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), scheme)
            return keep_quantized(Path(folder))

    return make


def compressed_tensors(*schemes: str, also: tuple[str, ...] = ()) -> dict[str, Variant]:
    """The variants of schemes of ``test_compressed_tensors``, and other names of theirs."""

    def writer(scheme: str) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            from tests.lora_fx.test_compressed_tensors import compressed, dense_llama

            compressed(dense_llama(), scheme).save_pretrained(folder)

        return write

    return {
        scheme.replace(",", ""): Variant(
            writer(scheme),
            LOADERS,
            experts=compressed_mixture(scheme),
            schemes=(scheme, *also),
        )
        for scheme in schemes
    }


def bitsandbytes_4bit(kind: str) -> dict[str, Variant]:
    """Four bits with scales that are quantized, too, and that are not."""

    def variant(double: bool) -> Variant:
        options = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
        return Variant(
            write_dense,
            {
                QUANTIZE: made(kind, double=double),
                FROM_PRETRAINED: configured(bits_and_bytes(load_in_4bit=True, **options)),
            },
            experts=lambda: lora_fx.quantize(mixture(), kind, double=double),
            schemes=(f"{kind} double" if double else kind,),
        )

    return {kind.upper(): variant(False), f"{kind.upper()} double": variant(True)}


def torchao_integers(bits: int) -> Variant:
    name = f"int{bits}"
    return Variant(
        write_dense,
        {QUANTIZE: made(name), FROM_PRETRAINED: configured(torch_ao(bits))},
        experts=lambda: lora_fx.quantize(mixture(), name),
        schemes=(f"{name} torchao",),
    )


def gptqmodel(*names: str, also: tuple[str, ...] = ()) -> dict[str, Variant]:
    """The variants of checkpoints of ``test_gptqmodel``, and other names of theirs."""

    def writer(name: str) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            from tests.lora_fx.test_gptqmodel import written

            folder.parent.mkdir(exist_ok=True)
            written(folder.parent, name).rename(folder)

        return write

    def load(folder: Path) -> Any:
        from tests.lora_fx.test_gptqmodel import loaded

        return loaded(folder)

    def mixture_of(name: str) -> Callable[[], Any]:
        def make() -> Any:
            from tests.lora_fx.test_gptqmodel import written

            with tempfile.TemporaryDirectory() as folder:
                return load(written(Path(folder), name, mixture()))

        return make

    return {
        name.replace(",", ""): Variant(
            writer(name), {FROM_PRETRAINED: load}, also, mixture_of(name), load
        )
        for name in names
    }


def hqq(bits: int, axis: int = 1) -> Variant:
    """Layers of hqq, by its own functions for models of transformers, and by ``quantize``."""

    def load(folder: Path) -> Any:
        from hqq.core.quantize import BaseQuantizeConfig
        from hqq.models.hf.base import AutoHQQHFModel

        model, config = from_pretrained(folder), BaseQuantizeConfig(nbits=bits, axis=axis)
        AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.float32, device="cpu")
        return model

    def save_quantized(model: Any, folder: Path) -> None:
        from hqq.models.hf.base import AutoHQQHFModel

        AutoHQQHFModel.save_quantized(model, str(folder))

    def from_quantized(folder: Path) -> Any:
        from hqq.models.hf.base import AutoHQQHFModel

        how = {"compute_dtype": torch.float32, "device": "cpu"}
        return AutoHQQHFModel.from_quantized(str(folder), **how)

    name = f"hqq{bits}"
    loaders = {"`AutoHQQHFModel`": load}
    return Variant(
        write_dense,
        {QUANTIZE: made(name), **loaders} if axis == 1 else loaders,
        experts=(lambda: lora_fx.quantize(mixture(), name)) if axis == 1 else None,
        schemes=(name,),
        save=save_quantized,
        again={"`from_quantized`": from_quantized},
    )


def layers_of(scheme: str) -> Loader:
    """A model whose layers the library has made one by one."""

    def load(folder: Path) -> Any:
        from tests.quantized import quantized

        return quantized(from_pretrained(folder), scheme)

    return load


FORMATS = (
    Format("NF4, FP4", "bitsandbytes", {**bitsandbytes_4bit("nf4"), **bitsandbytes_4bit("fp4")}),
    Format(
        "LLM.int8()",
        "bitsandbytes",
        {
            "LLM.int8()": Variant(
                write_dense,
                {FROM_PRETRAINED: configured(bits_and_bytes(load_in_8bit=True))},
                experts=lambda: loaded_mixture(bits_and_bytes(load_in_8bit=True)),
                schemes=("int8 bitsandbytes",),
            )
        },
    ),
    Format("int8, int4", "torchao", {"int8": torchao_integers(8), "int4": torchao_integers(4)}),
    Format(
        "NF4 of torchao",
        "torchao",
        {
            "nf4": Variant(
                write_dense,
                {"`to_nf4` for each layer": layers_of("nf4 torchao")},
                schemes=("nf4 torchao",),
            )
        },
    ),
    Format(
        "FP8 with block scales",
        "transformers",
        {
            "FP8": Variant(
                write_fp8,
                LOADERS,
                experts=kept_mixture("fp8"),
                schemes=("fp8",),
            )
        },
    ),
    Format(
        "MXFP4 of gpt-oss",
        "transformers",
        {
            "MXFP4": Variant(
                write_gpt_oss, LOADERS, experts=kept_mixture("mxfp4"), weights=2, matrices=8
            )
        },
    ),
    Format(
        "W4A16 and other packed integers",
        "compressed_tensors",
        compressed_tensors("W4A16", "W4A16, rows", "W8A16", "W3A16"),
    ),
    Format(
        "the same, with zero points",
        "compressed_tensors",
        compressed_tensors("W4A16, zero points", also=("int4 compressed-tensors",)),
    ),
    Format(
        "W8A8, FP8 for tensors, rows or blocks, MXFP8",
        "compressed_tensors",
        compressed_tensors("W8A8", "FP8, dynamic", "FP8, static", "FP8, blocks", "MXFP8A16"),
    ),
    Format("MXFP4", "compressed_tensors", compressed_tensors("MXFP4A16")),
    Format("NVFP4", "compressed_tensors", compressed_tensors("NVFP4", "NVFP4A16")),
    Format(
        "GPTQ",
        "gptqmodel",
        gptqmodel(
            "GPTQ",
            "GPTQ, act-order",
            "GPTQ, 2 bits",
            "GPTQ, 3 bits",
            "GPTQ, 8 bits",
            also=("int4 gptqmodel",),
        ),
    ),
    Format("AWQ", "gptqmodel", gptqmodel("AWQ", "AWQ, 8 bits")),
    Format(
        "HQQ (hqq4, hqq8, hqq3, hqq2)", "hqq", {f"hqq{bits}": hqq(bits) for bits in (4, 8, 3, 2)}
    ),
    Format("HQQ, axis 0", "hqq", {"axis 0": hqq(4, axis=0)}),
)


def loaded_mixture(make: Callable[[], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        mixture().save_pretrained(folder)
        return from_pretrained(Path(folder), quantization_config=make())


# --- the steps ----------------------------------------------------------------------------------------


def cells_of(variant: Variant) -> list[str]:
    """What a model in a format did: a text for each column after the second."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        variant.write(folder / "base")
        loaded = dict(loaded_by(variant, folder / "base"))
        base = next(iter(loaded.values()))
        model = rewritten(base)
        again = lora_fx.merge(lora_fx.rewrite(base, CONFIG), requantize=True)
        return [
            ", ".join(loaded),
            tried(lambda: train(model, base)),
            tried(lambda: merge(model)),
            tried(lambda: save(again, variant, folder)),
            tried(lambda: export(model, variant, folder)),
            "not tried" if variant.experts is None else tried(lambda: adapt_experts(variant)),
        ]


def tried(step: Callable[[], str]) -> str:
    """What a step says, or the first sentence of the error that refuses it."""
    try:
        return step()
    except LoraFxError as error:
        sentence = re.split(r"[;:.] ", str(error))[0]
        return "refused: " + re.sub(r"^'[^']+' is", "it is", sentence)


def loaded_by(variant: Variant, folder: Path) -> Iterator[tuple[str, Any]]:
    """The models that keep the weights of a checkpoint quantized, by the words for what loads them."""
    loads = 0
    for words, load in variant.loaders.items():
        if load is keep_quantized and loads:
            return
        try:
            model = load(folder)
        except (RuntimeError, ValueError):  # of the library, for its own checkpoint
            continue
        if len(values_of(model)) == variant.weights:
            loads += 1
            yield words, model


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """The values of the quantized weights, by name."""
    adopted = share_copy(model)
    return {
        name: dense(weight).detach()
        for name, weight in adopted.named_parameters()
        if quantization_of(weight) is not None
    }


def rewritten(base: Any) -> Any:
    """A model with adapters in training mode, in fp32 beside its quantized weights."""
    model = lora_fx.rewrite(base, CONFIG).train()
    half = (torch.float16, torch.bfloat16)
    return model.float() if any(p.dtype in half for p in model.parameters()) else model


def train(model: Any, base: Any) -> str:
    """Takes a step, with gradients that are compared with those over dense weights of the same values."""
    plain = dense_twin(model, base).train()
    reference: Any = lora_fx.rewrite(plain, CONFIG, optimize=False).train()
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    reference.load_state_dict({name: p.detach() for name, p in factors.items()}, strict=False)
    for one in (model, reference):
        one(IDS, labels=IDS).loss.backward()
    errors = {}
    for name, factor in factors.items():
        gradient = reference.get_parameter(name).grad
        errors[name] = float((factor.grad - gradient).norm() / gradient.norm())
    before = {name: factor.detach().clone() for name, factor in factors.items()}
    torch.optim.AdamW(factors.values(), lr=1e-3).step()
    assert not any(torch.equal(factor, before[name]) for name, factor in factors.items())
    worst = max(errors.values())
    return "yes" if worst < GRADIENTS else f"gradients are off by {worst:.0e}"


def dense_twin(model: Any, base: Any) -> Any:
    """A dense model with the values of one that was rewritten."""
    plain = type(model)(copy.deepcopy(model.config))
    values = {name: dense(p).detach() for name, p in model.named_parameters()}
    names = {name for name, _ in plain.named_parameters()}
    if names <= {*values}:
        plain.load_state_dict({name: values[name] for name in names})
        return plain
    # The library has replaced fused experts by a layer for each matrix.
    plain = share_copy(base)
    for layer in plain.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(dense(layer.weight).detach().float())
    return plain.float()


def merge(model: Any) -> str:
    """Merges into dense weights, and into the same format."""
    result, report = lora_fx.merge(model, return_report=True)
    assert not values_of(result)
    assert report.max_ulp <= 0.5
    again: Any = lora_fx.merge(model, requantize=True)
    stored = {name: quantization_of(p) for name, p in model.named_parameters()}
    same = all(
        quantization_of(again.get_parameter(name)) == quantization
        for name, quantization in stored.items()
        if quantization is not None
    )
    return "dense, again" if same else "dense"


def save(model: Any, variant: Variant, folder: Path) -> str:
    """Saves a model that was merged into its format, and finds what loads it with the same values."""
    values = values_of(model)
    try:
        variant.save(model, folder / "saved")
    except Exception:  # noqa: BLE001  # transformers and safetensors raise what they like
        torch.save(model.state_dict(), folder / "state.pt")
        fresh = next(iter(variant.loaders.values()))(folder / "base")
        fresh.load_state_dict(torch.load(folder / "state.pt", weights_only=False))
        return STATE_DICT if same_values(fresh, values) else "no"
    for words, load in (variant.again or {**LOADERS, FROM_PRETRAINED: variant.reload}).items():
        try:
            if same_values(load(folder / "saved"), values):
                return words
        except (RuntimeError, ValueError):  # of the library, as above
            continue
    return "no"


def same_values(model: nn.Module, values: dict[str, Tensor]) -> bool:
    adopted = share_copy(model)
    found = {name: dense(adopted.get_parameter(name)).detach() for name in values}
    return all(
        torch.equal(found[name], value.to(found[name].dtype)) for name, value in values.items()
    )


def export(model: Any, variant: Variant, folder: Path) -> str:
    """Exports a model with its adapters, and names the operators that read the quantized weights."""
    report = lora_fx.export_onnx(model, folder / "model.onnx", {"input_ids": IDS})
    assert report.verified
    assert sum(form.weights for form in report.quantized) == variant.matrices
    stored = [quantization_of(p) for p in model.parameters()]
    bits = min(one.bits for one in stored if one is not None)
    operators = sorted({f"`{form.operator}`" for form in report.quantized})
    wider = bits <= 4 and all(form.bits > 8 for form in report.quantized)
    return ", ".join(operators) + (", in 8 bits" if wider else "")


def adapt_experts(variant: Variant) -> str:
    """Trains adapters on the experts of a mixture in the format, and merges them."""
    assert variant.experts is not None
    model = variant.experts()
    weights = [p for name, p in share_copy(model).named_parameters() if ".experts." in name]
    if all(quantization_of(p) is None and p.dtype.itemsize > 1 for p in weights):
        return "stay dense"
    plan = lora_fx.plan(model, CONFIG)
    refused = [one.reason for one in plan.rejections if ".experts." in one.name]
    if refused:
        raise LoraFxError(refused[0])
    adapted = rewritten(model)
    assert any(".experts." in name and p.requires_grad for name, p in adapted.named_parameters())
    gradients = train(adapted, model)
    merge(adapted)
    return gradients


# --- the table ----------------------------------------------------------------------------------------


def row_of(row: Format) -> str:
    """The row of a format, in Markdown, and a line for each reason of a refusal.

    Cells that differ between the models of the row have their names.
    """
    found = {name: cells_of(variant) for name, variant in row.variants.items()}
    texts, reasons = [row.name, row.library.replace("_", "-")], []
    for number, column in enumerate(COLUMNS[2:]):
        groups: dict[str, list[str]] = {}
        for name, cells in found.items():
            text, _, reason = cells[number].partition(": ")
            groups.setdefault(text, []).append(name)
            if reason:
                reasons.append(f"- {row.name}, {column}: {reason}.")
        shown = [f"{text} ({', '.join(names)})" for text, names in groups.items()]
        texts.append(next(iter(groups)) if len(groups) == 1 else "; ".join(shown))
    return "\n".join([f"| {' | '.join(texts)} |", *dict.fromkeys(reasons)])


_TABLE = re.compile(r"(<!-- formats -->\n).*?(<!-- end -->)", re.DOTALL)


def rows_of_page() -> dict[str, str]:
    """The rows of the page with their reasons, by the first column."""
    table = _TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert table is not None
    lines = table[0].splitlines()
    rows = {line.split(" | ")[0][2:]: line for line in lines if line.startswith("| ")}
    del rows[COLUMNS[0]]
    starts = {name: tuple(f"- {name}, {column}: " for column in COLUMNS) for name in rows}
    return {
        name: "\n".join([row, *(line for line in lines if line.startswith(starts[name]))])
        for name, row in rows.items()
    }


def table_of(rows: list[str]) -> str:
    """The table of these rows, followed by the reasons of refusals."""
    lines = [line for row in rows for line in row.splitlines()]
    reasons = [line for line in lines if line.startswith("- ")]
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    body = [line for line in lines if line not in reasons]
    return "\n".join([*head, *body, *(["", "Refused:", "", *reasons] if reasons else [])]) + "\n"


def main() -> None:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of rows; all by default")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    quiet_transformers()
    before, rows = rows_of_page(), []
    for row in FORMATS:
        chosen = not options.names or any(part in row.name for part in options.names)
        if chosen and not is_installed(row.library):
            sys.stderr.write(
                f"{row.name}: {row.library} is not installed; its row stays as it is\n"
            )
        if chosen and is_installed(row.library):
            sys.stderr.write(f"{row.name}\n")  # a row takes half a minute
            rows.append(row_of(row))
        elif row.name in before:
            rows.append(before[row.name])
    table = table_of(rows)
    if not options.write:
        sys.stdout.write(table)
        return
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(_TABLE.sub(lambda m: f"{m[1]}{table}{m[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
