"""Part of lora_fx: see docs/architecture.md."""
