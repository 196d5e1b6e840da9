"""Calls with an adapter for each sample: a form is followed once, and runs by what was seen afterwards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx import ConfigError, LoraConfig
from lora_fx.runtime.rows import sample_calls
from tests.lora_fx.test_owners import NAMES, Program, expected, model_of, table_of, tokens
from tests.lora_fx.test_samples import alone
from tests.numerics import TORCH, assert_close
from tests.zoo import tiny_llama


@pytest.fixture
def follows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for each call that was followed: its number of samples."""
    seen: list[int] = []

    class Counted(sample_calls.Follower):
        def __init__(self, model: nn.Module, samples: int, repeats: int) -> None:
            seen.append(samples)
            super().__init__(model, samples, repeats)

    monkeypatch.setattr(sample_calls, "Follower", Counted)
    return seen


def prepared(base: nn.Module, **config: Any) -> nn.Module:
    model = model_of(base.eval(), **config)
    lora_fx.set_adapter(model, list("abc"), per_sample=True)
    return model


def test_a_form_is_followed_once_for_each_range_of_sizes(follows: list[int]) -> None:
    base = Program(lambda s, x: s.fc(x))
    model = prepared(base)
    counts = {6: 1, 7: 2, 1: 3, 5: 4, 4: 5}
    # 1 and the number of samples are sizes that may mean something else. Four sizes are followed one by one.
    counts |= {8: 6, 9: 7, 11: 7, 16: 8, 17: 9, 30: 9, 12: 9, 32: 10}
    for length, count in counts.items():
        for _ in range(2):
            with lora_fx.adapter_ids(model, NAMES):
                assert_close(model(tokens(length)), expected(base, model, tokens(length)))
            assert len(follows) == count
    follows.clear()
    with lora_fx.adapter_ids(model, NAMES[:3]):
        model(tokens(6)[:3])
    model.train()
    with lora_fx.adapter_ids(model, NAMES):
        model(tokens(6))
    assert follows == [3, 4]
    for same in (["a"] * 4, [None] * 4):
        with lora_fx.adapter_ids(model, same):
            model(tokens(9)[:, :, :].transpose(0, 1)[:4])
    assert len(follows) == 2


@pytest.mark.parametrize("bound", [5, 64, 65])
def test_rows_that_are_reordered_from_some_size_on(follows: list[int], bound: int) -> None:
    base = Program(lambda s, x: s.fc(x.flip(0)).flip(0) if x.shape[1] >= bound else s.fc(x))
    model = prepared(base)
    with lora_fx.adapter_ids(model, NAMES):
        for length in (2, 3, bound - 1):
            assert_close(model(tokens(length)), expected(base, model, tokens(length)))
        with pytest.raises(ConfigError, match="not one after the other"):
            model(tokens(bound))


def test_rows_that_are_reordered_in_large_batches() -> None:
    base = Program(lambda s, x: s.fc(x.flip(0)).flip(0) if x.shape[0] > 4 else s.fc(x))
    model = prepared(base)
    with lora_fx.adapter_ids(model, NAMES):
        assert_close(model(tokens()), expected(base, model, tokens()))
    with (
        lora_fx.adapter_ids(model, [*NAMES, "a"]),
        pytest.raises(ConfigError, match="not one after the other"),
    ):
        model(torch.cat([tokens(), tokens()[:1]]))


def test_several_rows_for_a_sample_are_known_for_these_sizes_only(follows: list[int]) -> None:
    model = prepared(Program(lambda s, x: s.fc(x.reshape(-1, 8)).reshape(x.shape)))
    for length, count in ((6, 1), (6, 1), (7, 2)):
        with lora_fx.adapter_ids(model, NAMES):
            model(tokens(length))
        assert len(follows) == count


def test_a_layout_that_depends_on_sizes(follows: list[int]) -> None:
    base = Program(
        lambda s, x: s.fc(x.transpose(0, 1)).transpose(0, 1) if x.shape[1] == 4 else s.fc(x)
    )
    model = prepared(base)
    with lora_fx.adapter_ids(model, NAMES):
        assert_close(model(tokens(6)), expected(base, model, tokens(6)))
        with pytest.raises(ConfigError, match="they lie on axis 1"):
            model(tokens(4))
        assert_close(model(tokens(6)), expected(base, model, tokens(6)))


