"""What a model is exported for: see docs/architecture.md."""
