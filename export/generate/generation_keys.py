"""Keys of a ``generation_config``: what is not done here is refused, and not left out in silence."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

from lora_fx.errors import ExportError

__all__ = ["refuse_unsupported"]

# What changes the tokens, or what comes back, in a way that is not done here, and the values with
# which it does not: transformers' defaults. None is one of each key.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "sequence_bias": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "exponential_decay_length_penalty": (),
    "stop_strings": (),
    "watermarking_config": (),
    "token_healing": (False,),
    "max_time": (),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "assistant_ensemble_weight": (),
    "speculation_type": (),
    "use_mtp": (False,),
    "return_dict_in_generate": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "return_timestamps": (False,),
}
_NEUTRAL_IN_SAMPLING: Mapping[str, tuple[object, ...]] = {
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
}

# Of beam search alone. Without beams they do nothing, which is what a model's own configuration
# may well say; a caller who asks for them expects something.
_OF_BEAMS: Mapping[str, tuple[object, ...]] = {
    "early_stopping": (False,),
    "length_penalty": (1,),
    "diversity_penalty": (0,),
}

# How fast, and not what: the cache, compilation, and how an assistant model would be used.
_WITHOUT_EFFECT = {
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "compile_config",
    "disable_compile",
    "continuous_batching_config",
    "prefill_chunk_size",
    "low_memory",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "max_matching_ngram_size",
    "transformers_version",
}


def refuse_unsupported(
    values: Mapping[str, Any], done: Collection[str], model: Mapping[str, Any]
) -> None:
    """Refuse keys that ask for something which ``generate`` does not do.

    Args:
        values: What a call asks for, without what is None.
        done: The keys that are done.
        model: The model's own ``generation_config``. A key of it that is none of transformers' is what
            ``GenerationMixin.generate`` does not look at, either.

    Raises:
        ExportError: It names all of them.
    """
    refused = dict(_NEUTRAL)
    if values.get("do_sample"):
        refused.update(_NEUTRAL_IN_SAMPLING)
    if values.get("cache_implementation") == "quantized":
        refused["cache_implementation"] = ()
    asked = [name for name in refused if name in values and values[name] not in refused[name]]
    own = _plain(model)
    extra = {name: value for name, value in values.items() if _plain(value) != own.get(name)}
    asked += [name for name in _OF_BEAMS if name in extra and extra[name] not in _OF_BEAMS[name]]
    if asked:
        without = {name: next(iter({**refused, **_OF_BEAMS}[name]), None) for name in asked}
        raise ExportError(
            f"the generation_config (the model's, or the one that was passed) asks for "
            f"{', '.join(f'{name}={values[name]!r}' for name in asked)}, which generate does not do: "
            f"what comes back would be other than what model.generate gives. Pass "
            f"generation_config={without} to generate all the same"
        )
    known = {*done, *_NEUTRAL, *_NEUTRAL_IN_SAMPLING, *_OF_BEAMS, *_WITHOUT_EFFECT}
    unknown = [name for name in extra if name not in known and not str(name).startswith("_")]
    if unknown:
        raise ExportError(
            f"the generation_config has {', '.join(_named(name, extra, known) for name in unknown)}, "
            f"which neither generate nor the model's own generation_config knows"
        )


def _named(name: str, values: Mapping[str, Any], known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), known, 1)
    return f"{name}={values[name]!r}" + (f" (did you mean '{near[0]}'?)" if near else "")


def _plain(value: Any) -> Any:
    """A value as a file remembers it: JSON has no tuples, and its keys are texts."""
    return json.loads(json.dumps(value, default=str))
