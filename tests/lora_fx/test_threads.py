"""Threads and asyncio tasks that share one model: each call has its own samples."""

from __future__ import annotations

import asyncio
import copy
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import ConfigError
from lora_fx.passes.parameters import adapter_parameters
from tests.lora_fx.test_samples import alone, three
from tests.numerics import assert_close
from tests.zoo import seeded, tiny_llama

THREADS, CALLS = 6, 60
NAMES = ["a", "b", "c", None]


@seeded
def mlp() -> tuple[nn.Module, torch.Tensor]:
    base = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    return base, torch.randn(4, 3, 8)


def llama() -> tuple[nn.Module, torch.Tensor]:
    base, inputs = tiny_llama()
    return base, inputs["input_ids"].repeat(4, 1)[:4]


def logits(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out.logits


class Served:
    """A prepared model, and what each sample of a batch has to give with each adapter."""

    def __init__(self, made: Callable[[], tuple[nn.Module, torch.Tensor]]) -> None:
        base, self.batch = made()
        model = three(base)
        with torch.no_grad():
            whole = isinstance(model, nn.Sequential)
            self.rows = {
                name: alone(model, self.batch, [name] * 4, logits=not whole) for name in NAMES
            }
        lora_fx.set_adapter(model, list("abc"), per_sample=True)
        self.model = model

    def wrong(self, out: Any, ids: list[str | None]) -> int:
        want = torch.stack([self.rows[name][place] for place, name in enumerate(ids)])
        return int(not torch.allclose(logits(out), want, rtol=1e-4, atol=1e-5))


def by_argument(served: Served, model: nn.Module, ids: list[str | None]) -> Any:
    return model(served.batch, adapter_ids=ids)


def by_block(served: Served, model: nn.Module, ids: list[str | None]) -> Any:
    with lora_fx.adapter_ids(served.model, ids):
        return model(served.batch)


def by_names_of_peft(served: Served, model: nn.Module, ids: list[str | None]) -> Any:
    """PEFT's own argument, for a model that is wrapped as a PeftModel."""
    names = ["__base__" if name is None else name for name in ids]
    return lora_fx.as_peft_model(model)(served.batch, adapter_names=names)


def any_ids(draw: random.Random) -> list[str | None]:
    return [draw.choice(NAMES) for _ in range(4)]


def one_each(draw: random.Random) -> list[str | None]:
    return draw.sample(NAMES, 4)


def calls(
    served: Served, model: nn.Module, way: Callable[..., Any], ids_of: Callable[..., Any] = any_ids
) -> int:
    """Calls the model from several threads at once, and counts wrong results."""
    start = threading.Barrier(THREADS)

    def work(seed: int) -> int:
        draw = random.Random(seed)
        start.wait()
        wrong = 0
        with torch.no_grad():
            for _ in range(CALLS):
                ids = ids_of(draw)
                wrong += served.wrong(way(served, model, ids), ids)
        return wrong

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(work, range(THREADS)))


@pytest.mark.parametrize("way", [by_argument, by_block, by_names_of_peft])
@pytest.mark.parametrize("made", [mlp, llama])
def test_threads(made: Callable[..., Any], way: Callable[..., Any]) -> None:
    served = Served(made)
    assert calls(served, served.model, way) == 0
    with pytest.raises(ConfigError, match="does not say which sample has which"):
        served.model(served.batch)


