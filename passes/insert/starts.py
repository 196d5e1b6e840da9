"""Initial values of the factors of a site, and their changes to the base weight."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F

from lora_fx import torch_private
from lora_fx.config import LoraConfig, changes_base, needs_data
from lora_fx.errors import ConfigError, ProcessError
from lora_fx.ir import Factors, PlannedSite, Site
from lora_fx.kinds import Starting, kind_of
from lora_fx.passes.lowrank import low_rank_svd
from lora_fx.passes.parameters import (
    adapter_dtype,
    as_factors,
    as_matrices,
    matrix_shape,
    part_of,
    replaced,
    shapes_of,
    wide,
)
from lora_fx.passes.patterns import pattern_of

__all__ = [
    "Start",
    "corda",
    "data_start",
    "initial_start",
    "levels",
    "loftq",
    "lora_ga",
    "olora",
    "orthogonal",
    "pissa",
    "plain",
    "quantized",
    "signs",
    "site_generator",
    "with_seed",
]


def with_seed(config: LoraConfig) -> LoraConfig:
    """Return a configuration with a seed. If it has none, draw one from PyTorch's global generator.

    All processes of a group get the seed of the first one, so that they have the same factors. This holds
    even if their generators are seeded differently. The other processes wait for the first one.
    """
    if config.seed is not None:
        return config
    with torch_private.disable_dispatch_modes():
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        seed = _of_first_process(seed)
    return dataclasses.replace(config, seed=seed)


_drawn = itertools.count()


def _of_first_process(seed: int) -> int:
    """Return rank 0's seed on every rank. The n-th call of a rank gets the seed of rank 0's n-th call."""
    # The other processes of a "fake" group do not exist.
    if torch.distributed.get_world_size() == 1 or torch.distributed.get_backend() == "fake":
        return seed
    store, key = torch_private.group_store(), f"lora_fx/seed/{next(_drawn)}"
    if torch.distributed.get_rank() == 0:
        store.set(key, str(seed))
        return seed
    try:
        return int(store.get(key))
    except RuntimeError as error:  # it took longer than the timeout of the process group
        raise ProcessError(
            "the seed of an adapter is that of rank 0, which has ended, or has not called rewrite and "
            "add_adapter as often as this process: call them on every rank, or give LoraConfig(seed=...)"
        ) from error


def site_generator(name: str, config: LoraConfig) -> torch.Generator:
    """Return a generator on the CPU, seeded with the configuration's seed (None: 0) and the site's name."""
    digest = hashlib.blake2b(f"{config.seed or 0}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def plain(
    site: Site, shapes: Factors, start: bool | str, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B for an initialization that does not read the weight.

    True: A uniform, B zero. ``"gaussian"``: A normal, B zero. False: both random. For an embedding, A is zero
    instead of B, because A is looked up.
    """
    a, b = shapes.a, shapes.b

    def uniform(shape: tuple[int, ...], fan_in: int) -> torch.Tensor:
        # Kaiming with a = sqrt(5): the bound is 1/sqrt(fan_in).
        bound = 1 / math.sqrt(fan_in)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def normal(shape: tuple[int, ...], std: float) -> torch.Tensor:
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    if site.family == "embedding":
        second = normal(b, 1.0)
        return (normal(a, 1.0) if start is False else torch.zeros(a)), second
    first = normal(a, 1 / shapes.rank) if start == "gaussian" else uniform(a, shapes.fan_in[0])
    return first, (uniform(b, shapes.fan_in[1]) if start is False else torch.zeros(b))


