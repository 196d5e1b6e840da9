"""Code that reads an adapted weight computes with W + s·BA; what goes past the attribute is an error."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx.errors import CaptureError
from lora_fx.runtime import watch
from tests.algebra import randomize, scale_of
from tests.numerics import assert_close, assert_same_bits

CONFIG = lora_fx.LoraConfig(r=2, target_modules=["fc"])
EVERYTHING = lora_fx.LoraConfig(r=1, target_modules=".*")
REGISTRY: dict[str, nn.Module] = {}


class Base(nn.Module):
    """Does not trace, so that the layers keep graphs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def product(self, x):
        return self.fc(x)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.out(self.product(x))


class Plain(Base):
    pass


class ByGetattr(Base):
    def product(self, x):
        return F.linear(x, getattr(getattr(self, "fc"), "weight"))  # noqa: B009


class ByStateDict(Base):
    def product(self, x):
        return F.linear(x, self.state_dict()["fc.weight"])


class ByNamedParameters(Base):
    def product(self, x):
        return self.fc(x) + F.linear(x, dict(self.named_parameters())["fc.weight"])


class ByHelper(Base):
    def product(self, x):
        return self.fc(x) + applied(self.fc, x)


class ByProperty(Base):
    @property
    def matrix(self):
        return vars(self.fc)["_parameters"]["weight"].mT

    def product(self, x):
        return x @ self.matrix


class Reader(nn.Module):
    def forward(self, x, layer):
        return F.linear(x, layer.weight)


class HandedOn(Base):
    def __init__(self) -> None:
        super().__init__()
        self.reader = Reader()

    def product(self, x):
        return self.fc(x) + self.reader(x, self.fc)


class Unbound(Base):
    def product(self, x):
        return nn.Linear.forward(self.fc, x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x) if x.dim() == 2 else super().forward(x)


class BySuper(Base):
    def __init__(self) -> None:
        super().__init__()
        self.fc = Doubled(4, 4)


class ByHook(Base):
    def __init__(self) -> None:
        super().__init__()
        self.out.register_forward_hook(lambda m, args, y: y + F.linear(y, self.fc.weight))


class ByPreHook(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(lambda m, args: (F.linear(args[0], self.fc.weight),))


class ByTrain(Base):
    def train(self, mode=True):
        super().train(mode)
        self.kept = None if mode else self.fc.weight.detach().clone()
        return self

    def product(self, x):
        return self.fc(x) if self.training else F.linear(x, self.kept)


class ByRegistry(Base):
    def __init__(self) -> None:
        super().__init__()
        REGISTRY["fc"] = self.fc

    def product(self, x):
        return REGISTRY["fc"](x)


class ByCopy(Base):
    def product(self, x):
        weight = torch.empty(4, 4).copy_(self.__dict__["_modules"]["fc"].weight)
        return x @ torch.cat([weight, weight]).double().float()[:4].T


class ByHand(Base):
    def product(self, x):
        weight = self.__dict__["_modules"]["fc"].weight
        return self.fc(x) + (x.unsqueeze(1) * weight).sum(-1)


class ByData(Base):
    def product(self, x):
        return torch.mm(x, self.__dict__["_modules"]["fc"].weight.data[:, :])


class ByAttention(Base):
    def product(self, x):
        table = self.__dict__["_modules"]["fc"].weight
        return self.fc(x) + F.scaled_dot_product_attention(x[None], table[None], table[None])[0]


class Encoder(Base):
    def encode(self, x):
        return F.linear(x, self.fc.weight)


class Norms(Base):
    """Reads nothing but norms and sums, and a product of the weight with itself."""

    def forward(self, x):
        weight = self.__dict__["_modules"]["fc"].weight
        self.penalty = weight.norm() + weight.sum() + (weight @ weight.mT).abs().mean()
        self.rounded = (weight * 0.5).to(torch.float64).square().mean()
        return super().forward(x)


def applied(layer, x):
    return F.linear(x, layer.weight)


READERS = (
    *(ByGetattr, ByStateDict, ByNamedParameters, ByHelper, ByProperty, HandedOn, Unbound, BySuper),
    *(ByHook, ByPreHook, ByTrain, ByRegistry, ByCopy, ByHand, ByData, ByAttention),
)


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 4)


def build(cls) -> nn.Module:
    torch.manual_seed(0)
    return cls()


def adapted(cls) -> nn.Module:
    return randomize(lora_fx.rewrite(build(cls), CONFIG))


