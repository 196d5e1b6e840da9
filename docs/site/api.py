"""Generator of the API page, ``python docs/site/api.py --write``: a section for each public name."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import lora_fx

PAGE = Path(__file__).resolve().parents[1] / "api.md"

_SECTIONS = {
    "From a model to an adapted one": """
        LoraConfig plan compare rewrite capture graphs check CheckReport
    """,
    "Training": """
        trainable_parameters print_trainable_parameters parameter_groups correct_gradients adapter_penalty
        initialize reference trainer_callback lightning_callback sync sync_callback VllmServer Delivery
    """,
    "Adapters": """
        add_adapter set_adapter delete_adapter disable_adapter active_adapters
        adapter_names adapter_ids adapter_losses train_together add_weighted_adapter status
    """,
    "Files": """
        save_adapter load_adapter plan_migration adapter_state_dict load_adapter_state_dict
        as_peft_model hotswap_adapter prepare_hotswap inspect_adapter verify
        extract_adapter extract_files convert_adapter resize_adapter
    """,
    "Quantized bases": """
        quantize plan_quantization prepare_for_kbit_training keep_quantized quantized_parameters
        replace_lora_weights_loftq
    """,
    "Merging and exporting": """
        merge merge_files export_onnx OnnxSession save_onnx_adapter
    """,
    "Looking": """
        visualize
    """,
    "Extending": """
        register_pattern register_adapter_kind register_format
    """,
    "Errors": """
        LoraFxError ConfigError NoMatchError PartialMatchError CaptureError
        CheckpointError MergeError QuantizationError ExportError OutputPathError
        ParityError ProviderError ProcessError LogitsError DeliveryError
    """,
}


_OPENING = (
    "All public names; each is `lora_fx.NAME`. The text of a section is the docstring of the name, which",
    "`help(lora_fx.plan)` prints as well. In a clone, this page has only the names: `make docs` builds the",
    "site, and the page is then `out/site/api.html`.",
)


def text() -> str:
    """Return the page."""
    named = [name for names in _SECTIONS.values() for name in names.split()]
    missing = set(lora_fx.__all__) - {*named, "__version__"}
    unknown = set(named) - set(lora_fx.__all__)
    if missing or unknown:
        sys.exit(f"docs/site/api.py: no section has {sorted(missing)}; unknown: {sorted(unknown)}")
    lines = ["# API", "", *_OPENING, ""]
    for title, names in _SECTIONS.items():
        lines += [f"## {title}", ""]
        for name in names.split():
            value = getattr(lora_fx, name)
            lines += [f"::: {value.__module__}.{value.__qualname__}", ""]
    lines += ["## PEFT's names", "", "::: lora_fx.peft", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/api.md")
    parser.add_argument("--check", action="store_true", help="fail if docs/api.md is not that page")
    options = parser.parse_args()
    if options.write:
        PAGE.write_text(text(), encoding="utf-8")
    elif options.check and text() != PAGE.read_text(encoding="utf-8"):
        sys.exit("docs/api.md is old: python docs/site/api.py --write")
