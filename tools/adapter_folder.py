"""Look into an adapter folder (``inspect_adapter``), and check if a runtime applies an adapter (``verify``).

The singular values of an update ``ΔW = s · B A`` are computed from the factors. With the QR decompositions
``B = Q R`` and ``Aᵀ = P S`` they are the singular values of ``s · R Sᵀ``, which is only [r, r].
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.checkpoint import (
    Receipt,
    StackedDown,
    StackedUp,
    Verdict,
    call_with,
    read_receipt,
    read_tensors,
    without_prefix,
)
from lora_fx.config import LoraConfig, rank_for, scale_for
from lora_fx.delivery import run_session
from lora_fx.errors import CheckpointError, ConfigError, some
from lora_fx.export.providers import ProviderName
from lora_fx.ir import (
    Site,
    folded,
    html_block,
    html_lines,
    html_table,
    join,
    json_text,
    plain,
    text_table,
)
from lora_fx.kinds import chosen_kind, site_kind
from lora_fx.methods import check_peft_type
from lora_fx.servers import Server

__all__ = [
    "AdapterReport",
    "SiteFigures",
    "effective_rank",
    "figures_of",
    "heat_map",
    "inspect_adapter",
    "read_folder",
    "singular_values",
    "verify",
]

_FACTOR = re.compile(
    r"(?:(?P<site>.+)\.)?lora_(?:embedding_)?(?P<which>[AB])(?:\.weight)?(?P<bias>\.bias)?"
)
_LAYER = re.compile(r"^(?P<before>.*?)\.(?P<layer>\d+)(?:\.(?P<rest>.+))?$")


@dataclasses.dataclass(frozen=True, slots=True)
class SiteFigures:
    """Figures about the update of one weight, ``ΔW = s · B A``.

    Attributes:
        name: FQN of the module, or of the parameter.
        rank: Rank of the factors.
        scale: The factor s of the update, from the configuration.
        shape: [out, in] of the update; kernels and groups count as inputs.
        experts: Number of experts; 1 for a weight without experts.
        norm: ``‖ΔW‖``, Frobenius, over all experts.
        values: Singular values of all experts together, the largest first.
        effective_rank: ``exp(-Σ pᵢ ln pᵢ)`` with ``pᵢ = σᵢ / Σ σ`` (Roy and Vetterli 2007, EUSIPCO), the mean
            over experts; 0 if nothing was learned.
        kind: Name of the adapter kind.
        parameters: Elements of A and B.
        dtype: Dtype of A.
    """

    name: str
    rank: int
    scale: float
    shape: tuple[int, int]
    experts: int
    norm: float
    values: tuple[float, ...]
    effective_rank: float
    kind: str = "lora"
    parameters: int = 0
    dtype: str = ""


@dataclasses.dataclass(frozen=True, repr=False)
class AdapterReport:
    """Contents of an adapter folder, to be printed. A notebook shows it with a heat map.

    Attributes:
        path: The folder.
        config: Its configuration.
        sites: The figures of each adapted weight, in the order of the file.
        others: Shapes of other saved tensors by key.
        parameters: Elements of all tensors.
        size: Bytes of the folder's files.
    """

    path: Path
    config: LoraConfig
    sites: tuple[SiteFigures, ...]
    others: Mapping[str, tuple[int, ...]]
    parameters: int
    size: int

    columns = ("site", "r", "scale", "ΔW", "‖ΔW‖", "largest σ", "effective rank")

    def rows(self) -> list[tuple[str, ...]]:
        """Return the sites as rows of a table, whose headings are :attr:`columns`."""
        return [
            (
                site.name,
                str(site.rank),
                f"{site.scale:g}",
                (f"{site.experts}x" if site.experts > 1 else "") + "x".join(map(str, site.shape)),
                f"{site.norm:.4g}",
                f"{site.values[0] if site.values else 0:.4g}",
                f"{site.effective_rank:.2f}",
            )
            for site in self.sites
        ]

    def heat(self, what: str = "norm") -> tuple[list[str], list[str], list[list[float | None]]]:
        """Arrange the sites as layers × modules.

        Args:
            what: ``norm``, ``effective_rank``, ``rank`` or ``scale``.

        Returns:
            Names of the layers, names of the modules, and the values, None for a missing site.
        """
        cells: dict[tuple[str, str], float] = {}
        for site in self.sites:
            match = _LAYER.match(site.name)
            position = (
                # A layer that is itself adapted has its list's name instead of a module's.
                (f"{match['before']}.{match['layer']}", match["rest"] or match["before"])
                if match
                else ("", site.name)
            )
            cells[position] = float(getattr(site, what))
        layers = list(dict.fromkeys(layer for layer, _ in cells))
        modules = list(dict.fromkeys(module for _, module in cells))
        return layers, modules, [[cells.get((layer, m)) for m in modules] for layer in layers]

    def warnings(self) -> list[str]:
        """Return likely mistakes: sites that learned nothing, or values that are not finite."""
        idle = [site.name for site in self.sites if site.norm == 0]
        broken = [site.name for site in self.sites if not math.isfinite(site.norm)]
        lines = []
        own = chosen_kind(self.config)
        in_figures = own.direct and not own.transforms and not own.new_base
        if kinds := sorted(() if in_figures else {site.kind for site in self.sites}):
            lines.append(
                f"figures of s · B A: what {', '.join(kinds)} changes depends on the base, which is not read"
            )
        if idle:
            lines.append(f"no update at {len(idle)} site(s): {some(idle, 3)}")
        if broken:
            lines.append(f"not finite at {len(broken)} site(s): {some(broken, 3)}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON. Values that are not finite are None."""
        return {
            "path": str(self.path),
            "config": self.config.to_dict(),
            "parameters": self.parameters,
            "bytes": self.size,
            "sites": plain(self.sites),
            "others": {key: list(shape) for key, shape in self.others.items()},
        }

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json_text(self.to_dict())

    def facts(self) -> list[tuple[str, str]]:
        """Return labels and values for the folder as a whole: its base, kinds, rank and size."""
        base = self.config.base_model_name_or_path
        kinds = sorted({site.kind for site in self.sites})
        return [
            ("folder", str(self.path)),
            *([("base", str(base))] if base else []),
            ("kind", ", ".join(kinds) or "no factors"),
            ("rank", f"r {self.config.r}, alpha {self.config.lora_alpha:g}"),
            (
                "holds",
                f"{len(self.sites)} site(s), {self.parameters:,} parameters, {self.size:,} bytes",
            ),
        ]

    def __str__(self) -> str:
        lines = [f"{label}: {text}" for label, text in self.facts()]
        lines += self.warnings()
        lines += text_table(self.columns, self.rows(), left=1)
        lines += [f"also: {row.name} {row.cells[0]} {row.times}".rstrip() for row in self._others()]
        return "\n".join(lines)

    def _others(self) -> Any:
        return folded((key, "x".join(map(str, shape))) for key, shape in self.others.items())

    def __repr__(self) -> str:
        return f"<AdapterReport: {self.facts()[-1][1]}; print it for each site>"

    def _repr_html_(self) -> str:
        header = html_lines(f"{label}: {text}" for label, text in self.facts())
        header += html_lines(self.warnings(), "⚠ ")
        maps = "".join(
            html_block(title, heat_map(*self.heat(figure)), opened=figure == "norm")
            for title, figure in (("‖ΔW‖", "norm"), ("effective rank", "effective_rank"))
        )
        table = html_block(f"sites ({len(self.sites)})", html_table(self.columns, self.rows()))
        return f"<div>{header}{maps}{table}</div>"