def dense(cls, model) -> nn.Module:
    result = build(cls)
    change = scale_of(model) * model.fc.lora_B.default @ model.fc.lora_A.default
    with torch.no_grad():
        result.fc.weight += change
    return result


PAST = (ByStateDict, ByNamedParameters, ByProperty, ByRegistry)
"""Those that get to the parameter without reading the attribute of its layer."""


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", [c for c in READERS if c not in PAST], ids=lambda cls: cls.__name__)
def test_a_reader_is_right(cls, training, x):
    model = adapted(cls).train(training)
    found, exact = model(x), dense(cls, model).train(training)(x)
    assert_close(found, exact)
    assert_close(model(x), exact)
    assert not torch.allclose(found, build(cls).train(training)(x))
    if cls not in (ByTrain, ByData):
        found.square().sum().backward()
        assert model.fc.lora_B.default.grad.abs().sum() > 0


@pytest.mark.parametrize("cls", PAST, ids=lambda c: c.__name__)
def test_what_goes_past_is_refused_and_names_site_operation_and_line(cls, x):
    model = adapted(cls)
    for _ in range(2):
        with pytest.raises(
            CaptureError, match=r"fc: its weight fc\.weight is read by \w+ at .*test_watch\.py:\d+"
        ):
            model(x)
    assert lora_fx.status(model).unchecked


def test_the_places_of_readers_are_in_the_status(x):
    model = adapted(ByHand)
    model(x)
    ((name, place),) = lora_fx.status(model).computed
    assert name == "fc.weight"
    assert "test_watch.py" in place
    assert place.endswith("ByHand.product")
    assert "computed as a whole" in str(lora_fx.status(model))


def test_norms_and_sums_are_no_reads(x):
    model = adapted(Norms)
    assert_close(model(x), dense(Plain, model)(x))
    assert not lora_fx.status(model).unchecked


def test_another_public_method_is_right(x):
    model = adapted(Encoder)
    assert_close(model.encode(x), dense(Encoder, model).encode(x))


def test_a_submodule_that_is_called_itself_is_a_way_in(x):
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ByNamedParameters()

        def forward(self, x):
            return self.inner.fc(x)

    torch.manual_seed(0)
    model = lora_fx.rewrite(Outer(), lora_fx.LoraConfig(r=2, target_modules=["inner.fc"]))
    model(x)
    with pytest.raises(CaptureError, match=r"inner\.fc"):
        model.inner(x)


def test_hooks_are_watched_when_they_are_registered_later(x):
    model = adapted(Plain)
    model(x)
    merged = lora_fx.merge(model)
    handle = model.out.register_forward_hook(lambda m, args, y: F.linear(y, model.fc.weight))
    assert_close(model(x), F.linear(merged(x), merged.fc.weight))
    handle.remove()
    model.fc.register_forward_hook(lambda m, args, y: F.linear(y, model.get_parameter("fc.weight")))
    with pytest.raises(CaptureError, match="lambda"):
        model(x)


def test_the_original_in_a_closure_made_later_is_seen(x):
    original = build(Plain)
    model = lora_fx.rewrite(original, CONFIG)
    model.product = original.fc.forward
    with pytest.raises(CaptureError, match="fc"):
        model(x)


