"""Arrow (arXiv:2405.11157): a router over other adapters of the model, which trains nothing itself.

For each token it weights the outputs of the adapters (:mod:`lora_fx.runtime.routing`).
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError
from lora_fx.ir import OutputBuilder, Role, Site
from lora_fx.kinds import AdapterKind
from lora_fx.runtime import routed

__all__ = ["KINDS", "Arrow"]


class Arrow(AdapterKind):
    """A router over the adapters that ``arrow_config`` names.

    Attributes:
        tasks: Names of the adapters that tokens are routed to.
        general: Names of the adapters whose mean is subtracted from those (``use_gks``).
        settings: ``top_k``, ``router_temperature`` and the seed of the prototypes.
    """

    low_rank = False
    stores = False
    field = "arrow_config"
    dynamic = (
        "a router chooses other adapters for each token (arrow_config; PEFT merges none either)"
    )
    instead = (
        "keep the adapters unmerged; or merge their sum, which lora_fx.add_weighted_adapter makes of "
        "them, as one that is the same for all tokens"
    )

    def __init__(
        self,
        tasks: tuple[str, ...] = (),
        general: tuple[str, ...] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.tasks, self.general, self.settings = tasks, general, dict(settings or {})
        self.reads = (*tasks, *general)
        written = json.dumps([tasks, general, self.settings]) if tasks else ""
        self.name = f"arrow:{written}" if written else "arrow"
        self.trains = (
            f"a router over {', '.join(tasks)} (arrow_config), and nothing that is trained"
        )

    def at(self, site: Site, config: LoraConfig) -> AdapterKind:
        """Return the kind with the configuration's adapters and options.

        Raises:
            ConfigError: If it names no adapters, or fewer than a token is routed to.
        """
        router = config.arrow_config
        assert router is not None
        tasks = router["task_adapter_names"] or ()
        general = (router["gks_adapter_names"] or ()) if router["use_gks"] else ()
        if not tasks or (router["use_gks"] and not general):
            name = "gks_adapter_names" if tasks else "task_adapter_names"
            raise ConfigError(
                f"LoraConfig.arrow_config[{name!r}]: found none; give the names of adapters of the model"
            )
        if router["top_k"] > len(tasks):
            raise ConfigError(
                f"LoraConfig.arrow_config['top_k']: found {router['top_k']}; there are {len(tasks)} adapters "
                "to route to (task_adapter_names)"
            )
        seed = router["rng_seed"]
        options = {
            "top_k": router["top_k"],
            "temperature": router["router_temperature"],
            "seed": (config.seed or 0) if seed is None else seed,
        }
        return Arrow(tuple(tasks), tuple(general), options)

    def with_options(self, options: str) -> AdapterKind:
        """Return the kind with the adapters and options in JSON."""
        tasks, general, values = json.loads(options)
        return Arrow(tuple(tasks), tuple(general), values)

    def objection(self, site: Site) -> str | None:
        """Refuse other layers than linear ones, as PEFT does."""
        whole = site.rows is None and not site.experts and not site.attention
        vectors = all(call.axes == (-1,) and not call.left for call in site.calls)
        if site.family != "linear" or not whole or not vectors:
            return "Arrow is for linear layers alone (as in PEFT): leave it out"
        return super().objection(site)

    def joined(self, build: OutputBuilder, up: fx.Node | None) -> fx.Node:
        """Write ``total + drop(routed(x))``."""
        downs, ups, scales = zip(*map(build.other, self.tasks), strict=True)
        general = [build.other(name) for name in self.general]
        delta = build.call(
            Role.UP,
            routed,
            build.input,
            downs,
            ups,
            scales,
            (tuple(pair[0] for pair in general), tuple(pair[1] for pair in general)),
            *(self.settings[name] for name in ("top_k", "temperature", "seed")),
        )
        return build.call(
            Role.ADD, operator.add, build.total, build.cast_to_output(build.dropped(delta))
        )


KINDS = (Arrow(),)