def inspect_adapter(folder: str | os.PathLike[str]) -> AdapterReport:
    """Report an adapter folder's configuration, sites, norms, singular values and effective ranks.

    No model is needed, and no weight of the base is read.

    Args:
        folder: An adapter folder of PEFT or lora_fx.

    Raises:
        CheckpointError: If the folder is missing or damaged, or a factor has no partner.
        ConfigError: If the adapter needs a feature that lora_fx does not have.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: give the local folder of an adapter")
    config, pairs, shapes = read_folder(path)
    factors = [factor for pair in pairs.values() for factor in pair.values()]
    return AdapterReport(
        path,
        config,
        tuple(figures_of(name, pair, config, path) for name, pair in pairs.items()),
        shapes,
        sum(factor.numel() for factor in factors) + sum(map(math.prod, shapes.values())),
        sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
    )


def read_folder(
    path: Path,
) -> tuple[LoraConfig, dict[str, dict[str, Tensor]], dict[str, tuple[int, ...]]]:
    """Read an adapter folder: its configuration, A and B of each site, and the shapes of other tensors.

    Raises:
        CheckpointError: If the folder has no adapter, or an unreadable one.
    """
    check_peft_type(path)
    config = LoraConfig.from_pretrained(path)
    pairs: dict[str, dict[str, Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for key, value in without_prefix(read_tensors(path)[0]).items():
        match = _FACTOR.fullmatch(key)
        if match is not None and not match["bias"]:
            site = _name_in_plan(match["site"] or "", config)
            pairs.setdefault(site, {})[match["which"]] = value
            continue
        shapes[key] = tuple(value.shape)
    return config, pairs, shapes


def _name_in_plan(holder: str, config: LoraConfig) -> str:
    """Return the name of a site in a plan, from the name of the module that holds its factors in a file.

    The factors of a bare parameter ``mix`` are stored under ``mix_lora``. PEFT stores them under the module
    that has the parameter. The targets of the configuration are names of the plan.
    """
    modules = config.target_modules if isinstance(config.target_modules, tuple) else ()
    if holder.endswith("_lora") and (name := holder.removesuffix("_lora")) in modules:
        return name
    inside = [name for name in config.target_parameters or () if name.rpartition(".")[0] == holder]
    single = len(inside) == 1 and holder not in modules and not inside[0].endswith(".weight")
    return inside[0] if single else holder


@torch.no_grad()
def figures_of(
    name: str, factors: Mapping[str, Tensor], config: LoraConfig, path: Path
) -> SiteFigures:
    """Return the figures of one site from its factors ``"A"`` and ``"B"``.

    Raises:
        CheckpointError: If the factors are not a pair.
    """
    if len(factors) < 2:
        (which,) = factors
        other = "B" if which == "A" else "A"
        raise CheckpointError(
            f"{path}: {name or 'the root'} has lora_{which} and no lora_{other}: the file was cut, or "
            "its keys were renamed"
        )
    if any(factor.dim() < 2 for factor in factors.values()):
        shapes = {which: list(factor.shape) for which, factor in factors.items()}
        raise CheckpointError(
            f"{path}: {name or 'the root'}: lora_A has shape {shapes['A']} and lora_B {shapes['B']}: "
            "they are no matrices"
        )
    pair = _whole_factors(name, config, factors["A"], factors["B"])
    a, b = (factor.double().flatten(1) for factor in pair)
    groups = _groups(factors["A"], b)
    rank, scale = len(a), scale_for(name, config)
    planned = rank_for(name, config)
    experts = rank // planned if rank > planned and rank % planned == 0 else 1
    if a.shape[0] != b.shape[1] * groups:
        raise CheckpointError(
            f"{path}: {name or 'the root'}: lora_A has {a.shape[0]} rows and lora_B {b.shape[1]} "
            "columns: they are no pair"
        )
    if experts > 1:
        downs, ups = StackedDown(experts).decode(a), StackedUp(experts).decode(b)
    else:
        # In PEFT, A reads all inputs of a grouped convolution. Each group of B reads its share of the ranks.
        downs, ups = a[None], torch.block_diag(*b.chunk(groups))[None]  # type: ignore[no-untyped-call]
    each = [scale * singular_values(*pair) for pair in zip(downs, ups, strict=True)]
    values = torch.cat(each).sort(descending=True).values
    return SiteFigures(
        name,
        rank // experts,
        scale,
        (b.shape[0], a.shape[1]),
        experts,
        float(values.norm()),
        tuple(values.tolist()),
        sum(map(effective_rank, each)) / experts,
        chosen_kind(config).name,
        sum(factor.numel() for factor in factors.values()),
        str(factors["A"].dtype),
    )


def _whole_factors(name: str, config: LoraConfig, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B whose product is the update of a weight, for kinds that store other factors.

    Factors of all other kinds are returned unchanged.
    """
    if a.dim() != 2:
        return a, b
    out, inner = b.shape[0], a.shape[1]
    weight = join(name, "weight")
    site = Site(name, "linear", "linear", weight, None, inner, out, "out_in", (out, inner), ())
    kind = site_kind(site, config)
    return (a, b) if kind.slots(site) else kind.merged_factors(site, a, b, {})


