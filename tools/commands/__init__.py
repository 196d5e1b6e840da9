"""The commands of ``lora-fx``, one a file."""
