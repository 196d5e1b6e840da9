"""Tokens and text as they come, and texts that end at a string."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_fx.errors import ConfigError, ExportError
from tests.export.tiny import VOCABULARY, Pair

IDS = torch.tensor([[4, 5, 6]])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a letter, or a piece of a word, some of them with a space or a new line."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    endings = ["", "-", " ", "\n", "語"]
    pieces = [f"{letters[index % 26]}{index}{endings[index % 5]}" for index in range(VOCABULARY)]
    vocabulary = {piece: index for index, piece in enumerate([*letters, *pieces[26:]])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    made.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="c", pad_token="a")


def test_a_stream_gives_the_tokens_of_generate(exported: Callable[[str], Pair]) -> None:
    model, session = exported("llama")
    want = model.generate(IDS, max_new_tokens=9, eos_token_id=VOCABULARY)[0, 3:].tolist()
    assert list(session.stream(IDS, max_new_tokens=9, eos_token_id=[])) == want
    assert all(type(token) is int for token in session.stream(IDS, max_new_tokens=2))
    # The end-of-sequence token comes, and nothing after it.
    assert (
        list(session.stream(IDS, max_new_tokens=9, eos_token_id=want[3]))
        == want[: want.index(want[3]) + 1]
    )
    torch.manual_seed(6)
    drawn = session.generate(IDS, max_new_tokens=9, do_sample=True)[0, 3:].tolist()
    given = session.stream(
        IDS.numpy(), max_new_tokens=9, do_sample=True, generator=torch.Generator().manual_seed(6)
    )
    assert list(given) == drawn


def test_a_stream_may_be_left_early_and_two_may_run_at_once(
    exported: Callable[[str], Pair],
) -> None:
    _, session = exported("llama")
    want = session.generate(IDS, max_new_tokens=6, eos_token_id=[])[0, 3:].tolist()
    seen = []
    for token in session.stream(IDS, max_new_tokens=6, eos_token_id=[]):
        seen.append(token)
        if len(seen) == 2:
            break
    assert seen == want[:2]
    both = (session.stream(IDS, max_new_tokens=6, eos_token_id=[]) for _ in range(2))
    assert list(zip(*both, strict=True)) == [(token, token) for token in want]


def test_a_stream_of_text_is_cut_as_transformers_does(
    exported: Callable[[str], Pair], tokenizer: Any
) -> None:
    transformers = pytest.importorskip("transformers")
    model, session = exported("llama")
    for seed in range(4):
        torch.manual_seed(seed)
        ids = torch.randint(3, VOCABULARY, (1, 4))
        streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
        model.generate(ids, max_new_tokens=14, streamer=streamer)
        want = [piece for piece in streamer if piece]
        got = list(session.stream(ids, max_new_tokens=14, tokenizer=tokenizer))
        assert got == want
        assert len(got) > 2
    tokens = list(session.stream(ids, max_new_tokens=14, tokenizer=tokenizer, text=False))
    assert tokens == session.generate(ids, max_new_tokens=14)[0, 4:].tolist()
    options = {"skip_special_tokens": True}
    text = "".join(session.stream(ids, max_new_tokens=14, tokenizer=tokenizer, decode=options))
    assert text == tokenizer.decode(tokens, **options)


@pytest.mark.parametrize("several", [False, True])
def test_stop_strings_end_texts_where_transformers_ends_them(
    exported: Callable[[str], Pair], tokenizer: Any, several: bool
) -> None:
    model, session = exported("llama")
    ids = torch.randint(3, VOCABULARY, (3 if several else 1, 4))
    free = session.generate(ids, max_new_tokens=12, eos_token_id=[])
    # Across two tokens, and within one.
    across = tokenizer.decode(free[0, 7:9])[1:]
    within = tokenizer.decode(free[-1, 9:10])[:2]
    for strings in ([across], [across, within + "zz"], within):
        options = {"max_new_tokens": 12, "stop_strings": strings}
        want = model.generate(ids, tokenizer=tokenizer, **options)
        got = session.generate(ids, tokenizer=tokenizer, **options)
        assert torch.equal(got, want)
    one = ids[:1]
    short = session.generate(one, tokenizer=tokenizer, max_new_tokens=12, stop_strings=[across])
    assert short.shape[1] == 9
    pieces = session.stream(one, tokenizer=tokenizer, max_new_tokens=12, stop_strings=across)
    assert "".join(pieces).endswith(across)


def test_stop_strings_end_beams(exported: Callable[[str], Pair], tokenizer: Any) -> None:
    model, session = exported("llama")
    options = {"max_new_tokens": 8, "stop_strings": ["1", "-"], "num_beams": 3}
    want = model.generate(IDS, tokenizer=tokenizer, **options)
    assert torch.equal(session.generate(IDS, tokenizer=tokenizer, **options), want)


def test_threads_have_texts_of_their_own(exported: Callable[[str], Pair]) -> None:
    _, session = exported("llama")
    prompts = [torch.tensor([[4 + index, 5, 6 + index]]) for index in range(6)]
    want = [session.generate(ids, max_new_tokens=20, eos_token_id=[]) for ids in prompts]
    got: list[Any] = [None] * len(prompts)

    def run(index: int) -> None:
        for _ in range(3):
            got[index] = session.generate(prompts[index], max_new_tokens=20, eos_token_id=[])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_ids": IDS.repeat(2, 1)}, "continues one text, and rows=2 are several"),
        ({"num_beams": 2}, "num_beams=2 are several"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2 are several"),
        ({"streamer": None}, "stream takes no streamer"),
        ({"text": True}, "needs tokenizer="),
        ({"tokenizer": 3}, "tokenizer is a int: give one of transformers"),
        ({"stop_strings": "x"}, "needs tokenizer="),
        ({"stop_strings": "x", "tokenizer": 3, "text": False}, "tokenizer is a int"),
        ({"max_length": 3}, "'max_length' is of the type int"),
    ],
)
def test_streams_that_mean_nothing_are_refused_before_the_first_token(
    exported: Callable[[str], Pair], options: dict[str, Any], message: str
) -> None:
    _, session = exported("llama")
    with pytest.raises(ExportError, match=message):
        session.stream(**{"input_ids": IDS, **options})


@pytest.mark.parametrize("strings", ["", [], ["a", ""], 3, ["a", 3]])
def test_stop_strings_are_texts(
    exported: Callable[[str], Pair], tokenizer: Any, strings: Any
) -> None:
    _, session = exported("llama")
    with pytest.raises(ExportError, match=r"stop_strings=.*give a text, or a list"):
        session.generate(IDS, stop_strings=strings, tokenizer=tokenizer)


def test_a_stream_names_an_adapter_that_is_not_there(exported: Callable[[str], Pair]) -> None:
    _, session = exported("llama")
    with pytest.raises(ConfigError, match="takes no adapters"):
        session.stream(IDS, adapter="maths")
