"""Attention over a cache as one operator, compared with PyTorch token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx.helper as oh
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

import lora_fx
from lora_fx.errors import ExportError, ProviderError
from lora_fx.export import decoder as decoder_module
from lora_fx.export.fuse import (
    ONE_ROW_CHUNKS_KEY,
    SHARED_CACHE_KEY,
    Target,
    check_attention,
    fuse,
)
from lora_fx.export.fuse.fused_attention import group_query_attention, share_cache
from lora_fx.export.onnx import export_onnx
from lora_fx.export.session import OnnxSession
from tests.export.fuse.conftest import Exported
from tests.export.fuse.small import FLOAT, VOCABULARY, decoder, graph, operators, prompts

KINDS = ["llama", "qwen3", "mistral", "phi", "gpt2"]


def empty(session: OnnxSession, batch: int) -> dict[str, Tensor]:
    return {
        port.name: torch.zeros(
            batch, port.shape[1], 0, port.shape[3], dtype=getattr(torch, port.dtype)
        )
        for port in session.inputs
        if port.name.startswith("past_key_values")
    }


def following(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace("present", "past_key_values"): value
        for name, value in results.items()
        if name != "logits"
    }


def expected(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the last position, by a forward over the whole text."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[
            :, -1:
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_each_attention_is_one_operator(exported: Callable[..., Exported], kind: str) -> None:
    made = exported(kind)
    assert made.report.optimize == "runtime"
    assert made.report.fused["group-query-attention"] == 2
    found = made.report.operators
    assert found["GroupQueryAttention"] == 2
    assert not {"Softmax", "Transpose", "IsNaN", "GatherND", "Tile"} & set(found)
    assert found.get("RotaryEmbedding", 0) == (0 if kind == "gpt2" else 4)


@pytest.mark.parametrize("dtype", [None, "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_token_by_token(
    exported: Callable[..., Exported], kind: str, dtype: Any
) -> None:
    if dtype is not None and kind not in ("llama", "mistral"):
        pytest.skip("one of each form of mask in fp16")
    made = exported(kind, dtype)
    ids, mask = prompts()
    past, fresh = empty(made.session, len(ids)), ids
    for _ in range(6):
        got = made.session.run({"input_ids": fresh, "attention_mask": mask, **past})
        want = expected(made.model, ids, mask)
        tolerance = 1e-5 if dtype is None else 1e-2
        torch.testing.assert_close(
            got["logits"].float(), want, rtol=0, atol=tolerance * float(want.abs().max())
        )
        past, fresh = following(got), want[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, fresh], 1), torch.cat([mask, torch.ones_like(fresh)], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_as_if_it_were_alone(exported: Callable[..., Exported], kind: str) -> None:
    made = exported(kind)
    ids, mask = prompts()
    together = made.session.run(
        {"input_ids": ids, "attention_mask": mask, **empty(made.session, len(ids))}
    )
    for row, seen in enumerate(mask):
        alone = ids[row, seen.bool()][None]
        found = made.session.run(
            {"input_ids": alone, "attention_mask": torch.ones_like(alone), **empty(made.session, 1)}
        )
        torch.testing.assert_close(
            together["logits"][row], found["logits"][0], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_generation_gives_the_tokens_of_transformers(
    exported: Callable[..., Exported], kind: str
) -> None:
    made = exported(kind)
    ids, mask = prompts()
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
    want = made.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(made.session.generate(ids, mask, **settings), want)


def test_several_tokens_after_a_past_run_row_by_row(exported: Callable[..., Exported]) -> None:
    made = exported("llama")
    assert made.session.metadata[ONE_ROW_CHUNKS_KEY] == "1"
    ids, mask = prompts()
    begun = made.session.run(
        {"input_ids": ids, "attention_mask": mask, **empty(made.session, len(ids))}
    )
    more = torch.randint(3, VOCABULARY, (3, 4))
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    got = made.session.run({"input_ids": more, "attention_mask": mask, **following(begun)})
    torch.testing.assert_close(got["logits"], expected(made.model, ids, mask), rtol=1e-4, atol=1e-4)
    assert got["present.0.key"].shape == (3, 2, 10, 16)


def test_cuda_is_refused_where_it_has_no_kernel() -> None:
    metadata = {ONE_ROW_CHUNKS_KEY: "1"}
    check_attention(metadata, "cpu", "1.22.0", "float32", "model.onnx")
    check_attention({}, "cuda", "1.22.0", "float32", "model.onnx")
    check_attention(metadata, "cuda", "1.29.0", "float16", "model.onnx")
    check_attention(metadata, "cuda", "1.33.0.dev20261101", "bfloat16", "model.onnx")
    with pytest.raises(ProviderError, match=r"in fp32.*provider='cuda'"):
        check_attention(metadata, "cuda", "1.31.1", "float32", "model.onnx")
    with pytest.raises(
        ProviderError, match=r"this is 1\.28\.0: pip install 'onnxruntime-gpu>=1\.29'"
    ):
        check_attention(metadata, "cuda", "1.28.0", "float16", "model.onnx")


def test_cuda_has_it_in_half_precision(tmp_path: Any) -> None:
    made = converted(tmp_path)
    for dtype in ("fp16", "bf16"):
        fused = fuse(made.clone(), Target("runtime", "cuda", dtype))
        assert fused.done["group-query-attention"] == 2
        assert "packed-products" in fused.done
        assert "shared-cache" not in fused.done
    fused = fuse(made, Target("runtime", "cuda", "fp32"))
    assert (
        fused.refused["group-query-attention"] == "the cuda provider has no kernel for it in fp32"
    )


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_padding_on_the_left_on_cuda(tmp_path: Any, kind: str) -> None:
    model = decoder(kind)
    ids, mask = prompts()
    file = tmp_path / "model.onnx"
    report = export_onnx(
        model,
        file,
        ids,
        task="text-generation",
        dtype="fp16",
        optimize="runtime",
        provider="cuda",
    )
    assert report.fused["group-query-attention"] == 2
    session = OnnxSession(file, "cuda")
    assert "GroupQueryAttention" not in str(session.placement().elsewhere)
    past, fresh = empty(session, len(ids)), ids
    for _ in range(6):
        got = session.run({"input_ids": fresh, "attention_mask": mask, **past})
        want = expected(model, ids, mask)
        torch.testing.assert_close(
            got["logits"].float(), want, rtol=0, atol=1e-2 * float(want.abs().max())
        )
        past, fresh = following(got), want[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, fresh], 1), torch.cat([mask, torch.ones_like(fresh)], 1)
    # A cache of several tokens after a past, row by row, and the loop's buffers.
    ids, mask = prompts()
    alone = OnnxSession(file, "cpu").generate(ids, mask, max_new_tokens=8, eos_token_id=[])
    assert torch.equal(session.generate(ids, mask, max_new_tokens=8, eos_token_id=[]), alone)


def test_positions_beyond_the_table_are_refused(exported: Callable[..., Exported]) -> None:
    made = exported("llama")
    limit = made.model.config.max_position_embeddings
    ids = torch.randint(3, VOCABULARY, (1, limit + 1))
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **empty(made.session, 1)}
    with pytest.raises(ExportError, match="indices"):
        made.session.run(feeds)


def test_angles_without_an_end_are_computed_in_the_file(tmp_path: Any) -> None:
    made = decoder("llama", max_position_embeddings=2**20)
    ids, mask = prompts()
    report = export_onnx(
        made, tmp_path / "long.onnx", ids, task="text-generation", optimize="runtime"
    )
    assert report.optimize == "runtime"
    assert report.operators["RotaryEmbedding"] == 4
    assert report.operators["Cos"] == 1
    session = OnnxSession(tmp_path / "long.onnx", "cpu")
    want = made.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert torch.equal(session.generate(ids, mask, max_new_tokens=6, eos_token_id=[]), want)


def converted(tmp_path: Any, **changes: Any) -> ir.Model:
    path = tmp_path / "plain.onnx"
    ids = torch.randint(3, VOCABULARY, (2, 6))
    export_onnx(
        decoder("llama", **changes),
        path,
        ids,
        task="text-generation",
        optimize="none",
        verify=False,
    )
    return ir.load(path)


def test_heads_of_another_width_keep_standard_operators(tmp_path: Any) -> None:
    made = converted(tmp_path, head_dim=12)
    fused = fuse(made, Target("runtime"))
    assert "group-query-attention" not in fused.done
    assert fused.refused["group-query-attention"] == "the width of a head is no multiple of 8 (2×)"
    assert fused.done["grouped-heads"] == 2
    assert ONE_ROW_CHUNKS_KEY not in made.metadata_props


def test_a_mask_that_shows_later_tokens_is_left(tmp_path: Any) -> None:
    made = converted(tmp_path)
    (causal,) = [node for node in made.graph if node.op_type == "LessOrEqual"]
    # Every key up to the one after the query: the operator would mask that.
    later = ir.node(
        "Add", [causal.inputs[1], ir.val("one", const_value=ir.tensor([1], name="one"))]
    )
    made.graph.register_initializer(later.inputs[1])
    made.graph.insert_before(causal, later)
    later.outputs[0].shape, later.outputs[0].dtype = causal.inputs[1].shape, causal.inputs[1].dtype
    causal.replace_input_with(1, later.outputs[0])
    count, why = group_query_attention(made)
    assert count == 0
    assert why == {"its mask is not seen to be causal": 2}


def test_attention_under_a_soft_cap_is_said_to_be_left() -> None:
    scores = {"x": (FLOAT, ["batch", 4, "sequence", "total"])}
    nodes = [oh.make_node("Tanh", ["x"], ["capped"]), oh.make_node("Softmax", ["capped"], ["y"])]
    made = graph(nodes, scores, {"y": scores["x"]})
    why = {"its scores are not those of query and key alone, as under a soft cap": 1}
    assert group_query_attention(made) == (0, why)


def test_attention_without_a_cache_is_left(tmp_path: Any) -> None:
    path = tmp_path / "plain.onnx"
    ids = torch.randint(3, VOCABULARY, (2, 6))
    made = decoder("llama")
    made.config.use_cache = False
    report = lora_fx.export_onnx(made, path, {"input_ids": ids}, optimize="runtime")
    assert report.optimize == "runtime"
    assert report.not_fused["group-query-attention"].startswith("it has no cache")
    assert operators(path)["GroupQueryAttention"] == 0


def bound(
    session: OnnxSession, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], dict[str, set[int]]]:
    """Where the cache of the text that is generated next is read and written."""
    made: list[Any] = []
    make = session._binding

    class Watched:
        def __init__(self, own: Any) -> None:
            self._own, self.addresses = own, {"bind_input": set(), "bind_output": set()}

        def __getattr__(self, name: str) -> Any:
            called = getattr(self._own, name)
            if name not in self.addresses:
                return called

            def bind(value: str, *where: Any) -> None:
                if value in ("past_key_values.0.key", "present.0.key"):
                    self.addresses[name].add(where[-1])
                called(value, *where)

            return bind

    def watch(held: Any, rows: int) -> Any:
        made.append(Watched(make(held, rows)))
        return made[-1]

    monkeypatch.setattr(session, "_binding", watch)
    return lambda: made[-1].addresses


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cache_is_appended_to_where_it_is(
    exported: Callable[..., Exported], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported(kind)
    assert made.report.fused["shared-cache"] == 4
    assert made.session.metadata[SHARED_CACHE_KEY] == "1"
    seen = bound(made.session, monkeypatch)
    ids, mask = prompts()
    settings = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    want = made.model.generate(ids, attention_mask=mask, do_sample=False, **settings)
    assert torch.equal(made.session.generate(ids, mask, generation_config=settings), want)
    read, written = seen().values()
    assert read == written
    assert len(read) == 1
    # Buffers that grow on the way are filled with what was there.
    monkeypatch.setattr(decoder_module, "_ROOM", 1)
    assert torch.equal(made.session.generate(ids, mask, generation_config=settings), want)
    assert len(seen()["bind_input"]) > 1
    beams = made.model.generate(ids, attention_mask=mask, num_beams=3, **settings)
    got = made.session.generate(ids, mask, num_beams=3, generation_config=settings)
    assert torch.equal(got, beams)


def test_a_cache_that_is_read_elsewhere_is_not_shared(tmp_path: Any) -> None:
    made = converted(tmp_path)
    assert "shared-cache" not in fuse(made.clone(), Target("standard")).done
    present = next(value for value in made.graph.outputs if value.name == "present.0.key")
    length = ir.node("Shape", [present])
    length.outputs[0].name = "length"
    length.outputs[0].dtype, length.outputs[0].shape = ir.DataType.INT64, ir.Shape([4])
    made.graph.append(length)
    made.graph.outputs.append(length.outputs[0])
    fused = fuse(made, Target("runtime"))
    assert fused.done["group-query-attention"] == 2
    assert fused.refused["shared-cache"] == "a cache is read outside of GroupQueryAttention (1×)"
    assert SHARED_CACHE_KEY not in made.metadata_props


def test_a_file_without_the_length_of_the_text_is_not_changed(tmp_path: Any) -> None:
    made = converted(tmp_path)
    fuse(made, Target("runtime"))
    past = next(v for v in made.graph.inputs if v.name == "past_key_values.0.key")
    length = ir.node("Shape", [past], {"start": 2, "end": 3})
    length.outputs[0].dtype, length.outputs[0].shape = ir.DataType.INT64, ir.Shape([1])
    made.graph.append(length)
    made.graph.outputs.append(length.outputs[0])
    for value in made.graph.inputs:
        names = ["other" if str(size) == "total_length" else size for size in value.shape]
        value.shape = ir.Shape(names)
    before = list(made.graph)
    assert share_cache(made) == (0, {"no input of the file has the length of the whole text": 1})
    assert list(made.graph) == before
