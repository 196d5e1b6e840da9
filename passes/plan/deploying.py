"""Check which sites can be trained for a storage format (``deploy=`` of :func:`lora_fx.rewrite`).

In such a site the forward rounds the adapted weight as it will be stored. So the adapter may change nothing
but this weight, and a merge must be able to store it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import nn

from lora_fx.config import changes_base
from lora_fx.errors import ConfigError, some
from lora_fx.formats import DTYPES, deployment_options
from lora_fx.ir import Capture, Deployment, Plan, PlannedSite, Site, grouped
from lora_fx.kinds import chosen_kind
from lora_fx.passes.graph import original_class
from lora_fx.passes.parameters import is_partitioned, is_sharded, weight_at

__all__ = ["with_deployment"]

_PRODUCTS = ("linear", "matmul", "quantized")


def with_deployment(capture: Capture, plan: Plan, how: Deployment) -> Plan:
    """Return a plan whose sites are trained for a storage format.

    Raises:
        ConfigError: If the configuration excludes such training, or the format does not fit a site. The
            message names the sites.
        QuantizationError: If the library of the format is missing.
    """
    deploy, config = f"deploy={how.format!r}", plan.config
    if config.lora_dropout:
        raise ConfigError(
            f"{deploy} rounds the adapted weight, and lora_dropout={config.lora_dropout:g} changes what is "
            "multiplied with a part of it: set lora_dropout=0"
        )
    if changes_base(config.init_lora_weights):
        raise ConfigError(
            f"{deploy} is over the weights of the base, and init_lora_weights={config.init_lora_weights!r} "
            "changes them: use True, 'gaussian', 'orthogonal' or 'eva'"
        )
    kind = chosen_kind(config)
    if not kind.deploys:
        raise ConfigError(
            f"{deploy} rounds W + s·BA, and {kind.setting} changes more than that: use plain LoRA"
        )
    tokens = {row.site.weight: row.name for row in plan.tokens}
    for row in plan.sites:
        if row.site.weight in tokens:
            raise ConfigError(
                f"{deploy}: {row.name} has an adapter, and rows of its weight are trained "
                "(trainable_token_indices): leave one of both out"
            )
    reasons = {row.name: next(_objections(capture.model, row, how), None) for row in plan.sites}
    refused = [(name, reason) for name, reason in reasons.items() if reason is not None]
    if refused:
        names = [name for name, _ in refused]
        remedy = f" Leave them out with exclude_modules={names!r}:" if len(names) < 5 else ""
        lines = [f"{row.name}: {row.cells[0]}" for row in grouped(refused)]
        raise ConfigError(
            f"{deploy} is not for {len(names)} of the {len(plan.sites)} sites of the plan; nothing was "
            f"changed.{remedy or ' exclude_modules leaves sites out:'}\n  " + some(lines, 8, "\n  ")
        )
    rows = [dataclasses.replace(row, deploy=_of_site(row.site, how)) for row in plan.sites]
    return dataclasses.replace(plan, sites=tuple(rows))


def _of_site(site: Site, how: Deployment) -> Deployment:
    """Return the storage format, with its options, in which the merged weight of a site will be stored.

    If the weight is quantized already, its options stay. Any other weight gets the options of ``how``, with a
    block size that fits its shape.
    """
    stored = site.quantized
    if stored is not None:
        return Deployment(how.format, None, stored.block_size, stored.double, as_base=True)
    if how.dtype is not None:
        return how
    fitted = deployment_options(how).fitted((site.out_features, site.in_features))
    return how._replace(block_size=fitted.block_size)


def _objections(model: nn.Module, row: PlannedSite, how: Deployment) -> Iterator[str]:
    """Yield the reasons why a site cannot be trained for a storage, each with a remedy if there is one."""
    site, weight = row.site, weight_at(model, row.site.weight)
    if site.experts is not None:
        yield "its weight has a matrix for each expert"
    elif site.family != "linear":
        yield f"it is {'a lookup' if site.family == 'embedding' else 'a convolution'}, no matrix product"
    elif site.rows is not None:
        yield "it applies only some rows of its weight"
    elif any(call.pattern not in _PRODUCTS or call.left for call in site.calls) or (
        site.view is not None or site.order is not None
    ):
        yield f"it is written as {site.pattern}, and F.linear(x, weight) or x @ weight can be rounded"
    if row.tied or site.tied_to:
        yield f"its weight is tied to {row.tied or ', '.join(site.tied_to)}"
    if any(call.cast for call in site.calls):
        yield "its weight is cast before it is applied"
    if site.bias is None and any(call.bias for call in site.calls):
        yield "it adds a tensor that is no bias"
    if is_sharded(weight) or is_partitioned(weight):
        yield "its weight is in parts that several processes hold: shard the rewritten model instead"
    yield from _of_storage(model, site, how)


def _of_storage(model: nn.Module, site: Site, how: Deployment) -> Iterator[str]:
    stored, weight = site.quantized, weight_at(model, site.weight)
    if stored is not None:
        if stored.scheme != how.format:
            yield f"its weight is stored as {stored}: deploy={stored.scheme!r} trains for that"
        return
    if how.format in DTYPES or site.family != "linear" or site.experts is not None:
        return
    options = deployment_options(how)
    if not weight.is_meta:
        objection = options.made_by.device_objection(options, weight.device)
        if objection is not None:
            yield objection
    objection = options.objection((site.out_features, site.in_features), weight.dtype)
    if objection is not None:
        yield objection
    elif not _is_layer(model, site):
        yield (
            "it is no nn.Linear, which could become a layer over a stored weight: "
            f"lora_fx.quantize(model, {how.format!r}) stores it, and the rewrite of the result takes "
            f"deploy={how.format!r}"
        )


def _is_layer(model: nn.Module, site: Site) -> bool:
    """Return True if a site is an ``nn.Linear`` whose weight no other operation applies."""
    owner = model.get_submodule(site.owner)
    own = all(call.region == site.owner for call in site.calls)
    return original_class(owner) is nn.Linear and own and site.parameter == "weight"