@pytest.mark.parametrize("made", [mlp, llama])
def test_threads_share_a_compiled_model(made: Callable[..., Any]) -> None:
    served = Served(made)
    torch.compiler.reset()
    # It never falls back to running eagerly, and is compiled once for all orders of the adapters.
    compiled = torch.compile(served.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        by_block(served, served.model, NAMES)
        by_block(served, compiled, NAMES)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert calls(served, compiled, by_block, one_each) == 0


def test_threads_train_one_model() -> None:
    served = Served(mlp)
    want = {}
    for name in "abc":
        with lora_fx.adapter_ids(served.model, [name] * 3 + [None]):
            loss = served.model(served.batch).square().sum()
        parameters = list(adapter_parameters(served.model, name))
        want[name] = torch.autograd.grad(loss, parameters)

    def work(name: str) -> list[tuple[torch.Tensor, ...]]:
        parameters = list(adapter_parameters(served.model, name))
        found = []
        for _ in range(20):
            out = served.model(served.batch, adapter_ids=[name] * 3 + [None])
            found.append(torch.autograd.grad(out.square().sum(), parameters))
        return found

    with ThreadPoolExecutor(3) as pool:
        for name, found in zip("abc", pool.map(work, "abc"), strict=True):
            for gradients in found:
                for mine, own in zip(gradients, want[name], strict=True):
                    assert_close(mine, own)


async def _tasks(work: Callable[[int], Any]) -> list[Any]:
    return await asyncio.gather(*[work(number) for number in range(200)])


@pytest.mark.parametrize("made", [mlp, llama])
def test_tasks_of_asyncio(made: Callable[..., Any]) -> None:
    served = Served(made)

    async def work(number: int) -> int:
        draw = random.Random(number)
        ids = any_ids(draw)
        wrong = 0
        with lora_fx.adapter_ids(served.model, ids):
            await asyncio.sleep(0)
            wrong += served.wrong(served.model(served.batch), ids)
            await asyncio.sleep(0.001 * draw.random())
            inner = any_ids(draw)
            with lora_fx.adapter_ids(served.model, inner):
                await asyncio.sleep(0)
                wrong += served.wrong(served.model(served.batch), inner)
                # A thread that asyncio starts is in the blocks of the task.
                out = await asyncio.to_thread(served.model, served.batch)
                wrong += served.wrong(out, inner)
            wrong += served.wrong(served.model(served.batch), ids)
        return wrong

    with torch.no_grad():
        assert sum(asyncio.run(_tasks(work))) == 0


def test_a_compiled_model_refuses_tasks_that_take_turns() -> None:
    served = Served(mlp)
    torch.compiler.reset()
    compiled = torch.compile(served.model, backend="eager")
    ids: list[str | None] = ["a", "b", None, "c"]
    by_block(served, served.model, ids)
    by_block(served, compiled, ids)

    async def alone_in_its_block() -> int:
        with torch.no_grad():
            return served.wrong(by_block(served, compiled, ids), ids)

    async def with_others(number: int) -> None:
        with lora_fx.adapter_ids(served.model, ids):
            await asyncio.sleep(0.001)
            with pytest.raises(ConfigError, match="adapter_ids"):
                compiled(served.batch)
            assert not served.wrong(served.model(served.batch), ids)
            await asyncio.sleep(0.01)

    async def both() -> None:
        await asyncio.gather(with_others(0), with_others(1))

    assert asyncio.run(alone_in_its_block()) == 0
    asyncio.run(both())
    assert asyncio.run(alone_in_its_block()) == 0


def elsewhere(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_what_cannot_serve_threads_is_refused() -> None:
    served = Served(mlp)
    model = served.model

    def disabled() -> torch.Tensor:
        with lora_fx.disable_adapter(model):
            return model(served.batch)

    with lora_fx.adapter_ids(model, ["a"] * 4):
        for change in (disabled, lambda: lora_fx.set_adapter(model, "b")):
            with pytest.raises(ConfigError, match="another thread or task"):
                elsewhere(change)
        assert not served.wrong(model(served.batch), ["a"] * 4)
        # One thread may have blocks in each other.
        assert_close(disabled(), served.rows[None])
        assert not served.wrong(model(served.batch), ["a"] * 4)
    with lora_fx.disable_adapter(model):
        with pytest.raises(ConfigError, match="another thread or task"):
            elsewhere(disabled)
        assert_close(model(served.batch), served.rows[None])
    assert_close(elsewhere(disabled), served.rows[None])
    lora_fx.set_adapter(model, "b")
    assert_close(elsewhere(lambda: model(served.batch)), served.rows["b"])
    # Its graphs are edited for the block, which no other thread can have.
    with (
        lora_fx.adapter_ids(model, ["a"] * 4),
        pytest.raises(ConfigError, match="another thread or task"),
    ):
        elsewhere(lambda: by_block(served, model, ["c"] * 4))
    assert_close(model(served.batch), served.rows["b"])


def test_a_thread_is_not_in_the_blocks_of_another() -> None:
    served = Served(mlp)
    with (
        lora_fx.adapter_ids(served.model, ["a"] * 4),
        pytest.raises(ConfigError, match="in the thread that is in the block"),
    ):
        elsewhere(lambda: served.model(served.batch))


def test_a_copy_goes_on_with_what_the_block_says() -> None:
    served = Served(mlp)
    ids: list[str | None] = ["a", None, "c", "b"]
    with lora_fx.adapter_ids(served.model, ids):
        copied = copy.deepcopy(served.model)
        assert not served.wrong(copied(served.batch), ids)
    assert not served.wrong(copied(served.batch), ids)
    assert not served.wrong(elsewhere(lambda: copied(served.batch)), ids)
    with lora_fx.adapter_ids(copied, NAMES):
        assert not served.wrong(copied(served.batch), NAMES)


def test_blocks_that_are_left_out_of_order() -> None:
    served = Served(mlp)
    first, second = (lora_fx.adapter_ids(served.model, [name] * 4) for name in "ab")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not served.wrong(served.model(served.batch), ["b"] * 4)
    second.__exit__(None, None, None)
    with pytest.raises(ConfigError, match="does not say which sample has which"):
        served.model(served.batch)
