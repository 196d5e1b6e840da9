"""A decoder step by step: what is bound once, and buffers that grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_fx.errors import ExportError
from lora_fx.export import decoder, ort
from lora_fx.export.decoder import Decoder, last_logits
from lora_fx.export.session import OnnxSession
from tests.export.tiny import LIMIT, VOCABULARY, Pair


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_buffers_grow_with_the_text(
    exported: Callable[[str], Pair], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, session = exported(kind)
    ids = torch.randint(3, VOCABULARY, (2, 4))
    options = {"max_new_tokens": 20, "min_new_tokens": 20}
    want = model.generate(ids, **options)
    monkeypatch.setattr(decoder, "_ROOM", 1)
    assert torch.equal(session.generate(ids, generation_config=options), want)
    beams = model.generate(ids, num_beams=3, **options)
    assert torch.equal(session.generate(ids, num_beams=3, generation_config=options), beams)


def test_logits_of_a_step_are_not_written_by_the_next(exported: Callable[[str], Pair]) -> None:
    model, session = exported("llama")
    ids = torch.randint(3, VOCABULARY, (2, 5))
    made = Decoder(session, torch.ones_like(ids), {}, length=LIMIT)
    first = made.step(ids[:, :3])
    kept = first.clone()
    second = made.step(ids[:, 3:])  # several tokens after a past
    assert torch.equal(first, kept)
    with torch.no_grad():
        torch.testing.assert_close(second, model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)
    made.forget()
    torch.testing.assert_close(made.step(ids), second, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        last_logits(session, ids, torch.ones_like(ids)), second, rtol=1e-4, atol=1e-4
    )


def test_rows_go_on_from_others(exported: Callable[[str], Pair]) -> None:
    _, session = exported("llama")
    ids = torch.randint(3, VOCABULARY, (3, 4))
    rows = torch.tensor([2, 0, 0])
    made = Decoder(session, torch.ones_like(ids), {}, length=LIMIT)
    made.step(ids)
    made.reorder(rows)
    next_ids = torch.randint(3, VOCABULARY, (3, 1))
    got = made.step(next_ids)
    whole = torch.cat([ids[rows], next_ids], dim=1)
    want = last_logits(session, whole, torch.ones_like(whole))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_cache_that_the_runtime_allocates(exported: Callable[[str], Pair], kind: str) -> None:
    """As on WebGPU, where PyTorch has no memory."""
    model, session = exported(kind)
    other = OnnxSession(session.path, "cpu")
    other._cache_place = ort.Place("cpu", 0)
    ids = torch.randint(3, VOCABULARY, (2, 4))
    for options in ({"max_new_tokens": 8}, {"max_new_tokens": 8, "num_beams": 3}):
        assert torch.equal(other.generate(ids, **options), model.generate(ids, **options))
    made = Decoder(other, torch.ones_like(ids), {"input_ids": ids, "attention_mask": ids}, length=9)
    kept = made.step(ids).clone()
    made.forget()
    assert torch.equal(made.step(ids), kept)


def test_logits_of_an_unknown_shape_are_allocated_too(exported: Callable[[str], Pair]) -> None:
    model, session = exported("llama")
    other = OnnxSession(session.path, "cpu")
    logits, *caches = other.outputs
    other.outputs = (ort.Port(logits.name, logits.dtype, ("batch", None, VOCABULARY)), *caches)
    ids = torch.randint(3, VOCABULARY, (2, 4))
    assert torch.equal(other.generate(ids, max_new_tokens=8), model.generate(ids, max_new_tokens=8))


def test_what_a_session_cannot_generate_with_is_refused(
    exported: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, session = exported("llama")
    other = OnnxSession(session.path, "cpu")
    monkeypatch.setattr(other, "_replays_graphs", True)
    with pytest.raises(ExportError, match="open the session without it to generate"):
        other.generate(torch.tensor([[4, 5]]))
    monkeypatch.setattr(other, "_replays_graphs", False)
    ids, *others = other.inputs
    monkeypatch.setattr(other, "inputs", (ort.Port(ids.name, ids.dtype, (1, "sequence")), *others))
    with pytest.raises(ExportError, match=r"'input_ids' has shape \[2, 2\], the file takes"):
        other.generate(torch.tensor([[4, 5], [6, 7]]))


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_a_gpu_goes_on_as_the_cpu_does(
    exported: Callable[[str], Pair], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, session = exported("llama")
    on_gpu = OnnxSession(session.path, "cuda")
    monkeypatch.setattr(decoder, "_ROOM", 1)  # buffers that grow
    ids = torch.randint(3, VOCABULARY, (2, 4))
    want, got = (
        one.generate(ids, max_new_tokens=16, generator=torch.Generator().manual_seed(1), **options)
        for one in (session, on_gpu)
    )
    assert torch.equal(got, want)
    assert list(on_gpu.stream(ids[:1], max_new_tokens=5)) == want_of(session, ids[:1])


def want_of(session: Any, ids: torch.Tensor) -> list[int]:
    return list(session.stream(ids, max_new_tokens=5))
