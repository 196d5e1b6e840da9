"""What an exported decoder says, token for token what ``model.generate`` says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError
from lora_fx.export.decoder_cache import GENERATION_KEY
from lora_fx.export.onnx import export_onnx
from lora_fx.export.session import OnnxSession
from tests.export.tiny import LIMIT, SWITCH, VOCABULARY, Pair

slow = pytest.mark.slow
DECODERS = ["llama", "gemma", "gpt2", pytest.param("mistral", marks=slow)]
DECODERS += [pytest.param("qwen3", marks=slow)]


def prompts() -> tuple[Tensor, Tensor]:
    """Three of them, padded on the left."""
    ids = torch.randint(3, VOCABULARY, (3, 6))
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, :1] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("kind", DECODERS)
def test_greedy_tokens_are_those_of_generate(exported: Callable[[str], Pair], kind: str) -> None:
    model, session = exported(kind)
    ids, mask = prompts()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=16, eos_token_id=VOCABULARY)
    assert len(expected[:, 6:].unique()) > 5  # not one token over and over
    got = session.generate(ids, mask, max_new_tokens=16, eos_token_id=[])
    assert torch.equal(got, expected)
    # Pad tokens are padding where there is no mask; and one prompt is a batch, too.
    assert torch.equal(session.generate(ids, max_new_tokens=16, eos_token_id=[]), expected)
    alone = session.generate(ids[1:2, 3:], max_new_tokens=16, eos_token_id=[])
    assert torch.equal(alone, expected[1:2, 3:])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart"])
def test_a_run_without_a_cache_begins_a_text(exported: Callable[[str], Pair], kind: str) -> None:
    _, session = exported(kind)
    ids, _ = prompts()
    given: dict[str, Any] = {"input_ids": ids}
    if session.encoder is not None:
        given |= session.encoder.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        given["encoder_attention_mask"] = torch.ones_like(ids)
        given = {
            name.replace("present.", "past_key_values."): value for name, value in given.items()
        }
    sizes = {"batch": 3, "sequence": 6, "total_length": 6, "past_length": 0}
    empty = {
        port.name: torch.ones([sizes.get(axis, axis) for axis in port.shape])
        .to(getattr(torch, port.dtype))
        for port in session.inputs
        if port.name not in given
    }  # fmt: skip
    whole = session.run({**empty, **given})
    short = session.run(given)
    assert all(torch.equal(short[name], value) for name, value in whole.items())
    arrays = session.run({name: value.numpy() for name, value in given.items()})
    assert isinstance(arrays["logits"], np.ndarray)
    one = next(name for name in empty if "past_key_values" in name)
    with pytest.raises(ExportError, match="lacks"):
        session.run({**given, one: empty[one]})


@pytest.mark.parametrize("length", [6, SWITCH, SWITCH + 1])
def test_a_text_that_outgrows_its_frequencies_is_read_anew(
    exported: Callable[[str], Pair], length: int
) -> None:
    model, session = exported("phi3")
    ids = torch.randint(3, VOCABULARY, (2, length))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"max_new_tokens": 16, "min_new_tokens": 16}
    expected = model.generate(ids, attention_mask=mask, **options)
    got = session.generate(ids, mask, generation_config=options)
    assert torch.equal(got, expected)
    # Without a cache nothing is of another length: that is what it should be.
    free = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(got, free)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 0},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8},
        {"min_p": 0.1, "top_k": 0, "repetition_penalty": 1.7},
    ],
)
def test_equal_seeds_draw_equal_tokens(
    exported: Callable[[str], Pair], options: dict[str, Any]
) -> None:
    model, session = exported("llama")
    ids, mask = prompts()
    torch.manual_seed(5)
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=True, **options
    )
    torch.manual_seed(5)
    got = session.generate(ids, mask, max_new_tokens=12, do_sample=True, **options)
    assert torch.equal(got, expected)
    again = session.generate(
        ids, mask, max_new_tokens=12, do_sample=True, generator=torch.Generator().manual_seed(5),
        **options,
    )  # fmt: skip
    assert torch.equal(again, expected)


def test_rows_that_end_early_are_padded(exported: Callable[[str], Pair]) -> None:
    model, session = exported("llama")
    ids, mask = prompts()
    free = session.generate(ids, mask, max_new_tokens=10, eos_token_id=[])
    ends = [int(free[0, 8]), int(free[1, 11])]
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=10, eos_token_id=ends)
    got = session.generate(ids, mask, max_new_tokens=10, eos_token_id=ends)
    assert torch.equal(got, expected)
    assert bool((got[0, 9:] == 0).all())
    # All have ended: no further step.
    first = free[:, 6].unique().tolist()
    short = session.generate(ids, mask, max_new_tokens=10, eos_token_id=first)
    assert short.shape == (3, 7)
    assert torch.equal(short, model.generate(ids, attention_mask=mask, eos_token_id=first))


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 4, "eos_token_id": list(range(3, 40))},
        {"min_length": 9, "eos_token_id": list(range(3, 40))},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": list(range(20, 50)), "begin_suppress_tokens": list(range(50, 61))},
        {"forced_eos_token_id": 7, "eos_token_id": 7},
        {"repetition_penalty": 3.0},
        {"max_length": 9},
        {},
    ],
)
def test_the_generation_config_counts(
    exported: Callable[[str], Pair], options: dict[str, Any]
) -> None:
    model, session = exported("llama")
    ids, mask = prompts()
    if "max_length" not in options and options:
        options = {"max_new_tokens": 12, **options}
    expected = model.generate(ids, attention_mask=mask, **options)
    defaults = model.generation_config.to_dict() | options
    assert torch.equal(session.generate(ids, mask, generation_config=defaults), expected)


def test_a_forced_first_token_counts(exported: Callable[[str], Pair]) -> None:
    model, session = exported("llama")
    ids = torch.tensor([[4], [9]])
    options = {"forced_bos_token_id": 17, "begin_suppress_tokens": list(range(40))}
    expected = model.generate(ids, max_new_tokens=5, **options)
    assert expected[:, 1].tolist() == [17, 17]
    defaults = model.generation_config.to_dict() | options
    got = session.generate(ids, max_new_tokens=5, generation_config=defaults)
    assert torch.equal(got, expected)


def test_processors_criteria_and_streamers_of_transformers_work(
    exported: Callable[[str], Pair],
) -> None:
    transformers = pytest.importorskip("transformers")
    model, session = exported("llama")
    ids, mask = prompts()
    options = {
        "logits_processor": transformers.LogitsProcessorList(
            [transformers.NoRepeatNGramLogitsProcessor(1)]
        ),
        "stopping_criteria": transformers.StoppingCriteriaList(
            [lambda ids, scores: ids[:, -1] > 50]
        ),
    }
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=14, **options)
    heard: list[Tensor] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            heard.append(value)

        def end(self) -> None:
            heard.append(torch.empty(0))

    got = session.generate(ids, mask, max_new_tokens=14, streamer=Streamer(), **options)
    assert torch.equal(got, expected)
    assert torch.equal(heard[0], ids)
    assert torch.equal(torch.stack(heard[1:-1], dim=1), got[:, 6:])
    assert not len(heard[-1])


class Watched:
    """A binding, and what it was told to bind."""

    def __init__(self, binding: Any) -> None:
        self._own = binding
        self.inputs: list[tuple[str, Any, list[int]]] = []
        self.outputs: list[tuple[str, Any, list[int]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def bind_input(self, name: str, *where: Any) -> None:
        self.inputs.append((name, where[-1], where[-2]))
        self._own.bind_input(name, *where)

    def bind_output(self, name: str, *where: Any) -> None:
        self.outputs.append((name, where[-1], where[-2]))
        self._own.bind_output(name, *where)


def watched(session: OnnxSession, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Watched:
    """The binding of a text of six tokens, three of them new."""
    made: list[Watched] = []
    bound = session._binding

    def watch(held: Any, rows: int) -> Watched:
        made.append(Watched(bound(held, rows)))
        return made[-1]

    monkeypatch.setattr(session, "_binding", watch)
    session.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, eos_token_id=[], **options)
    (binding,) = made  # one for the whole text
    return binding


def test_the_cache_goes_to_and_fro_between_two_buffers(
    exported: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    binding = watched(exported("llama")[1], monkeypatch)
    read = [one for one in binding.inputs if one[0] == "past_key_values.0.key"]
    written = [one for one in binding.outputs if one[0] == "present.0.key"]
    assert [shape[2] for _, _, shape in read] == [0, 3, 4]
    assert [shape[2] for _, _, shape in written] == [3, 4, 5]
    assert [address for _, address, _ in read[1:]] == [address for _, address, _ in written[:-1]]
    assert len({address for _, address, _ in read + written}) == 2
    # The memory of a token is bound once, and every further one is written there.
    assert [one[2] for one in binding.inputs if one[0] == "input_ids"] == [[1, 3], [1, 1]]
    assert [one[2] for one in binding.outputs if one[0] == "logits"] == [[1, 1, VOCABULARY]] * 2


@pytest.mark.cuda
def test_a_gpu_says_what_the_cpu_says(exported: Callable[[str], Pair]) -> None:
    _, session = exported("llama")
    ids, mask = prompts()
    on_gpu = OnnxSession(session.path, "cuda")
    expected = session.generate(ids, mask, max_new_tokens=12)
    assert torch.equal(on_gpu.generate(ids.cuda(), mask.cuda(), max_new_tokens=12).cpu(), expected)


def test_numbers_of_numpy_and_a_generation_config_of_transformers(
    exported: Callable[[str], Pair],
) -> None:
    transformers = pytest.importorskip("transformers")
    _, session = exported("llama")
    want = session.generate(IDS, max_new_tokens=4)
    assert torch.equal(session.generate(IDS, max_new_tokens=np.int64(4)), want)
    config = transformers.GenerationConfig(max_new_tokens=4)
    assert torch.equal(session.generate(IDS, generation_config=config), want)


@pytest.mark.parametrize(
    "options",
    [{"min_new_tokens": 3}, {"do_sample": True, "top_k": 5}, {"repetition_penalty": 2.0}, {}],
)
def test_what_a_generation_config_leaves_out_is_the_models_own(
    exported: Callable[[str], Pair], options: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    model, plain = exported("llama")
    ids, mask = prompts()
    free = plain.generate(ids, mask, max_new_tokens=10, eos_token_id=[])
    own = {"eos_token_id": [int(free[0, 7]), int(free[1, 9])], "max_new_tokens": 9, "top_p": 0.9}
    session = _with_defaults(plain, own)
    before = model.generation_config
    try:
        model.generation_config = transformers.GenerationConfig(**{**before.to_dict(), **own})
        for changed in (options, options | {"max_new_tokens": 6}):
            config = transformers.GenerationConfig(**changed)
            torch.manual_seed(3)
            want = model.generate(ids, attention_mask=mask, generation_config=config)
            for given in (config, changed):
                torch.manual_seed(3)
                got = session.generate(ids, mask, generation_config=given)
                assert torch.equal(got, want)
        # By name, None switches off what the model has.
        off = {"eos_token_id": None, "top_k": None, "do_sample": True}
        torch.manual_seed(3)
        want = model.generate(ids, attention_mask=mask, **off)
        torch.manual_seed(3)
        assert torch.equal(session.generate(ids, mask, generation_config=off), want)
        assert want.shape[1] == 6 + 9
    finally:
        model.generation_config = before


def test_what_the_model_asks_for_and_is_not_done_can_be_switched_off(
    exported: Callable[[str], Pair],
) -> None:
    _, plain = exported("llama")
    session = _with_defaults(plain, {"num_beam_groups": 4, "max_time": 3.0})
    with pytest.raises(
        ExportError, match=r"generation_config=\{'num_beam_groups': 1, 'max_time': None\}"
    ):
        session.generate(IDS, max_new_tokens=4)
    got = session.generate(
        IDS, max_new_tokens=4, generation_config={"num_beam_groups": 1, "max_time": None}
    )
    assert torch.equal(got, plain.generate(IDS, max_new_tokens=4))


def _with_defaults(session: OnnxSession, more: dict[str, Any]) -> OnnxSession:
    remembered = json.loads(session.metadata[GENERATION_KEY])
    other = OnnxSession(session.path, "cpu")
    other.metadata[GENERATION_KEY] = json.dumps(
        remembered | {"defaults": remembered["defaults"] | more}
    )
    return other


def test_arrays_in_arrays_out(exported: Callable[[str], Pair]) -> None:
    _, session = exported("llama")
    ids, mask = prompts()
    expected = session.generate(ids, mask, max_new_tokens=3)
    got = session.generate(ids.numpy().astype(np.int32), mask.numpy(), max_new_tokens=3)
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got, expected.numpy())


@pytest.mark.parametrize("kind", ["t5", pytest.param("whisper", marks=slow)])
@pytest.mark.parametrize("sampled", [False, True])
def test_encoder_decoders(exported: Callable[[str], Pair], kind: str, sampled: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model, session = exported(kind)
    assert session.encoder is not None
    inputs = {"input_features": torch.randn(3, 4, 16)}
    if kind != "whisper":
        inputs = {"input_ids": torch.randint(3, VOCABULARY, (3, 9))}
        inputs["attention_mask"] = torch.ones(3, 9, dtype=torch.long)
        inputs["attention_mask"][1, 5:] = 0
    options = {"max_new_tokens": 14, "do_sample": sampled, "top_k": 12}
    torch.manual_seed(2)
    # Whisper's own generate draws only at a temperature, and cuts off what the decoder began with.
    expected = transformers.GenerationMixin.generate(model, **inputs, **options)
    torch.manual_seed(2)
    got = session.generate(**inputs, **options)
    assert torch.equal(got, expected)
    assert len(expected[:, 1:].unique()) > 3
    if kind == "whisper" and not sampled:
        text = model.generate(**inputs, max_new_tokens=14)
        assert torch.equal(got[:, 1 : 1 + text.shape[1]], text)


def test_the_decoder_may_begin_with_more_tokens(exported: Callable[[str], Pair]) -> None:
    model, session = exported("t5")
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (2, 5))}
    for begin in (torch.tensor([[3, 8, 9]] * 2), torch.tensor([[8, 9]] * 2)):
        expected = model.generate(**inputs, decoder_input_ids=begin, max_new_tokens=5)
        got = session.generate(**inputs, decoder_input_ids=begin, max_new_tokens=5)
        assert torch.equal(got, expected)
        assert got[:, 0].tolist() == [3, 3]


IDS = torch.tensor([[4, 5, 6]])


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ({}, {}, "takes input_ids: there are none"),
        ({"input_ids": IDS[0]}, {}, r"'input_ids' is int64 of shape \[3\]"),
        ({"input_ids": IDS.float()}, {}, "'input_ids' is float32"),
        ({"input_ids": IDS[:, :0]}, {}, "at least one"),
        ({"input_ids": [[1, 2]]}, {}, "'input_ids' is of the type list"),
        ({"input_ids": IDS - 100}, {}, "holds -.*labels"),
        ({"input_ids": IDS}, {"max_time": 4}, "'max_time' is of the type int.*generation_config="),
        ({"input_ids": IDS, "attention_mask": IDS[:, :2]}, {}, r"shape \[1, 2\].*\[1, 3\]"),
        (
            {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 0]])},
            {},
            "row 0 .* ends with padding.*pad on the left",
        ),
        ({"input_ids": IDS, "atention_mask": IDS}, {}, "did you mean 'attention_mask'"),
        ({"input_ids": IDS.repeat(1, LIMIT)}, {}, f"{3 * LIMIT} tokens.*{LIMIT} positions"),
        ({"input_ids": IDS}, {"max_new_tokens": LIMIT}, f"max_new_tokens={LIMIT - 3} or less"),
        ({"input_ids": IDS}, {"max_new_tokens": 0}, "max_new_tokens=0: give a whole number from 1"),
        ({"input_ids": IDS}, {"temperature": 0.0}, "temperature=0.0: give a number above 0"),
        ({"input_ids": IDS}, {"top_p": 1.5}, "top_p=1.5: give a probability"),
        ({"input_ids": IDS}, {"temperature": "1"}, "temperature='1': give a number"),
        ({"input_ids": IDS}, {"max_new_tokens": True}, "max_new_tokens=True: give a whole"),
        ({"input_ids": IDS}, {"generation_config": 3}, "generation_config is a int"),
        ({"input_ids": IDS}, {"top_k": -1}, "top_k=-1: give a whole number from 0"),
        ({"input_ids": IDS}, {"eos_token_id": ["a"]}, "eos_token_id=.*number of a token"),
        (
            {"input_ids": IDS},
            {"generation_config": {"num_beam_groups": 4}},
            "for num_beam_groups=4",
        ),
        ({"input_ids": IDS}, {"generation_config": {"max_length": 3}}, "leave no room"),
        (
            {"input_ids": IDS},
            {"generation_config": {"typical_p": 0.5}, "do_sample": True},
            "asks for typical_p=0.5",
        ),
        (
            {"input_ids": IDS},
            {"generation_config": {"output_scores": True, "penalty_alpha": 0.6}},
            "asks for penalty_alpha=0.6, output_scores=True",
        ),
        ({"input_ids": IDS}, {"generation_config": {"length_penalty": 2.0}}, "length_penalty=2.0"),
        (
            {"input_ids": IDS},
            {"generation_config": {"cache_implementation": "quantized"}},
            "cache_implementation='quantized'",
        ),
        (
            {"input_ids": IDS},
            {"generation_config": {"temprature": 0.1, "color": "red"}},
            r"temprature=0.1 \(did you mean 'temperature'\?\), color='red', which neither",
        ),
    ],
)
def test_calls_that_mean_nothing_are_refused(
    exported: Callable[[str], Pair], inputs: Any, options: dict[str, Any], message: str
) -> None:
    _, session = exported("llama")
    with pytest.raises(ExportError, match=message):
        session.generate(**inputs, **options)


def test_every_key_of_transformers_is_done_or_refused_but_at_its_default(
    exported: Callable[[str], Pair],
) -> None:
    transformers = pytest.importorskip("transformers")
    _, session = exported("llama")
    want = session.generate(IDS, max_new_tokens=4)
    config = transformers.GenerationConfig()
    defaults = config._get_default_generation_params()
    everything = config.to_dict() | defaults | {"max_length": None, "max_new_tokens": 4}
    assert torch.equal(session.generate(IDS, generation_config=everything), want)
    fast = {"use_cache": False, "cache_implementation": "static", "prefill_chunk_size": 2}
    assert torch.equal(session.generate(IDS, generation_config=everything | fast), want)


def test_what_the_model_itself_has_is_known(exported: Callable[[str], Pair]) -> None:
    _, session = exported("llama")
    want = session.generate(IDS, max_new_tokens=4)
    remembered = json.loads(session.metadata[GENERATION_KEY])
    own = {"alignment_heads": [[1, 2]], "length_penalty": 0.8, **remembered["defaults"]}
    other = OnnxSession(session.path, "cpu")
    other.metadata[GENERATION_KEY] = json.dumps(remembered | {"defaults": own})
    assert torch.equal(other.generate(IDS, max_new_tokens=4), want)
    passed = own | {"alignment_heads": [(1, 2)], "max_new_tokens": 4}
    assert torch.equal(other.generate(IDS, generation_config=passed), want)
    with pytest.raises(ExportError, match="alignment_heads=3"):
        other.generate(IDS, generation_config=own | {"alignment_heads": 3})


def test_calls_of_an_encoder_decoder_that_mean_nothing(exported: Callable[[str], Pair]) -> None:
    _, session = exported("t5")
    with pytest.raises(ExportError, match="takes input_ids, attention_mask: there are none"):
        session.generate()
    with pytest.raises(ExportError, match="'decoder_input_ids' has 2 rows, 'input_ids' has 1"):
        session.generate(IDS, decoder_input_ids=torch.tensor([[3], [3]]))
    with pytest.raises(ExportError, match=r"pass decoder_input_ids"):
        session.generate(
            IDS, generation_config={"decoder_start_token_id": None, "bos_token_id": None}
        )


def test_a_mask_covers_past_and_new_tokens(exported: Callable[[str], Pair]) -> None:
    _, session = exported("llama")
    past = {p.name: torch.zeros(1, 2, 2, 4) for p in session.inputs if "past" in p.name}
    session.run({"input_ids": IDS, "attention_mask": torch.ones(1, 5, dtype=torch.long), **past})
    for length in (3, 6):
        mask = torch.ones(1, length, dtype=torch.long)
        message = rf"axis 1 of 'attention_mask' has {length}, .* 2 \+ 3"
        with pytest.raises(ExportError, match=message):
            session.run({"input_ids": IDS, "attention_mask": mask, **past})


def test_a_file_without_a_task_does_not_generate(tmp_path: Path) -> None:
    export_onnx(nn.Linear(4, 2), tmp_path / "m.onnx", torch.randn(2, 4))
    session = OnnxSession(tmp_path / "m.onnx", "cpu")
    with pytest.raises(ExportError, match=r"m\.onnx was not exported for text generation.*task="):
        session.generate(IDS)