def test_other_adapters_are_followed_anew(follows: list[int]) -> None:
    model = prepared(Program(lambda s, x: s.fc(x)))
    other = pickle.loads(
        pickle.dumps(prepared(nn.Sequential(nn.Linear(8, 8)), target_modules=["0"]))
    )
    for one in (model, copy.deepcopy(model), other):
        with lora_fx.adapter_ids(one, NAMES):
            one(tokens(6))
    assert len(follows) == 3
    lora_fx.set_adapter(model, list("ab"), per_sample=True)
    with lora_fx.adapter_ids(model, NAMES):
        model(tokens(6))
    assert len(follows) == 4


@pytest.mark.parametrize("length", [4, 6])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_followed_in_a_few_steps(follows: list[int], length: int, beams: int) -> None:
    base = tiny_llama()[0].eval()
    model = prepared(base, target_modules=["q_proj", "v_proj", "down_proj"])
    ids = torch.randint(3, 11, (4, length), generator=torch.Generator().manual_seed(0))
    given = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "num_beams": beams}
    with lora_fx.adapter_ids(model, NAMES, repeats=beams):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **given)
    assert (
        len(follows) <= 8
    )  # the prompt, four steps, 16, and where the text is as long as the batch
    follows.clear()
    with lora_fx.adapter_ids(model, NAMES, repeats=beams):
        assert torch.equal(found, model.generate(ids, attention_mask=torch.ones_like(ids), **given))
    assert not follows
    for i, name in enumerate(NAMES):
        lora_fx.set_adapter(model, [] if name is None else name)
        one = ids[i : i + 1]
        wanted = model.generate(one, attention_mask=torch.ones_like(one), **given)
        assert torch.equal(found[i], wanted[0])