class Guarded(nn.Module):
    """Reads the parameter of a layer in calls of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, scale=None):
        if scale is not None:
            return scale * F.linear(x, self.fc.get_parameter("weight"))
        return self.fc(x)


def test_another_form_of_a_call_is_watched_when_it_comes(x):
    model = adapted(Guarded)
    assert_close(model(x), dense(Guarded, model)(x))
    with pytest.raises(CaptureError, match=r"in Guarded\.forward"):
        model(x, scale=x)
    assert_close(model(x), dense(Guarded, model)(x))


# --- ties ---------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        if ids.sum() > 1e9:
            return ids
        return self.head(self.embed(ids))


@pytest.mark.parametrize("target", ["embed", "head"])
def test_recorded_ties_are_no_readers(target):
    torch.manual_seed(0)
    ids = torch.tensor([[1, 2, 6]])
    model = randomize(lora_fx.rewrite(Tied(), lora_fx.LoraConfig(r=2, target_modules=[target])))
    found = model(ids)
    assert_close(lora_fx.merge(model)(ids), found)


# --- when it is on ------------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def watching() -> int:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return len(_get_current_dispatch_mode_stack())


class Counts(Base):
    def forward(self, x):
        self.modes = watching()
        return super().forward(x)


def test_only_the_first_call_is_watched(x):
    model = adapted(Counts)
    modes = []
    for _ in range(3):
        model(x)
        modes.append(model.modes)
    assert modes == [1, 0, 0]
    model.eval()(x)
    assert model.modes == 1
    assert watching() == 0


def test_the_watch_changes_no_bit(x):
    model = adapted(Plain)
    first = model(x)
    assert_same_bits(model(x), first)
    torch.manual_seed(3)
    config = lora_fx.LoraConfig(r=2, target_modules=["fc"], lora_dropout=0.5)
    model = randomize(lora_fx.rewrite(build(Plain), config))
    torch.manual_seed(4)
    first = model(x)
    torch.manual_seed(4)
    assert_same_bits(model(x), first)


def test_a_call_that_fails_leaves_it_pending(x):
    model = adapted(Counts)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5))
    assert watching() == 0
    assert lora_fx.status(model).unchecked
    model(x)
    assert model.modes == 1
    assert not lora_fx.status(model).unchecked


def test_an_error_that_the_model_catches_is_raised_all_the_same(x):
    class Catches(Base):
        def product(self, x):
            try:
                return F.linear(x, self.fc.get_parameter("weight"))
            except RuntimeError:
                return x

    with pytest.raises(CaptureError, match="fc"):
        adapted(Catches)(x)


def test_switching_adapters_arms_it_again_once(x):
    model = adapted(Counts)
    lora_fx.add_adapter(model, CONFIG, "other")
    modes = []
    for name in ("default", "other", "default", "other"):
        lora_fx.set_adapter(model, name)
        model(x)
        modes.append(model.modes)
    assert modes == [1, 1, 0, 0]
    with lora_fx.disable_adapter(model):
        model(x)
        assert model.modes == 0
        assert not lora_fx.status(model).unchecked


def test_other_sizes_are_watched_a_few_times():
    model = adapted(Counts)
    watched = []
    for rows in (1, 2, 3, 5, 5, 6, 7, 8, 9, 15, 16, 17, 30, 30):
        model(torch.randn(rows, 4))
        watched += [rows] * model.modes
    assert watched == [1, 2, 3, 5, 8, 9, 16, 17]


@pytest.mark.parametrize("bound", [3, 64, 65])
def test_a_hook_that_reads_a_weight_from_some_size_on(bound):
    def hook(layer, args, output):
        weight = layer.get_parameter("weight")
        return output + F.linear(args[0], weight) if len(args[0]) >= bound else None

    model = adapted(Plain)
    model.fc.register_forward_hook(hook)
    for rows in (1, 2, bound - 1, bound - 1):
        model(torch.randn(rows, 4))
    with pytest.raises(CaptureError, match=r"fc\.weight is read by"):
        model(torch.randn(bound, 4))


class ByRegistry(Base):
    def product(self, x):
        return REGISTRY["fc"](x)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_a_copy_that_computes_with_weights_of_what_was_copied(kept, times, x):
    base = ByRegistry()
    REGISTRY["fc"] = base.fc
    models = [lora_fx.rewrite(base, CONFIG)]
    for _ in range(times):
        models.append(copy.deepcopy(models[-1]))
    model = models[-1]
    if not kept:
        del base, models
        gc.collect()
    with pytest.raises(CaptureError, match=r"fc\.weight is read by"):
        model(x)


def test_a_copy_that_calls_a_layer_of_what_was_copied(x):
    base = ByRegistry()
    REGISTRY["fc"] = base.fc
    model = lora_fx.rewrite(base, CONFIG)
    REGISTRY["fc"] = model.fc
    randomize(model)
    twin = copy.deepcopy(model)
    assert_close(twin(x), model(x))  # Python copies no global, and the layer has its adapter


@pytest.mark.parametrize(
    "way",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "file"],
    ids=["copy", "pickle", "save"],
)
@pytest.mark.parametrize("before", [False, True], ids=["pending", "watched"])
def test_copies_are_watched_themselves(way, before, x):
    model = adapted(Encoder)
    if before:
        model(x)
    if way == "file":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        result = torch.load(file, weights_only=False)
    else:
        result = way(model)
    assert type(result).__name__ == "Encoder"
    assert isinstance(result, Encoder)
    assert lora_fx.status(result).unchecked
    assert_close(result(x), dense(Plain, model)(x))
    assert not lora_fx.status(result).unchecked
    assert_close(result.encode(x), dense(Encoder, model).encode(x))


def test_the_class_is_the_users(x):
    model = adapted(Encoder)
    cls = type(model)
    names = (cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__)
    assert names == (Encoder.__name__, Encoder.__qualname__, Encoder.__module__, Encoder.__doc__)
    assert cls.encode.__name__ == "encode"
    merged = lora_fx.merge(model)
    assert type(merged) is Encoder
    assert watch.STATE not in merged.__dict__
    assert not any(watch.STATE in module.__dict__ for module in merged.modules())


def test_it_keeps_no_activation_alive(x):
    class Remembers(Base):
        def product(self, x):
            y = self.fc(x)
            activation, cast = y * 2, self.out.weight.double()
            held.append(weakref.ref(activation))
            held.append(weakref.ref(cast))
            return y

    held: list[weakref.ref] = []
    seen = []

    class Looks(Remembers):
        def forward(self, x):
            y = super().forward(x)
            gc.collect()
            seen.extend(one() for one in held)
            return y

    with torch.no_grad():
        adapted(Looks)(x)
    assert seen == [None, None]


def test_threads_do_not_watch_for_each_other(x):
    model = adapted(Plain)
    expected = dense(Plain, model)(x)
    failures: list[BaseException] = []

    def work():
        try:
            for _ in range(5):
                assert_close(model(x), expected)
        except BaseException as error:  # noqa: BLE001  for the thread that asks
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert watch._now.active == 0


def test_a_replica_with_weights_of_its_own_is_not_watched(x):
    model = adapted(Counts)
    replica = model._replicate_for_data_parallel()
    replica.fc = model.fc
    replica(x)
    assert replica.modes == 0
    assert lora_fx.status(model).unchecked
    model(x)
    assert model.modes == 1


# --- where there is nothing to see --------------------------------------------------------------------


def test_under_compile_it_stays_pending(x):
    torch._dynamo.reset()
    model = adapted(Guarded)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    expected = dense(Guarded, model)(x)
    assert_close(compiled(x), expected)
    assert lora_fx.status(model).unchecked
    assert "unchecked" in str(lora_fx.status(compiled))
    assert_close(model(x), expected)
    assert not lora_fx.status(model).unchecked
    assert_close(compiled(x), expected)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_compiled_layer_of_a_watched_model_is_not_compiled_twice(x):
    torch._dynamo.reset()
    model = adapted(Guarded)
    counter = torch._dynamo.testing.CompileCounter()
    fc = torch.compile(model.fc, backend=counter, fullgraph=True)
    for _ in range(2):
        fc(x)
        model(x)
        model.fc(x)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_class_that_the_compiler_gave_up_on_is_the_only_one(x):
    """Dynamo counts recompilations by code, which entries of all classes once had in common."""
    worn = torch.compile(adapted(Plain), backend="eager", dynamic=False)
    with torch.no_grad():
        for rows in range(1, torch._dynamo.config.recompile_limit + 3):
            worn(x[:1].expand(rows, -1))
    model = adapted(Guarded)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(x), model(x))


def test_under_export_and_jit_it_stays_pending(x):
    model = randomize(lora_fx.rewrite(build(Guarded), CONFIG, optimize=False))
    program = torch.export.export(model, (x,))
    assert_close(program.module()(x), dense(Guarded, model)(x))
    traced = torch.jit.trace(model, (x,), check_trace=False)
    assert_close(traced(x), dense(Guarded, model)(x))
    assert lora_fx.status(model).unchecked


def test_under_functorch_and_fake_tensors_it_stays_pending(x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = adapted(Plain)
    model.out.forward = lambda y: y
    guarded = adapted(Guarded)
    expected = dense(Guarded, guarded)(x)
    assert_close(torch.vmap(guarded)(x), expected)
    assert_close(torch.func.functional_call(guarded, {}, (x,)), expected)
    fresh = adapted(Guarded)
    torch.vmap(fresh)(x)
    assert lora_fx.status(fresh).unchecked
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fresh(mode.from_tensor(x))
    assert lora_fx.status(fresh).unchecked


def test_on_meta_it_stays_pending():
    with torch.device("meta"):
        model = Guarded()
    result = lora_fx.rewrite(model, CONFIG)
    result(torch.randn(3, 4, device="meta"))
    assert lora_fx.status(result).unchecked


def test_under_a_mode_of_somebody_else_it_works(x):
    model = adapted(ByNamedParameters)
    with Seen() as seen, pytest.raises(CaptureError, match="fc"):
        model(x)
    assert seen.names


def test_gradients_that_a_forward_computes_are_no_reads(x):
    class Force(Base):
        def forward(self, x):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                (force,) = torch.autograd.grad(super().forward(x).sum(), x, create_graph=True)
            return force

    model = adapted(Force)
    assert_close(model(x), dense(Force, model)(x))
    assert not lora_fx.status(model).unchecked


def test_checkpointed_calls_are_watched_once(x):
    class Checkpointed(Base):
        def forward(self, x):
            self.modes = watching()
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    model = adapted(Checkpointed)
    x.requires_grad_()
    model(x).sum().backward()
    first = model.fc.lora_B.default.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    assert model.modes == 0
    assert_same_bits(model.fc.lora_B.default.grad, first)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("inner", [1, 4])
@pytest.mark.parametrize("optimize", [True, False])
def test_a_batch_of_one_number_or_none_is_data(rows, inner, optimize):
    model = nn.Sequential(nn.Linear(1, inner), nn.Linear(inner, 1), nn.Linear(1, 4))
    adapted = randomize(lora_fx.rewrite(model, EVERYTHING, optimize=optimize))
    data = torch.randn(rows, 1)
    torch.testing.assert_close(adapted(data), lora_fx.merge(adapted)(data))
    assert not lora_fx.status(adapted).unchecked


def test_a_lookup_of_no_token_or_one_is_no_weight():
    model = nn.Sequential(nn.Embedding(3, 1), nn.Linear(1, 1), nn.Linear(1, 4))
    for tokens in (torch.tensor(2), torch.tensor([], dtype=torch.long)):
        adapted = randomize(lora_fx.rewrite(model, EVERYTHING))
        torch.testing.assert_close(adapted(tokens), lora_fx.merge(adapted)(tokens))


class OneNumber(Base):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 4)

    def forward(self, x):
        return self.fc(x), read_weight(self.fc, x)


def read_weight(layer, x):
    return nn.functional.linear(x, next(iter(layer.state_dict().values())))


def test_a_read_that_meets_one_number_is_seen():
    adapted = lora_fx.rewrite(OneNumber(), EVERYTHING)
    with pytest.raises(CaptureError, match=r"its weight fc\.weight is read by"):
        adapted(torch.randn(1, 1))


def test_a_layer_that_was_replaced_since_is_said_to_be() -> None:
    adapted = lora_fx.rewrite(Plain(), CONFIG)
    adapted.fc = nn.Linear(4, 4)
    with pytest.raises(CaptureError, match=r"deleted or replaced"):
        lora_fx.merge(adapted)


class Combines(Base):
    """Puts its weights together when it is asked to, as fuse_projections and switch_to_deploy do."""

    def combine(self, keep: bool) -> None:
        one = nn.Linear(4, 4)
        one.weight.data = self.fc.weight.data + torch.eye(4)
        one.bias.data = self.fc.bias.data.clone()
        self.one = one
        if not keep:
            del self.fc

    def product(self, x):
        return self.one(x) if hasattr(self, "one") else self.fc(x) + x


@pytest.mark.parametrize("keep", [True, False])
def test_weights_that_are_put_together_lose_no_adapter(keep: bool) -> None:
    x = torch.randn(3, 4)
    adapted = randomize(lora_fx.rewrite(Combines(), CONFIG))
    before = adapted(x)
    merged = lora_fx.merge(adapted)
    merged.combine(keep)
    assert_close(merged(x), before)
    adapted.combine(keep)
    for model in (adapted, copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert_close(model(x), before)


class Slopes(Base):
    """Uses transforms of torch.func in its forward."""

    def product(self, x):
        value, slope = torch.func.jvp(self.fc, (x,), (x.cos(),))
        pull = torch.func.grad(lambda one: self.fc(one).square().sum())(x)
        return value + slope + pull + torch.func.jacrev(lambda one: self.fc(one).sum(0))(x).sum()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_a_forward_that_uses_torch_func(options: dict[str, bool]) -> None:
    config = lora_fx.LoraConfig(r=2, target_modules=["fc"], **options)
    adapted = randomize(lora_fx.rewrite(Slopes().double(), config))
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_close(adapted(x), lora_fx.merge(adapted)(x))
