"""What a training step needs on each GPU of a cluster, found without the GPUs."""

from __future__ import annotations

from lora_fx.tools.cluster.ledger import Ledger
from lora_fx.tools.cluster.mesh import Mesh, blocks_of, devices_of, shard
from lora_fx.tools.cluster.planning import Need, Traffic, plan_step

__all__ = ["Ledger", "Mesh", "Need", "Traffic", "blocks_of", "devices_of", "plan_step", "shard"]
