"""Arrow (arXiv:2405.11157): a router over other adapters of the model, with no trained parameters.

For each token the router weights the outputs of the adapters (:mod:`lora_fx.runtime.rows.routing`).
"""

from __future__ import annotations

import operator

from torch import fx

from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError
from lora_fx.ir import OutputBuilder, Role, Site
from lora_fx.kinds import AdapterKind
from lora_fx.runtime.rows import routed

__all__ = ["KINDS", "Arrow"]


class Arrow(AdapterKind):
    """A router over the adapters that ``arrow_config`` names.

    Its options: the adapters that tokens are routed to (``tasks``), the adapters whose mean is subtracted
    from them (``general``, for ``use_gks``), ``top_k``, ``temperature``, and the ``seed`` of the prototypes.
    """

    low_rank = False
    name = "arrow"
    fields = ("arrow_config",)
    trains = "a router over other adapters (arrow_config), and nothing that is trained"
    dynamic = (
        "a router chooses other adapters for each token (arrow_config; PEFT merges none either): keep the "
        "adapters unmerged; or merge their sum, which lora_fx.add_weighted_adapter makes of them, as one "
        "that is the same for all tokens"
    )

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the adapters that tokens are routed to, and of the adapters that are subtracted."""
        return () if self.options is None else (*self.options["tasks"], *self.options["general"])

    def at(self, site: Site, config: LoraConfig) -> AdapterKind:
        """Return the kind with the configuration's adapters and options.

        Raises:
            ConfigError: If the configuration names no adapters, or fewer adapters than ``top_k``.
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
        return self.with_options(
            {
                "tasks": tuple(tasks),
                "general": tuple(general),
                "top_k": router["top_k"],
                "temperature": router["router_temperature"],
                "seed": (config.seed or 0) if seed is None else seed,
            }
        )

    def objection(self, site: Site, rank: int) -> str | None:
        """Return the reason why a site cannot have Arrow; None if it can.

        As in PEFT, only linear layers can.
        """
        whole = site.rows is None and not site.experts and not site.attention
        vectors = all(call.axes == (-1,) and not call.left for call in site.calls)
        if site.family != "linear" or not whole or not vectors:
            return "Arrow is for linear layers alone (as in PEFT): leave it out"
        return super().objection(site, rank)

    def joined(self, build: OutputBuilder, up: fx.Node | None) -> fx.Node:
        """Write the nodes that route the input to the tasks' adapters and add their outputs."""
        options = self.options
        assert options is not None
        downs, ups, scales = zip(*map(build.other, options["tasks"]), strict=True)
        general = [build.other(name) for name in options["general"]]
        delta = build.call(
            Role.UP,
            routed,
            build.input,
            downs,
            ups,
            scales,
            (tuple(pair[0] for pair in general), tuple(pair[1] for pair in general)),
            *(options[name] for name in ("top_k", "temperature", "seed")),
        )
        return build.call(
            Role.ADD, operator.add, build.total, build.cast_to_output(build.dropped(delta))
        )


KINDS = (Arrow(),)
