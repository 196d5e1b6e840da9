"""Plans: the sites to adapt and their adapters, in numbers and in words."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch

from lora_fx.config import LoraConfig, needs_data
from lora_fx.errors import ConfigError, hint, some
from lora_fx.ir.advice import Advice, Spending
from lora_fx.ir.savings import Savings
from lora_fx.ir.site import Rejection, Site
from lora_fx.ir.tables import (
    FoldedRow,
    folded,
    grouped,
    html_block,
    html_lines,
    html_table,
    text_table,
)

__all__ = ["Comparison", "Deployment", "Kept", "Plan", "PlannedSite", "PlannedTokens", "Skipped"]


def _times(row: FoldedRow) -> str:
    return f" {row.times}" if row.times else ""


_IDLE = ": matches nothing"


_FUSED = "fused, and a part can be named alone"


class Deployment(NamedTuple):
    """The storage for which adapters are trained. Products use the adapted weights rounded to this storage.

    Attributes:
        format: Name of the format, or of the dtype.
        dtype: The dtype to which weights are rounded; None for a format of quantized weights.
        block_size: Number of values that share a scale; None for one scale a row.
        double: True if the scales are quantized, too.
        as_base: True if the weight of the base is quantized, and the adapted weight keeps its format.
    """

    format: str
    dtype: torch.dtype | None = None
    block_size: int | None = None
    double: bool = False
    as_base: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedSite:
    """A selected site and its adapter.

    Attributes:
        site: The operation.
        rank, alpha, scale, dropout: The adapter's hyperparameters at this site; rank 0 and scale 1 for a
            kind without factors.
        parameters: Trainable elements added.
        frozen: Elements of factors that are not trained.
        flops: Extra forward FLOPs for one token.
        tied: Name of the site whose factors it shares, transposed; empty if it has its own.
        saved: Bytes saved for backward for one token, beyond those of the frozen model: the input, the
            masked input with its mask if there is dropout, the rank-r activation, and the tensors of the
            kind.
        kind: Name of the adapter kind (:mod:`lora_fx.kinds`).
        options: The options of the kind; None if it has none.
        reason: The setting of the configuration that selects it.
        deploy: The storage that its adapted weight is trained for; None for no rounding.
        least_change: The smallest ``‖ΔW‖ / ‖W‖`` at which a merge keeps nine tenths of the change ΔW; None if
            it was not predicted.
        gain: The share that its rank adds to :attr:`Spending.kept`; None without a budget.
    """

    site: Site
    rank: int
    alpha: float
    scale: float
    dropout: float
    parameters: int
    flops: int
    saved: int
    tied: str = ""
    kind: str = "lora"
    reason: str = ""
    deploy: Deployment | None = None
    least_change: float | None = None
    gain: float | None = None
    options: Mapping[str, Any] | None = None
    frozen: int = 0

    @property
    def name(self) -> str:
        """FQN of the site."""
        return self.site.name


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedTokens:
    """Rows of an embedding, or of a head, that are trained as whole rows.

    Attributes:
        site: The lookup, or the product that computes a logit for every token.
        indices: The rows, in the order in which they are stored.
        tied: For a head that shares the weight of an embedding: the name of the embedding, which has the
            trained rows. Empty for any other site.
    """

    site: Site
    indices: tuple[int, ...]
    tied: str = ""

    @property
    def name(self) -> str:
        """FQN of the site."""
        return self.site.name

    @property
    def lookup(self) -> bool:
        """True if the site looks up the rows, False if it is a product with the rows."""
        return self.site.family == "embedding"

    @property
    def parameters(self) -> int:
        """Trainable elements added."""
        return 0 if self.tied else len(self.indices) * self.site.weight_shape[1]


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped:
    """A linear operation that the configuration does not select, with the reason."""

    site: Site
    reason: str


class Kept(NamedTuple):
    """Bytes that a training step with the example inputs saves for its backward pass.

    Attributes:
        frozen: Bytes for the model without adapters, with gradients computed down to the embeddings.
        adapted: Bytes for the model with adapters, by the value of ``memory=``, as :func:`lora_fx.rewrite`
            returns it if no example inputs are passed.
    """

    frozen: int
    adapted: Mapping[str, int]

    def __str__(self) -> str:
        sizes = ", ".join(
            f"{size / 2**20:,.1f} with memory={name!r}" for name, size in self.adapted.items()
        )
        return (
            f"a step with the example inputs keeps {sizes} (MiB; without adapters "
            f"{self.frozen / 2**20:,.1f})"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """The dry run: the changes that ``rewrite`` would make, with reasons.

    ``str(plan)`` is a table, in which equal layers are one row. A notebook shows a table that folds and
    sorts. ``plan.to_json()`` has all the data.

    Attributes:
        sites: The sites to adapt.
        skipped: Linear operations that are not selected, with the reason.
        rejections: Operations that cannot be adapted, with the reason.
        unmatched: Entries of the configuration that selected nothing.
        saved_modules: Modules trained in full (``modules_to_save``).
        biases: FQNs of the biases that are trained.
        config: The configuration.
        frontend: The front-end that captured the model.
        notes: Reasons why the other front-ends were not used.
        base_parameters: Elements of the model's own parameters, shared ones once.
        extra_parameters: Trainable elements outside the adapters (biases, ``modules_to_save``).
        tokens: Rows of embeddings that are trained (``trainable_token_indices``).
        kinds: The kinds of the sites that train more than A and B, by name, each with the rest in words.
        sample_cost: Extra FLOPs and saved bytes for one sample, if sites differ in their positions; None if
            that is unknown, or they do not differ.
        site_costs: The same costs for each site, in the order of ``sites``; empty without ``sample_cost``.
        fresh: FQNs of modules of the base that start at random, because no checkpoint has them, and that
            nothing trains, such as a new classification head.
        loss: With ``loss="chunked"``: the heads of the model, each with "chunked" or the reason why its
            logits are computed all at once. None without that option.
        kept: Bytes that a training step with the example inputs saves. None without such inputs, and if the
            bytes cannot be counted without values.
        savings: With ``memory="least"``: the modules that are recomputed or run in tiles. None without it.
        merge_into: The storage for which the sites have a ``least_change``; empty for none.
        advice: Advice on the targets, the rank and the learning rate.
        spent: The use of a budget; None without one.
        sample_flops: Forward FLOPs of the linear operations of the base for one sample; None without
            ``sample_cost``, and if the positions of one of them are unknown.
    """

    sites: tuple[PlannedSite, ...]
    skipped: tuple[Skipped, ...]
    rejections: tuple[Rejection, ...]
    unmatched: tuple[str, ...]
    config: LoraConfig
    frontend: str
    notes: tuple[str, ...] = ()
    saved_modules: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    base_parameters: int = 0
    extra_parameters: int = 0
    tokens: tuple[PlannedTokens, ...] = ()
    kinds: tuple[tuple[str, str], ...] = ()
    sample_cost: tuple[int, int] | None = None
    site_costs: tuple[tuple[int, int], ...] = ()
    fresh: tuple[str, ...] = ()
    loss: tuple[tuple[str, str], ...] | None = None
    kept: Kept | None = None
    savings: Savings | None = None
    merge_into: str = ""
    advice: Advice = dataclasses.field(default_factory=Advice)
    spent: Spending | None = None
    sample_flops: int | None = None

    def _predicted(self) -> str:
        """Return in words how large changes have to be to survive a merge."""
        least = sorted(row.least_change for row in self.sites if row.least_change is not None)
        if not least:
            return f"what a merge into {self.merge_into} keeps is not known for any site"
        low, middle, high = least[0], least[len(least) // 2], least[-1]
        return (
            f"a merge into {self.merge_into} that rounds to nearest keeps nine tenths of a change that is at "
            f"least {100 * middle:.2g} % of its weight's norm (by site {100 * low:.2g} % to "
            f"{100 * high:.2g} %)"
        )

    @property
    def parameters(self) -> int:
        """Elements that an optimizer gets: another name for ``trainable_parameters``."""
        return self.trainable_parameters

    @property
    def unit(self) -> Literal["token", "sample", "position"]:
        """The unit of :attr:`flops` and :attr:`saved`: a token of the input, if there are no convolutions.

        Convolutions compute an output at each position, and layers differ in their number of positions. With
        convolutions, the unit is a sample if the positions of a sample are known, and else a position.
        """
        if self.sample_cost is not None:
            return "sample"
        return "position" if any(row.site.family == "conv" for row in self.sites) else "token"

    @property
    def flops(self) -> int:
        """Extra forward FLOPs of all adapters for one :attr:`unit`."""
        return self.sample_cost[0] if self.sample_cost else sum(row.flops for row in self.sites)

    @property
    def saved(self) -> int:
        """Bytes saved for backward for one :attr:`unit`, beyond those of the frozen model, at most.

        This is the sum over separate operations: the input and ``x Aᵀ``, and with dropout the tensors of the
        plain form. The sum does not know which tensors layers share, the base saves anyway, or
        ``memory="balanced"`` recomputes. :attr:`kept` counts a whole step.
        """
        return self.sample_cost[1] if self.sample_cost else sum(row.saved for row in self.sites)

    def cost(self) -> str:
        """Return the cost of the adapters beyond the frozen model, in words."""
        text = (
            f"each {self.unit} costs {self.flops:,} more FLOPs forward and {self.saved:,} bytes kept for "
            "backward"
        )
        if self.savings is not None:
            text += ' with memory="fast"; memory="least" keeps the inputs of blocks'
        if self.unit == "position":
            text += (
                ", but layers differ in their positions: example_inputs tell the cost of a sample"
            )
        return text

    @property
    def trainable_parameters(self) -> int:
        """Elements that an optimizer gets."""
        return self.added_parameters + self.extra_parameters

    @property
    def added_parameters(self) -> int:
        """Elements that the adapters add to the model: factors and trained rows."""
        return sum(row.parameters for row in self.sites) + sum(
            row.parameters for row in self.tokens
        )

    @property
    def total_parameters(self) -> int:
        """Elements of the model with its adapters."""
        frozen = sum(row.frozen for row in self.sites)
        return self.base_parameters + self.added_parameters + frozen

    def totals(self) -> tuple[str, str]:
        """Return the number of trainable elements and that of all parameters, in words."""
        total, trained = self.total_parameters, self.trainable_parameters
        share = 100 * trained / total if total else 0.0
        return f"{trained:,} trainable", f" of {total:,} parameters ({share:.4f} %)"

    def remarks(self) -> list[str]:
        """Return facts that the table of sites does not show: formats, kinds, other trained parameters."""
        start = self.config.init_lora_weights
        stored = Counter(str(row.site.quantized) for row in self.sites if row.site.quantized)
        lines = [f"the base's weight in {text}: {count} site(s)" for text, count in stored.items()]
        targets = Counter(row.deploy.format for row in self.sites if row.deploy)
        lines += [
            f"trained for {name}, which merges and exports store: {count} site(s)"
            for name, count in targets.items()
        ]
        if self.merge_into:
            lines.append(self._predicted())
        if self.spent is not None:
            lines.append(self.spent.line())
        for kind, trains in self.kinds:
            count = sum(row.kind == kind for row in self.sites)
            lines.append(f"with {trains}: {count} site(s)")
        if self.saved_modules:
            lines.append("trained in full: " + ", ".join(self.saved_modules))
        for row in self.tokens:
            owner = f", those of {row.tied}" if row.tied else ""
            lines.append(f"rows trained: {len(row.indices)} of {row.name}{owner}")
        if self.biases:
            lines.append(f"biases trained: {len(self.biases)}")
        if self.kept is not None:
            lines.append(str(self.kept))
        if self.savings is not None:
            lines += self.savings.lines()
        if needs_data(start):
            lines.append(
                f"init_lora_weights={start!r} needs data: after rewrite, call "
                "lora_fx.initialize(model, dataloader); until then the start is that of True"
            )
        return [*lines, *self._of_loss()]

    @property
    def losses_left(self) -> tuple[str, ...]:
        """The reasons why no loss is computed in chunks, for ``loss="chunked"``.

        Empty without that option, or if a loss may be computed in chunks.
        """
        chunked = any(outcome == "chunked" for _, outcome in self.loss or ())
        return () if self.loss is None or chunked else tuple(self._of_loss())

    def _of_loss(self) -> Iterator[str]:
        """Yield a line of text for each head: its loss is computed in chunks, or the reason why not.

        Yield nothing without ``loss="chunked"``.
        """
        for name, outcome in self.loss or ():
            chunked = outcome == "chunked"
            yield (
                f"loss in chunks: {name}, where a call computes a cross entropy of its output, and then "
                "holds no logits"
                if chunked
                else f"loss of all logits: {name}: {outcome}"
            )
        if self.loss == ():
            yield (
                "loss of all logits: of the operations that can be adapted, none is known as the head whose "
                "output goes to a cross entropy"
            )

    def sections(self) -> dict[str, list[tuple[str, str]]]:
        """Return the lists below the table, by title: names, each with its remark."""
        tables = {row.site.weight for row in self.sites if row.tied}
        saved = tuple(f"{name}." for name in self.saved_modules)  # remarks list these
        return {
            "tied weights, untied by a merge": [
                (row.name, f"shared with {', '.join(row.site.tied_to)}")
                for row in self.sites
                if row.site.tied_to and not row.tied and not tables & set(row.site.tied_to)
            ],
            "tied weights that stay so": [
                (row.name, f"the transposed adapter of {row.tied}")
                for row in self.sites
                if row.tied
            ],
            _FUSED: [
                (row.name, ", ".join(name for name, _ in row.site.parts))
                for row in self.sites
                if row.site.parts
            ],
            "rank beyond the weight's": [
                (row.name, f"{row.rank}, where min(in, out) is {least}")
                for row in self.sites
                if row.site.family != "conv"
                and row.rank > (least := min(row.site.in_features, row.site.out_features))
            ],
            "not selected": [
                (skipped.site.name, skipped.reason)
                for skipped in self.skipped
                if not f"{skipped.site.name}.".startswith(saved)
            ],
            "not in tiles of tokens": [*self.savings.left] if self.savings is not None else [],
            "cannot be adapted": [
                (rejection.name or "(root)", rejection.reason) for rejection in self.rejections
            ],
        }

    def why(self, name: str) -> dict[str, str]:
        """Return the outcome, with its reason, for each operation that a name selects.

        Args:
            name: An FQN, the end of one (``q_proj``), or a module with operations inside.

        Raises:
            ConfigError: If the name selects no operation. The message has the nearest names, if any is near.
        """
        outcomes = {
            row.name: f"adapted: {row.reason}; {self._adapter_text(row)}" for row in self.sites
        }
        outcomes |= {
            skipped.site.name: f"not selected: {skipped.reason}" for skipped in self.skipped
        }
        outcomes |= {
            rejection.name: f"cannot be adapted: {rejection.reason}"
            for rejection in self.rejections
        }
        outcomes |= dict.fromkeys(self.saved_modules, "trained in full: modules_to_save")
        outcomes |= {
            row.name: f"rows trained: {len(row.indices)} (trainable_token_indices)"
            for row in self.tokens
        }
        selected = {
            fqn: text
            for fqn, text in outcomes.items()
            if f".{fqn}".endswith(f".{name}") or fqn.startswith(f"{name}.") or not name
        }
        if not selected:
            sites = [*(row.site for row in self.sites), *(row.site for row in self.skipped)]
            layers = [site.name for site in sites if f".{site.weight}".endswith(f".{name}")]
            if layers:
                raise ConfigError(
                    f"{name!r} is the weight of a layer: name the layer, {some(layers, between=' or ')}"
                )
            ends = (fqn.rpartition(".")[2] for fqn in outcomes)
            names = dict.fromkeys((*outcomes, *ends))
            nearest = hint(name, names, "; did you mean {}?", cutoff=0.6)
            nearest = nearest or "; print the plan for the names of all"
            raise ConfigError(f"no linear operation is called {name!r}{nearest}")
        return selected

    @staticmethod
    def _adapter_text(row: PlannedSite) -> str:
        """Describe the adapter of a site in a line."""
        size = f"{row.site.pattern} of {_stored(row.site)}"
        if not row.rank:
            return f"{size}, {row.kind}"
        kind = "" if row.kind == "lora" else f", {row.kind}"
        drop = f", dropout {row.dropout:g}" if row.dropout else ""
        target = f", for {row.deploy.format}" if row.deploy else ""
        return f"{size}, r {row.rank}, scale {row.scale:g}{drop}{kind}{target}"

    def changes(self, other: Plan) -> dict[str, tuple[str, str]]:
        """Return the differences from another plan of the same model: by name, the adapter in each plan.

        Args:
            other: The other plan.
        """
        own, theirs = (
            {row.name: self._adapter_text(row) for row in plan.sites}
            | dict.fromkeys(plan.saved_modules, "trained in full")
            | dict.fromkeys(plan.biases, "trained")
            | {row.name: f"{len(row.indices)} rows trained" for row in plan.tokens}
            for plan in (self, other)
        )
        return {
            name: (own.get(name, "-"), theirs.get(name, "-"))
            for name in {**own, **theirs}
            if own.get(name) != theirs.get(name)
        }

    def __iter__(self) -> Iterator[PlannedSite]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers, ready for JSON."""
        return {
            "frontend": self.frontend,
            "notes": list(self.notes),
            "trainable_parameters": self.trainable_parameters,
            "base_parameters": self.base_parameters,
            "cost": {"unit": self.unit, "flops": self.flops, "saved": self.saved},
            "kept": None
            if self.kept is None
            else {"frozen": self.kept.frozen, **self.kept.adapted},
            "fresh": list(self.fresh),
            "sites": [_site_dict(row) for row in self.sites],
            "skipped": [
                {"name": s.site.name, "pattern": s.site.pattern, "reason": s.reason}
                for s in self.skipped
            ],
            "rejections": [dataclasses.asdict(r) for r in self.rejections],
            "unmatched": list(self.unmatched),
            "modules_to_save": list(self.saved_modules),
            "biases": list(self.biases),
            "tokens": {row.name: list(row.indices) for row in self.tokens},
            "loss": None if self.loss is None else dict(self.loss),
            "savings": None if self.savings is None else dataclasses.asdict(self.savings),
            "advice": dataclasses.asdict(self.advice),
            "spent": None if self.spent is None else dataclasses.asdict(self.spent),
            "config": self.config.to_dict(),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """Return the plan as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of the table of ``str(plan)``, under :attr:`columns`."""
        costs = self.site_costs or [(row.flops, row.saved) for row in self.sites]
        return [
            (
                row.site.name,
                row.site.pattern + (f" x{len(row.site.calls)}" if len(row.site.calls) > 1 else ""),
                _stored(row.site),
                str(row.rank or "-"),
                f"{row.scale:g}" if row.rank else "-",
                f"{row.parameters:,}",
                f"{flops:,}",
                f"{saved:,}",
                *(() if self.spent is None else (f"{100 * (row.gain or 0):.1f}",)),
            )
            for row, (flops, saved) in zip(self.sites, costs, strict=True)
        ]

    @property
    def columns(self) -> tuple[str, ...]:
        """The headings of :meth:`rows`."""
        costs = (f"FLOPs/{self.unit}", f"saved B/{self.unit}")
        sizes = ("weight", "r", "scale", "trainable", *costs)
        return ("site", "pattern", *sizes, *(() if self.spent is None else ("gain %",)))

    def warnings(self) -> list[str]:
        """Return likely mistakes, which are shown before the table."""
        lines = [
            f"starts at random, and nothing trains it: {name}; it is in no checkpoint, so put it into "
            "modules_to_save (or set task_type, which does that for heads)"
            for name in self.fresh
        ]
        return [*lines, *self.idle_entries()]

    def idle_entries(self) -> list[str]:
        """Return the entries of the configuration that selected nothing, as lines of text.

        Entries of one field that have no similar name share a line.
        """
        lines = [entry for entry in self.unmatched if not entry.endswith(_IDLE)]
        fields: dict[str, list[str]] = {}
        for entry in self.unmatched:
            if entry.endswith(_IDLE):
                field, _, value = entry.removesuffix(_IDLE).partition(" ")
                fields.setdefault(field, []).append(value)
        for field, values in fields.items():
            verb = "matches" if len(values) == 1 else "match"
            lines.append(f"{field} {some(values, 12)}: {verb} nothing")
        return lines

    def capture_lines(self) -> list[str]:
        """Return the front-end and the reasons against the others, as lines of text.

        Return an empty list if all operations can be adapted.
        """
        if not self.rejections:
            return []
        return [f"captured by {self.frontend}", *(f"  {note}" for note in self.notes)]

    def __str__(self) -> str:
        """Return the plan as text: the totals, a table with equal layers in one row, and lists below."""
        lines = [f"{len(self.sites)} site(s), {''.join(self.totals())}", self.cost()]
        lines += self.warnings()
        rows = folded(self.rows())
        many = any(row.count > 1 for row in rows)
        columns = (*self.columns, *(["sites"] if many else []))
        cells = [(row.name, *row.cells, *([row.times] if many else [])) for row in rows]
        lines += text_table(columns, cells, left=3)
        lines += self.remarks()
        for title, listed in self.sections().items():
            lines += [f"{title} ({len(listed)}):"] if listed else []
            lines += [f"  {row.name}: {row.cells[0]}" for row in grouped(listed)]
        lines += self.capture_lines()
        advice = self.advice.lines()
        return "\n".join([*lines, *(["advice:"] if advice else []), *(f"  {a}" for a in advice)])

    def __repr__(self) -> str:
        return (
            f"<Plan: {len(self.sites)} site(s), {''.join(self.totals())}; captured by {self.frontend}; "
            "print it for the table>"
        )

    def _repr_html_(self) -> str:
        """Return the plan for a notebook: warnings first, then tables that fold and sort."""
        marks = html_lines(self.warnings(), "⚠ ")
        counted = f"{len(self.sites)} site(s), {''.join(self.totals())}"
        facts = html_lines((counted, self.cost(), *self.remarks()))
        rows = folded(self.rows())
        sites = html_table(
            (*self.columns, "sites"), [(r.name, *r.cells, str(r.count)) for r in rows], left=3
        )
        blocks = [html_block(f"adapted ({len(self.sites)})", sites, opened=True)]
        for title, listed in self.sections().items():
            if listed:
                cells = [(r.name + _times(r), *r.cells) for r in folded(listed)]
                table = html_table(("name", "because"), cells, left=2)
                blocks.append(html_block(f"{title} ({len(listed)})", table))
        for title, *notes in filter(None, [self.capture_lines()]):
            blocks.append(html_block(title, html_lines(notes)))
        advice = self.advice.lines()
        blocks += [html_block("advice", html_lines(advice), opened=True)] if advice else []
        return f"<div>{marks}{facts}{''.join(blocks)}</div>"


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Plans of one model side by side: ``str()`` is a table, and a notebook shows a table that sorts.

    Attributes:
        plans: The plans by name, in the order of the arguments.
    """

    plans: Mapping[str, Plan]

    def __getitem__(self, name: str) -> Plan:
        return self.plans[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)

    @property
    def columns(self) -> tuple[str, ...]:
        """The headings of :meth:`rows`."""
        a_unit = f"/{self._unit}" if self._unit else ""
        return ("config", "sites", "trainable", "%", f"FLOPs{a_unit}", f"saved B{a_unit}", "ranks")

    @property
    def _unit(self) -> str:
        """The unit of the costs; empty if plans have different ones."""
        units = {plan.unit for plan in self.plans.values()}
        if units == {"token", "position"}:  # for a linear layer, they are the same
            return "position"
        return next(iter(units)) if len(units) == 1 else ""

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of the table, under :attr:`columns`."""
        return [
            (
                name,
                f"{len(plan)}",
                f"{plan.parameters:,}",
                f"{100 * plan.parameters / max(plan.total_parameters, 1):.4f}",
                f"{plan.flops:,}" + ("" if self._unit else f"/{plan.unit}"),
                f"{plan.saved:,}" + ("" if self._unit else f"/{plan.unit}"),
                _span_of([row.rank for row in plan.sites if row.rank]),
            )
            for name, plan in self.plans.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers, ready for JSON: each plan by its name."""
        return {name: plan.to_dict() for name, plan in self.plans.items()}

    def __str__(self) -> str:
        lines = text_table(self.columns, self.rows(), left=1)
        for name, plan in self.plans.items():
            lines += [f"{name}: {text}" for text in (*plan.warnings(), *plan.remarks())]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Comparison of {', '.join(self.plans)}; print it for the table>"

    def _repr_html_(self) -> str:
        blocks = [html_block(name, plan._repr_html_()) for name, plan in self.plans.items()]
        return f"<div>{html_table(self.columns, self.rows())}{''.join(blocks)}</div>"


def _span_of(ranks: list[int]) -> str:
    if not ranks:
        return "-"
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}-{high}"


def _stored(site: Site) -> str:
    """Return the shape of the weight of a site as text, with the format if the weight is quantized."""
    shape = "x".join(str(size) for size in site.shape)
    return shape if site.quantized is None else f"{shape} {site.quantized.scheme}"


def _site_dict(row: PlannedSite) -> dict[str, Any]:
    site = dataclasses.asdict(row.site)
    if row.site.quantized is not None:
        site["quantized"]["dtype"] = str(row.site.quantized.dtype).removeprefix("torch.")
    fields = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "site"}
    fields["deploy"] = None if row.deploy is None else row.deploy.format
    fields["options"] = None if row.options is None else dict(row.options)
    return {**site, **fields}
