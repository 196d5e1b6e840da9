"""Patterns of linear operations, and their registry, most specific first."""

from __future__ import annotations

from typing import Protocol

from lora_fx.errors import ConfigError
from lora_fx.ir import Pattern
from lora_fx.passes.patterns.conv import ConvPattern, ConvTransposePattern
from lora_fx.passes.patterns.einsum import EinsumPattern, rows_of_einsum
from lora_fx.passes.patterns.embedding import EmbeddingPattern, lookup
from lora_fx.passes.patterns.experts import ExpertsPattern, GroupedPattern
from lora_fx.passes.patterns.linear import (
    ARGUMENTS,
    LinearPattern,
    MatmulPattern,
    Product,
    QuantizedPattern,
    product_of,
)
from lora_fx.passes.patterns.sites import itemised, make_site, part_names, site_name, with_call
from lora_fx.passes.patterns.weights import (
    SPLIT,
    constant_of,
    part_lengths,
    path_to_weight,
    splits,
    weight_of,
)

__all__ = [
    "ARGUMENTS",
    "SPLIT",
    "EmbeddingPattern",
    "LinearPattern",
    "Product",
    "constant_of",
    "itemised",
    "lookup",
    "make_site",
    "part_lengths",
    "part_names",
    "path_to_weight",
    "pattern_of",
    "patterns",
    "product_of",
    "register_pattern",
    "rows_of_einsum",
    "site_name",
    "splits",
    "weight_of",
    "with_call",
]

_registry: tuple[Pattern, ...] = (
    GroupedPattern(),
    ExpertsPattern(),
    QuantizedPattern(),
    LinearPattern(),
    MatmulPattern(),
    EinsumPattern(),
    *(ConvPattern(dims) for dims in (1, 2, 3)),
    *(ConvTransposePattern(dims) for dims in (1, 2, 3)),
    EmbeddingPattern(),
)


def patterns() -> tuple[Pattern, ...]:
    """Return the patterns in the order in which they are matched."""
    return _registry


class _Named(Protocol):
    @property
    def pattern(self) -> str: ...


def pattern_of(seen: _Named) -> Pattern:
    """Return the registered pattern that matched a site or one of its calls.

    Raises:
        ConfigError: If no pattern of this name is registered in this process.
    """
    for pattern in _registry:
        if seen.pattern == pattern.name:
            return pattern
    raise ConfigError(
        f"the pattern {seen.pattern!r} is not registered here: call lora_fx.register_pattern with "
        "it first"
    )


def register_pattern(pattern: Pattern) -> None:
    """Register a new linear-like operation, which is matched before the existing patterns.

    Args:
        pattern: An object with ``name``, ``match``, ``factors``, ``branch``, ``delta`` and
            ``flops``: see :class:`lora_fx.ir.site.Pattern`. Subclass :class:`LinearPattern` to write
            ``match`` only.

    Raises:
        ConfigError: If the pattern lacks one of these attributes, or its name is taken.
    """
    global _registry  # noqa: PLW0603  registration changes every later match
    parts = ("name", "match", "factors", "branch", "delta", "flops")
    lacking = [name for name in parts if not hasattr(pattern, name)]
    if lacking:
        raise ConfigError(
            f"{type(pattern).__name__} is not a pattern: it lacks {', '.join(lacking)}"
        )
    if any(known.name == pattern.name for known in _registry):
        raise ConfigError(
            f"a pattern named {pattern.name!r} is registered already: choose another name"
        )
    _registry = (pattern, *_registry)