def _groups(a: Tensor, b: Tensor) -> int:
    """Return the number of groups of a convolution, from the shapes of its factors.

    A has the ranks of all groups, B the rank of one group.
    """
    of_one = b.shape[1]
    several = a.dim() > 2 and of_one > 0 and len(a) > of_one and len(a) % of_one == 0
    return len(a) // of_one if several and len(b) % (len(a) // of_one) == 0 else 1


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Return the singular values of ``B A``, the largest first, from two thin decompositions.

    They are NaN if training has diverged.

    Args:
        a: [r, in].
        b: [out, r].
    """
    if not (a.isfinite().all() and b.isfinite().all()):
        return a.new_full((min(len(a), b.shape[1]),), math.nan)
    values: Tensor = torch.linalg.svdvals(torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T)
    return values


def effective_rank(values: Tensor) -> float:
    """Return the effective rank of these singular values (see :class:`SiteFigures`), or 0 if all are zero."""
    total = values.sum()
    if not total > 0:
        return float(total) if total.isnan() else 0.0
    shares = values / total
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def heat_map(layers: list[str], modules: list[str], values: list[list[float | None]]) -> str:
    """Draw layers × modules as an HTML table of the values. The larger a value, the darker its cell."""
    most = max((abs(x) for row in values for x in row if x is not None and x == x), default=0)

    def cell(value: float | None) -> str:
        if value is None:
            return "<td></td>"
        share = abs(value) / most if most and math.isfinite(value) else 0.0
        color = f"rgba(35,120,200,{0.08 + 0.8 * share:.2f})"
        ink = ";color:#fff" if share > 0.6 else ""
        return f'<td style="background:{color}{ink};text-align:right">{value:.3g}</td>'

    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *modules))
    body = "".join(
        f"<tr><th>{escape(layer)}</th>{''.join(map(cell, row))}</tr>"
        for layer, row in zip(layers, values, strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# --- asking a model, a file or a server -----------------------------------------------------------
# ``verify`` runs the inputs that are stored in an adapter's receipt, in a model, a file or a server.


_OR = {"adapter": "", "subject": ", an address or a model"}


def verify(
    adapter: str | os.PathLike[str],
    subject: nn.Module | str | os.PathLike[str],
    *,
    name: str | None = None,
    base_name: str | None = None,
    provider: ProviderName = "cpu",
) -> Verdict:
    """Check if a runtime applies an adapter.

    Args:
        adapter: An adapter folder that was saved with ``receipt=``.
        subject: A model, an ``.onnx`` file, or the address of a server (``http://127.0.0.1:8000/v1``). A file
            that takes adapters gets this one. A server must speak OpenAI's protocol and report tokens by
            their ids, as vLLM does.
        name: The name that the server has for the adapter.
        base_name: The name that the server has for the base. By default the one that it reports, if any.
        provider: "cpu" or "cuda", for a file.

    Returns:
        The verdict, with the distances on which it is based.

    Raises:
        CheckpointError: If the folder has no receipt, or the receipt is of another model.
        ConfigError: If the model or the server cannot run the inputs.
        ExportError, ProviderError: If the file cannot be run.
    """
    for argument, value in (("adapter", adapter), ("subject", subject)):
        if not isinstance(value, str | os.PathLike) and not (
            argument == "subject" and isinstance(value, nn.Module)
        ):
            raise ConfigError(f"{argument} is a {type(value).__name__}: give a path{_OR[argument]}")
    folder = Path(adapter)
    receipt = read_receipt(folder)
    at_server = str(subject).startswith(("http://", "https://"))
    if not at_server and not (name is None and base_name is None):
        raise ConfigError(
            "name= and base_name= are what a server calls its models: give its address"
        )
    if isinstance(subject, nn.Module):
        return receipt.judge(receipt.read(_run(subject, receipt)))
    if at_server:
        return _judge_server(receipt, str(subject).rstrip("/"), name, base_name)
    return _judge_file(receipt, Path(subject), folder, provider)


def _run(model: nn.Module, receipt: Receipt) -> Any:
    training = [(module, module.training) for module in model.modules()]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs = {key: value.to(device) for key, value in receipt.inputs.items()}
    model.eval()
    try:
        with torch.no_grad():
            return call_with(model, inputs)
    finally:
        for module, mode in training:
            module.training = mode


def _judge_file(receipt: Receipt, path: Path, folder: Path, provider: ProviderName) -> Verdict:
    from lora_fx.export.adapter_manifest import MANIFEST_KEY
    from lora_fx.export.session import OnnxSession

    session = OnnxSession(path, provider)

    def answer(adapter: str | None) -> Tensor:
        return receipt.read(run_session(session, receipt.inputs, adapter))

    if MANIFEST_KEY not in session.metadata:
        return receipt.judge(answer(None))
    session.load_adapter("verified", folder)
    return receipt.judge(answer("verified"), answer(None))


# --- servers --------------------------------------------------------------------------------------


def _judge_server(
    receipt: Receipt, address: str, name: str | None, base_name: str | None
) -> Verdict:
    if not receipt.tokens:
        raise ConfigError("a server gives log-probabilities of tokens, and this model has none")
    server = Server(address)
    known = server.models()
    if name is None or name not in known:
        raise ConfigError(
            f"{address} has no model {name!r}: give name= (--name) one of {some(list(known))}"
        )
    base = base_name or known[name].get("parent")
    answer = _log_probabilities(receipt, server, name)
    without = None if base is None or base == name else _log_probabilities(receipt, server, base)
    return receipt.judge(answer, without)


def _log_probabilities(receipt: Receipt, server: Server, name: str) -> Tensor:
    """Return a server's log-probabilities of the tokens in a receipt, [rows, tokens].

    Tokens that the server does not report are NaN.
    """
    ids = receipt.inputs.get("input_ids", receipt.inputs.get(""))
    if ids is None:
        raise ConfigError("a server takes token ids, and the receipt has no input_ids")
    mask = receipt.inputs.get("attention_mask", torch.ones_like(ids))
    prompts = [tokens[counts.bool()].tolist() for tokens, counts in zip(ids, mask, strict=True)]
    reported = server.next_tokens(name, prompts, receipt.chosen.shape[1] // 2)
    answer = torch.full(receipt.chosen.shape, float("nan"), dtype=torch.float64)
    for row, by_id in enumerate(reported):
        for column, token in enumerate(receipt.chosen[row].tolist()):
            answer[row, column] = by_id.get(token, float("nan"))
    return answer