class Encoding(nn.Module):
    """A model with another method, which does something to the batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x.transpose(0, 1)).transpose(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


def test_who_calls_a_part_of_the_model() -> None:
    model = prepared(Encoding(), target_modules=["encoder.0"])
    x = tokens()
    wanted = alone(model, x, NAMES)
    for _ in range(2):
        with lora_fx.adapter_ids(model, NAMES):
            assert_close(model.encoder(x), wanted)
            assert_close(model(x), wanted)
            with pytest.raises(ConfigError, match=r"Encoding\.encode calls 'encoder' by itself"):
                model.encode(x)
            assert_close(model.encoder[0](x).tanh(), wanted)
    deep = prepared(nn.Sequential(Encoding()), target_modules=["0.encoder.0"])
    with lora_fx.adapter_ids(deep, NAMES), pytest.raises(ConfigError, match="called by itself"):
        deep[0].encoder[0](x)


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        out = s.fc(x)
        if s.fails is not None:
            raise s.fails
        return out

    for error in (ValueError("no"), KeyboardInterrupt()):
        base = Program(run, fails=None)
        model = prepared(base)
        model.fails = error
        with pytest.raises(type(error)), lora_fx.adapter_ids(model, NAMES):
            model(tokens())
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
        assert not table_of(model).proofs
        model.fails = None
        with lora_fx.adapter_ids(model, NAMES):
            assert_close(model(tokens()), expected(base, model, tokens()))


def test_a_refusal_that_the_model_catches_is_a_refusal() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        try:
            return s.fc(x.transpose(0, 1)).transpose(0, 1)
        except ValueError:
            return s.fc(x)

    model = prepared(Program(run))
    with lora_fx.adapter_ids(model, NAMES), pytest.raises(ConfigError, match="they lie on axis 1"):
        model(tokens())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        return s.out(checkpoint(s.fc, x, use_reentrant=reentrant)) if s.saves else s.out(s.fc(x))

    base = Program(run, saves=False)
    model = prepared(base, target_modules=["fc", "out"])
    grads = []
    for model.saves in (False, True, True):
        model.zero_grad()
        x = tokens().requires_grad_()
        with lora_fx.adapter_ids(model, NAMES):
            model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None] + [x.grad])
    assert_close(grads[1], grads[0])
    assert_close(grads[2], grads[0])


def test_hooks_of_the_user_see_the_model_alone() -> None:
    base = Program(lambda s, x: s.fc(x))
    model = prepared(base)
    model.register_forward_pre_hook(lambda module, args: (args[0].transpose(0, 1),))
    with lora_fx.adapter_ids(model, NAMES), pytest.raises(ConfigError, match="they lie on axis 1"):
        model(tokens())


def test_nothing_is_left_in_what_is_merged() -> None:
    model = prepared(Program(lambda s, x: s.fc(x)))
    assert model._forward_pre_hooks
    merged = copy.deepcopy(model)
    lora_fx.set_adapter(merged, "a")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in merged.modules())
    for one in (lora_fx.merge(merged), lora_fx.merge(lora_fx.rewrite(Program(len), LoraConfig()))):
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in one.modules())


def test_where_a_call_cannot_be_followed() -> None:
    base = Program(lambda s, x: s.fc(x))
    model, x = prepared(base), tokens()
    wanted = expected(base, model, x)

    def mapped() -> torch.Tensor:
        return torch.vmap(model)(x[None])[0]

    def differentiated() -> torch.Tensor:
        return torch.func.jvp(model, (x,), (x,))[0]

    def traced() -> torch.Tensor:
        return torch.jit.trace(model, x, check_trace=False)(x)

    for run in (mapped, differentiated, traced):
        with (
            lora_fx.adapter_ids(model, NAMES),
            pytest.raises(ConfigError, match="call the model itself"),
        ):
            run()
    with lora_fx.adapter_ids(model, NAMES):
        assert_close(model(x), wanted)
        for run in (differentiated, traced):
            assert_close(run(), wanted)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiler_takes_forms_that_were_seen(fullgraph: bool) -> None:
    base = Program(lambda s, x: s.fc(x))
    model = prepared(base)
    compiled = torch.compile(model, fullgraph=fullgraph, backend="eager")
    # Dynamo wraps the error where it may not break the graph.
    refused = torch._dynamo.exc.Unsupported if fullgraph else ConfigError
    # That of PyTorch 2.11 stops at the words of the error.
    reason = r"not known yet which axis|id\(\)" if TORCH < (2, 12) else "not known yet which axis"
    with lora_fx.adapter_ids(model, NAMES):
        with pytest.raises(refused, match=reason):
            compiled(tokens())
        torch._dynamo.reset()
        model(tokens())
        assert_close(compiled(tokens()), expected(base, model, tokens()))
        with pytest.raises(refused, match=reason):
            compiled(tokens(6))
    torch._dynamo.reset()


def test_layers_that_are_compiled(follows: list[int]) -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model = prepared(base, target_modules=["0", "2"])
    model[0].compile(backend="eager")
    for _ in range(3):
        with lora_fx.adapter_ids(model, NAMES):
            assert_close(model(tokens()), expected(base, model, tokens()))
    assert len(follows) == 1
    torch._dynamo.reset()


def test_many_samples() -> None:
    """More than a byte can number."""
    model = prepared(Program(lambda s, x: s.fc(x)))
    x = torch.randn(300, 3, 8)
    names = [NAMES[i % 4] for i in range(300)]
    with lora_fx.adapter_ids(model, names):
        found = model(x)
    assert_close(found[:8], alone(model, x[:8], names[:8]))
    turned = prepared(Program(lambda s, x: s.fc(x.flip(0))))
    with lora_fx.adapter_ids(turned, names), pytest.raises(ConfigError, match="not one after"):
        turned(x)


def test_arguments_of_any_kind() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, given: dict[str, Any], scale: float = 1.0) -> torch.Tensor:
            return scale * self.fc(given["x"][0] + given["time"][:, None])

    base = Many()
    model = prepared(base)
    given = {"x": (tokens(6)[:, 0],), "time": torch.arange(4.0)}
    for scale in (1.0, 2.0):
        with lora_fx.adapter_ids(model, NAMES):
            found = model(given, scale=scale)
        for i, name in enumerate(NAMES):
            lora_fx.set_adapter(model, [] if name is None else name)
            one = {"x": (given["x"][0][i : i + 1],), "time": given["time"][i : i + 1]}
            assert_close(found[i : i + 1], model(one, scale=scale))
