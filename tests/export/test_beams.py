"""Beam search and several texts a prompt: token for token what ``model.generate`` gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from lora_fx.errors import ExportError
from lora_fx.export.session import OnnxSession
from tests.export.tiny import VOCABULARY, Pair

IDS = torch.tensor([[4, 5, 6]])
OLDER = Version(transformers.__version__) < Version("5.24")


def prompts() -> tuple[Tensor, Tensor]:
    """Three of them, padded on the left."""
    torch.manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (3, 6))
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, :1] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


def likely(session: OnnxSession, count: int) -> list[int]:
    """Tokens that come early, so that texts end at different lengths."""
    ids, mask = prompts()
    free = session.generate(ids, mask, max_new_tokens=8, eos_token_id=[])
    return [int(token) for token in free[:, 9].unique()[:count]]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0},
        {"num_beams": 2, "early_stopping": True, "repetition_penalty": 1.5},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": -0.5},
        {"num_beams": 3, "early_stopping": "never", "no_repeat_ngram_size": 2},
        {"num_beams": 2, "min_new_tokens": 5},
    ],
)
@pytest.mark.parametrize("ends", [0, 1, 3])
def test_beams_are_those_of_transformers(
    exported: Callable[[str], Pair], options: dict[str, Any], ends: int
) -> None:
    model, session = exported("llama")
    ids, mask = prompts()
    end = likely(session, ends) if ends else None
    # pad_token_id: transformers takes the first end token for it where it is 0.
    settings = options | {"max_new_tokens": 10, "eos_token_id": end, "do_sample": False}
    want = model.generate(ids, attention_mask=mask, **settings)
    got = session.generate(ids, mask, generation_config=settings)
    assert torch.equal(got, want)
    assert len(got) == 3 * options.get("num_return_sequences", 1)


def test_beams_find_what_the_likeliest_tokens_do_not(exported: Callable[[str], Pair]) -> None:
    _, session = exported("llama")
    ids, mask = prompts()
    greedy = session.generate(ids, mask, max_new_tokens=10, eos_token_id=[])
    searched = session.generate(ids, mask, max_new_tokens=10, eos_token_id=[], num_beams=5)
    assert not torch.equal(greedy, searched)


@pytest.mark.skipif(
    OLDER, reason="generate of transformers before 5.24 draws beams in another order"
)
@pytest.mark.parametrize("options", [{}, {"top_k": 3, "top_p": 0.5}, {"min_p": 0.9, "top_k": 0}])
def test_drawn_beams_with_equal_seeds(
    exported: Callable[[str], Pair], options: dict[str, Any]
) -> None:
    model, session = exported("llama")
    ids, mask = prompts()
    settings = {
        "max_new_tokens": 8,
        "do_sample": True,
        "num_beams": 3,
        "num_return_sequences": 2,
        "temperature": 1.5,
        "eos_token_id": likely(session, 2),
        **options,
    }
    torch.manual_seed(5)
    want = model.generate(ids, attention_mask=mask, **settings)
    got = session.generate(
        ids, mask, generation_config=settings, generator=torch.Generator().manual_seed(5)
    )
    assert torch.equal(got, want)


def test_processors_and_criteria_count_in_beam_search(exported: Callable[[str], Pair]) -> None:
    transformers = pytest.importorskip("transformers")
    model, session = exported("llama")
    ids, mask = prompts()
    options = {
        "max_new_tokens": 9,
        "num_beams": 3,
        "logits_processor": transformers.LogitsProcessorList(
            [transformers.NoRepeatNGramLogitsProcessor(1)]
        ),
        "stopping_criteria": transformers.StoppingCriteriaList(
            [lambda ids, scores: ids[:, -1] > 50]
        ),
    }
    want = model.generate(ids, attention_mask=mask, do_sample=False, **options)
    assert torch.equal(session.generate(ids, mask, **options), want)


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("gemma", marks=pytest.mark.slow)])
def test_beams_of_other_decoders(exported: Callable[[str], Pair], kind: str) -> None:
    model, session = exported(kind)
    ids, mask = prompts()
    want = model.generate(ids, attention_mask=mask, max_new_tokens=9, num_beams=3)
    assert torch.equal(session.generate(ids, mask, max_new_tokens=9, num_beams=3), want)


@pytest.mark.slow
def test_beams_that_outgrow_their_frequencies(exported: Callable[[str], Pair]) -> None:
    model, session = exported("phi3")
    ids, mask = prompts()
    options = {"max_new_tokens": 12, "num_beams": 2, "eos_token_id": None}
    want = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(session.generate(ids, mask, generation_config=options), want)


@pytest.mark.parametrize("kind", ["t5", pytest.param("whisper", marks=pytest.mark.slow)])
@pytest.mark.parametrize("drawn", [False, True])
def test_several_texts_of_an_encoder_decoder(
    exported: Callable[[str], Pair], kind: str, drawn: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    model, session = exported(kind)
    inputs = {"input_features": torch.randn(2, 4, 16)}
    if kind != "whisper":
        inputs = {"input_ids": torch.randint(3, VOCABULARY, (2, 9))}
        inputs["attention_mask"] = torch.ones(2, 9, dtype=torch.long)
        inputs["attention_mask"][1, 5:] = 0
    options: dict[str, Any] = {"max_new_tokens": 8, "num_return_sequences": 2}
    options |= {"do_sample": True, "top_k": 9} if drawn else {"num_beams": 3}
    torch.manual_seed(2)
    want = transformers.GenerationMixin.generate(model, **inputs, **options)
    torch.manual_seed(2)
    got = session.generate(**inputs, **options)
    assert torch.equal(got, want)
    assert len(got) == 4


def test_several_draws_of_each_prompt(exported: Callable[[str], Pair]) -> None:
    model, session = exported("llama")
    ids, mask = prompts()
    options = {"max_new_tokens": 7, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(4)
    want = model.generate(ids, attention_mask=mask, **options)
    torch.manual_seed(4)
    got = session.generate(ids, mask, **options)
    assert torch.equal(got, want)
    assert got.shape[0] == 9
    assert torch.equal(got[0, :6], got[2, :6])
    assert len({tuple(row.tolist()) for row in got[:3]}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_return_sequences": 2},
            "num_return_sequences=2: .* Pass do_sample=True, or num_beams",
        ),
        ({"num_beams": 2, "num_return_sequences": 3}, "is more than num_beams=2"),
        ({"num_beams": 0}, "num_beams=0: give a whole number from 1"),
        ({"num_return_sequences": 0}, "num_return_sequences=0: give a whole"),
        (
            {"num_beams": 2, "generation_config": {"early_stopping": "soon"}},
            "True, False or 'never'",
        ),
        ({"num_beams": 2, "generation_config": {"length_penalty": "1"}}, "length_penalty='1'"),
        ({"num_beams": 2, "generation_config": {"diversity_penalty": 1.0}}, "diversity_penalty"),
        ({"num_beams": 4, "generation_config": {"num_beam_groups": 2}}, "num_beam_groups=2"),
    ],
)
def test_beams_that_contradict_the_rest_are_refused(
    exported: Callable[[str], Pair], options: dict[str, Any], message: str
) -> None:
    _, session = exported("llama")
    with pytest.raises(ExportError, match=message):
        session.generate(IDS, **options)


def test_a_streamer_is_not_told_of_beams(exported: Callable[[str], Pair]) -> None:
    class Streamer:
        def put(self, value: Tensor) -> None:
            raise AssertionError("told")

        def end(self) -> None:
            raise AssertionError("told")

    _, session = exported("llama")
    with pytest.raises(ExportError, match="streamer and num_beams=2"):
        session.generate(IDS, num_beams=2, streamer=Streamer())
