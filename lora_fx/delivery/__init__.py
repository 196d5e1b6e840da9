"""Delivery of adapters to running servers and sessions while training goes on, with a check of the result."""

from __future__ import annotations

from lora_fx.delivery.delivering import sync, sync_callback
from lora_fx.delivery.probe import run_session
from lora_fx.delivery.receipt import Delivery
from lora_fx.delivery.targets import VllmServer

__all__ = ["Delivery", "VllmServer", "run_session", "sync", "sync_callback"]