def orthogonal(
    site: Site, shapes: Factors, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random factors with ``B A = 0``.

    A and B take alternate rows of an orthogonal matrix [r, r]. The scale of a tenth is
    PEFT's, which names https://datta0.github.io/posts/rethink-lora-init as its source. In half precision
    the product is zero up to rounding only.
    """
    count, out, inner = matrix_shape(site)
    rank = shapes.rank // site.groups

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape).normal_(generator=generator)

    basis = torch.linalg.qr(normal(count, rank, rank)).Q
    a = (normal(count, inner, rank // 2) @ basis[:, 0::2]).mT / 10
    b = normal(count, rank // 2, out).mT @ basis[:, 1::2] / 10
    return as_factors(shapes, a, b)


def pissa(
    matrices: torch.Tensor,
    rank: int,
    scale: float,
    iterations: int | None,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of PiSSA (Meng et al. 2024, arXiv:2404.02948): the largest singular triples.

    Args:
        matrices: The weight, [n, out, in].
        rank: Rank of the factors.
        scale: The scale of the branch.
        iterations: Number of subspace iterations of the approximate decomposition; None for the exact one.
        generator: Random numbers for the projection of the approximate decomposition.

    Returns:
        A [n, r, in] and B [n, out, r].
    """
    if iterations is None:
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    else:
        u, s, vh = low_rank_svd(matrices, rank, iterations, generator)
    root = (s[:, :rank] / scale).sqrt()
    return root[:, :, None] * vh[:, :rank], u[:, :, :rank] * root[:, None, :]


def olora(matrices: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of OLoRA (Büyükakyüz 2024, arXiv:2406.01775): a QR decomposition cut to the rank.

    Args:
        matrices: The weight, [n, out, in].
        rank: Rank of the factors.

    Returns:
        A [n, r, in] and B [n, out, r].
    """
    q, r = torch.linalg.qr(matrices)
    return r[:, :rank], q[:, :, :rank]


def signs(directions: torch.Tensor) -> torch.Tensor:
    """Return the signs by which to multiply vectors, so that the largest entry of each is positive.

    A singular value decomposition does not determine the signs of its vectors.

    Args:
        directions: [..., in].

    Returns:
        1 or -1, [...].
    """
    largest = directions.gather(-1, directions.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return torch.where(largest < 0, -1.0, 1.0).to(directions)


_BLOCK: Final = 64
_TAIL: Final = (
    0.9677083  # Position of the outermost level, as a quantile of the normal distribution.
)


def loftq(
    row: PlannedSite, weight: torch.Tensor, bits: int, iterations: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the factors of LoftQ (Li et al. 2023, arXiv:2310.08659), and the quantized weight.

    Each step quantizes ``W - BA`` and decomposes the error of the quantized weight.

    Args:
        row: The site.
        weight: The whole weight. Parts outside the site do not change.
        bits: 2, 4 or 8.
        iterations: Number of steps.

    Returns:
        A [n, r, in], B [n, out, r], and the whole weight with the quantized values of the site.
    """
    site = row.site
    exact = wide(part_of(site, weight.detach())).clone()
    matrices = as_matrices(site, exact)
    kept = exact
    for _ in range(iterations):
        values = quantized(kept, bits)
        u, s, vh = torch.linalg.svd(matrices - as_matrices(site, values), full_matrices=False)
        root = s[:, : row.rank].sqrt()
        a, b = root[:, :, None] * vh[:, : row.rank], u[:, :, : row.rank] * root[:, None, :]
        product = b @ a if site.layout == "out_in" else (b @ a).mT
        kept = exact - product.reshape(exact.shape)
    return a, b, replaced(site, weight, values)


def quantized(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantize and dequantize a weight, and return it in the same shape and dtype."""
    quantize: Callable[[torch.Tensor], torch.Tensor] = (
        _whole_numbers if bits == 8 else lambda tensor: _normal_floats(tensor, bits)
    )
    return quantize(values.contiguous())


def _normal_floats(values: torch.Tensor, bits: int) -> torch.Tensor:
    flat = values.flatten()
    blocks = F.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    table = levels(bits).to(values)
    middles = (table[1:] + table[:-1]) / 2
    index = torch.bucketize(blocks / largest.clamp_min(torch.finfo(values.dtype).tiny), middles)
    return (table[index] * largest).flatten()[: len(flat)].view(values.shape)


def _whole_numbers(values: torch.Tensor) -> torch.Tensor:
    # Round to half precision first, as bitsandbytes does, so that the results are equal.
    halves = values.to(torch.float16).to(values.dtype)
    largest = halves.abs().amax(-1, keepdim=True)
    steps = torch.round(halves * (127 / largest.clamp_min(torch.finfo(values.dtype).tiny)))
    return steps * (largest / 127)


def levels(bits: int) -> torch.Tensor:
    """Return the 2ᵇ sorted levels of a normal float in [-1, 1]: quantiles of a normal distribution.

    Zero is a level. There is one more level above zero than below.
    """
    half = 2 ** (bits - 1)
    above = torch.linspace(_TAIL, 0.5, half + 1, dtype=torch.float64)[:-1]
    below = torch.linspace(_TAIL, 0.5, half, dtype=torch.float64)[:-1]
    zero = torch.zeros(1, dtype=torch.float64)
    values = torch.cat([torch.special.ndtri(above), zero, -torch.special.ndtri(below)])
    return values.sort().values / values.max()


_DAMPING: Final = 0.01
_INVERSE_ERROR: Final = 0.05
_ITERATIONS: Final = 4


def corda(
    matrix: torch.Tensor, moments: torch.Tensor, rank: int, scale: float, method: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of CorDA (Yang et al. 2024, arXiv:2406.05223): ``W = (U S Vᵀ) C⁻¹``.

    The decomposition is ``W C = U S Vᵀ``.

    Args:
        matrix: W, [out, in].
        moments: C, the second moments of the inputs, [in, in].
        rank: The rank.
        scale: The scale of the branch.
        method: ``ipm`` takes the largest singular values, ``kpm`` the smallest.

    Returns:
        A [r, in] and B [out, r].

    Raises:
        ConfigError: If no damping makes the moments invertible.
    """
    damped, inverse = _inverted(moments.to(matrix))
    u, s, vh = torch.linalg.svd(matrix @ damped, full_matrices=False)
    taken = slice(0, rank) if method == "ipm" else slice(len(s) - rank, len(s))
    root = (s[taken] / scale).sqrt()
    return root[:, None] * (vh[taken] @ inverse), u[:, taken] * root


def _inverted(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Damp second moments until they are invertible. Return the damped moments and their inverse.

    The damping is a multiple of the identity.
    """
    identity = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    mean = moments.diagonal().mean()
    damping = _DAMPING
    while damping < 1e6 and mean > 0:
        damped = moments + identity * (mean * damping)
        inverse, failed = torch.linalg.inv_ex(damped)
        if not failed and torch.dist(damped @ inverse, identity) < _INVERSE_ERROR:
            return damped, inverse
        damping *= 2
    raise ConfigError(
        "init_lora_weights='corda': the second moments of its inputs cannot be inverted (are they all "
        "zero?); give more data, or leave it out with exclude_modules"
    )


def lora_ga(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    rank: int,
    scale: float,
    options: Mapping[str, Any],
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of LoRA-GA (Wang et al. 2024, arXiv:2407.05000).

    With them, the first step of training is close to a step of full training. With ``G = U S Vᵀ``, A has r of
    the first 2r rows of Vᵀ, and B has r of the first 2r columns of ``U S``. The option ``direction`` selects
    them.

    Args:
        weight: W, [n, out, in].
        gradient: G, the gradient of the loss, in the same shape.
        rank: The rank.
        scale: The scale of the branch.
        options: ``lora_ga_config``.
        generator: Random numbers for the decomposition, and for the direction ``random``.

    Returns:
        A [n, r, in] and B [n, out, r].
    """
    size = min(4 * rank, *gradient.shape[1:])
    u, s, vh = low_rank_svd(gradient, size, _ITERATIONS, generator)
    # A and B use different singular triples, so their product depends on the signs of these.
    sign = signs(vh)
    u, vh = u * sign[:, None], vh * sign[:, :, None]
    of_a, of_b = _directions(options["direction"], rank, generator)
    a, b, values = vh[:, of_a], u[:, :, of_b] * s[:, None, of_b], s[:, of_b]
    if options["scale"] == "stable":
        return a, b * (weight.shape[1] ** 0.25 / options["stable_gamma"] ** 0.5)
    if options["scale"] == "weight_svd":
        largest = torch.linalg.matrix_norm(weight, 2)
        ratio = torch.where(values[:, 0] > 0, largest / values[:, 0], 1.0)
        return a, b * ratio[:, None, None]
    if options["scale"] == "gd_scale":
        return a / scale, b / scale
    return a, b


def _directions(
    direction: str, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the singular triples for A and for B, among the first 2r."""
    every = torch.arange(2 * rank)
    if direction == "random":
        some = torch.randperm(2 * rank, generator=generator)[:rank]
        return some, some
    first, second = every[:rank], every[rank:]
    return {
        "ArBr": (every[1::2], every[0::2]),
        "A2rBr": (second, first),
        "ArB2r": (first, second),
    }[direction]


@dataclasses.dataclass(frozen=True)
class Start:
    """Initial values of the factors of a site, and the new weight if the start changes it.

    Attributes:
        a, b: Values of the factors.
        weight: New value of the whole weight; None if it stays as it is.
        subtracted: True if `weight` is ``W - s · B A``, so that the adapted weight is still W.
    """

    a: torch.Tensor
    b: torch.Tensor
    weight: torch.Tensor | None = None
    subtracted: bool = False


def initial_start(
    row: PlannedSite, weight: torch.Tensor, config: LoraConfig, *, loaded: bool = False
) -> Start:
    """Return the initial values of a site, computed without data.

    For an initialization that needs data, these are plain values that :func:`data_start` replaces later.

    Args:
        row: The site.
        weight: Its weight. It is not changed.
        config: The configuration. Random numbers come from a generator for each site.
        loaded: True if a checkpoint overwrites the factors next, so that the kind need not compute a start.

    Raises:
        ConfigError: If the weight has values that are not finite.
    """
    start, kind = config.init_lora_weights, kind_of(row)
    shapes = shapes_of(row)
    if needs_data(start) or kind.chosen_start:
        start = True
    if weight.device.type == "meta":
        empty = _without_values(shapes, weight, start)
        return (
            dataclasses.replace(empty, weight=torch.empty_like(weight)) if kind.new_base else empty
        )
    with torch.device("cpu"):  # random numbers come from a generator there
        values = _with_values(row, weight, config, start, shapes, loaded)
    if not kind.new_base:
        return values
    _check_decomposes(row, weight, kind.setting)
    return dataclasses.replace(values, weight=kind.start_base(row, weight.detach()))


def _with_values(
    row: PlannedSite,
    weight: torch.Tensor,
    config: LoraConfig,
    start: Any,
    shapes: Any,
    loaded: bool,
) -> Start:
    """Return the initial values of a site whose weight has values, unlike one on the meta device."""
    generator = site_generator(row.name, config)
    if not isinstance(start, str) or start == "gaussian":
        pair = plain(row.site, shapes, start, generator)
        kind, make = kind_of(row), functools.partial(site_generator, config=config)
        if loaded:
            return Start(*_placed(*pair, weight))
        if kind.chosen_start:
            _check_decomposes(row, weight, kind.setting)
        pair = kind.start_pair(Starting(row, weight.detach(), *pair, config, make))
        return Start(*_placed(*pair, weight))
    if start == "orthogonal":
        return Start(*_placed(*orthogonal(row.site, shapes, generator), weight))
    _check_decomposes(row, weight, f"init_lora_weights={start!r}")
    return _from_weight(row, weight, config, generator)


def _check_decomposes(row: PlannedSite, weight: torch.Tensor, setting: str) -> None:
    if not torch.isfinite(weight).all():
        raise ConfigError(
            f"{row.name}: {setting} decomposes the weight, and {row.site.weight} has values that are not "
            "finite"
        )


def data_start(
    row: PlannedSite, weight: torch.Tensor, config: LoraConfig, seen: torch.Tensor
) -> Start:
    """Return the initial values of a site, computed from statistics of data (EVA, CorDA, LoRA-GA).

    Args:
        row: The site.
        weight: Its weight. It is not changed.
        config: The configuration.
        seen: Statistics of the data: for ``eva`` the components [r, in], for ``corda`` the second moments
            of the inputs [in, in], for ``lora_ga`` the gradient of the weight, in its shape.

    Raises:
        ConfigError: If the statistics do not allow a start.
    """
    shapes = pattern_of(row.site).factors(row.site, row.rank)
    if config.init_lora_weights == "eva":
        return Start(*_placed(seen, torch.zeros(shapes.b), weight))
    exact = as_matrices(row.site, wide(part_of(row.site, weight)))
    options: Any = getattr(config, f"{config.init_lora_weights}_config")
    if config.init_lora_weights == "corda":
        a, b = corda(exact[0], seen, row.rank, row.scale, options["corda_method"])
    else:
        gradient = as_matrices(row.site, wide(part_of(row.site, seen)).to(exact.device))
        rank, generator = row.rank // row.site.groups, site_generator(row.name, config)
        a, b = lora_ga(exact, gradient, rank, row.scale, options, generator)
    return _taken_out(row, weight, *as_factors(shapes, a, b))


def _from_weight(
    row: PlannedSite, weight: torch.Tensor, config: LoraConfig, generator: torch.Generator
) -> Start:
    start, site = str(config.init_lora_weights), row.site
    shapes = pattern_of(site).factors(site, row.rank)
    if start == "loftq":
        options: Any = config.loftq_config
        a, b, changed = loftq(row, weight, options["loftq_bits"], options["loftq_iter"])
        return Start(*_placed(*as_factors(shapes, a, b), weight), changed)
    matrices = as_matrices(site, wide(part_of(site, weight.detach())))
    rank = row.rank // site.groups
    if start == "olora":
        a, b = olora(matrices, rank)
    else:
        iterations = int(start.rpartition("_")[2]) if "_niter_" in start else None
        a, b = pissa(matrices, rank, row.scale, iterations, generator)
    return _taken_out(row, weight, *as_factors(shapes, a, b))


def _taken_out(row: PlannedSite, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Start:
    a, b = _placed(a, b, weight)
    return Start(a, b, _subtracted(row, weight, a, b), subtracted=True)


def _placed(
    a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = adapter_dtype(weight)
    return a.to(weight.device, dtype), b.to(weight.device, dtype)


def _without_values(shapes: Factors, weight: torch.Tensor, start: bool | str) -> Start:
    dtype = adapter_dtype(weight)
    a, b = (torch.empty(shape, dtype=dtype, device="meta") for shape in (shapes.a, shapes.b))
    changed = changes_base(start)
    return Start(a, b, torch.empty_like(weight) if changed else None, changed and start != "loftq")


def _subtracted(
    row: PlannedSite, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """Return ``W - s · B A`` as a new tensor, rounded once. Rows outside the site do not change."""
    part = wide(part_of(row.site, weight.detach()))
    delta = pattern_of(row.site).delta(row.site, wide(a), wide(b))
    return replaced(row.site, weight, part - delta * row.scale)
