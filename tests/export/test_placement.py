"""Moving a model and its data into place: a death at any step leaves the old files or the new."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_fx.errors import ExportError
from lora_fx.export import staging as placement
from lora_fx.export.staging import Staging, staging

OLD, NEW = ("old", 2), ("new", 3)
fork = pytest.mark.skipif(sys.platform == "win32", reason="needs os.fork")


def write(stage: Staging, content: str, shards: int, encoder: bool = False) -> None:
    """A model that names its data files, and an encoder with its own; all say whose they are."""
    stem = stage.data.name.removesuffix(".data")
    data = [stage.folder / f"{stem}-{i:05d}-of-{shards:05d}.data" for i in range(1, shards + 1)]
    for file in data:
        file.write_text(content)
    names = [file.name for file in data]
    if encoder:
        beside = stage.companion("encoder")
        write(beside, content, shards)
        names.append(beside.model.name)
    stage.model.write_text("\n".join([content, *names]))


def export(target: Path, content: str, shards: int, encoder: bool = False) -> None:
    with staging(target) as stage:
        write(stage, content, shards, encoder)
        stage.commit(force=True)


def loaded(target: Path) -> tuple[str, int]:
    """Content and number of shards of a whole set; fails on any other."""
    content, *names = target.read_text().splitlines()
    data = [name for name in names if name.endswith(".data")]
    assert [target.with_name(name).read_text() for name in data] == [content] * len(data)
    for encoder in set(names) - set(data):
        assert loaded(target.with_name(encoder)) == (content, len(data))
    return content, len(data)


def named(target: Path) -> set[str]:
    """The model and all files that it names, and that those name."""
    names = target.read_text().splitlines()[1:] if target.suffix == ".onnx" else []
    return {target.name}.union(*(named(target.with_name(name)) for name in names))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "m[1].onnx"  # what a pattern would read otherwise
    export(path, *OLD)
    return path


def steps(patch: Callable[[object, str, object], None], at: int, act: Callable[[], None]) -> None:
    """``act`` after the step number ``at`` of those that touch the disk; before it, if negative."""
    done = 0

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object, **kwargs: object) -> object:
            nonlocal done
            done += 1
            if done == -at:
                act()
            result = original(*args, **kwargs)
            if done == at:
                act()
            return result

        return step

    patch(os, "fsync", counted(os.fsync))
    patch(Path, "replace", counted(Path.replace))
    patch(Path, "unlink", counted(Path.unlink))


def deaths(target: Path, sign: int, encoder: bool) -> Iterator[tuple[int, int]]:
    """Exports in processes that die at step 1, 2, … until one gets through."""
    for at in range(1, 100):
        child = os.fork()
        if child == 0:
            steps(setattr, sign * at, lambda: os._exit(9))
            export(target, *NEW, encoder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 9)
        yield at, code
        if code == 0:
            return


@fork
@pytest.mark.parametrize("encoder", [False, True], ids=["alone", "with an encoder"])
@pytest.mark.parametrize("sign", [1, -1], ids=["after", "before"])
def test_a_process_that_dies_at_any_step_leaves_the_old_set_or_the_new(
    target: Path, sign: int, encoder: bool
) -> None:
    outcomes = []
    export(target, *OLD, encoder)
    for _, code in deaths(target, sign, encoder):
        outcomes.append(loaded(target))
        assert outcomes[-1] == NEW or code == 9
        # The next export is whole, and clears what the dead one left.
        export(target, *OLD, encoder)
        assert loaded(target) == OLD
        assert files(target.parent) == named(target)
    # Four files and a folder are flushed, three moved, then the model; two old ones are deleted.
    # An encoder is four files more, and three old ones.
    assert len(outcomes) > (20 if encoder else 10)
    switch = outcomes.index(NEW)
    assert outcomes == [OLD] * switch + [NEW] * (len(outcomes) - switch)
    assert (15 if encoder else 7) <= switch < len(outcomes) - 1


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_an_error_before_the_switch_leaves_the_old_set_alone(
    target: Path, error: BaseException
) -> None:
    before = files(target.parent)

    def fail() -> None:
        raise error

    outcomes = []
    for at in (1, 2, 3, 4, 5, 6, 7, 9):  # the eighth is the flush of the folder
        with pytest.MonkeyPatch.context() as patch:
            steps(patch.setattr, -at, fail)
            with pytest.raises((ExportError, KeyboardInterrupt)):
                export(target, *NEW)
        outcomes.append(loaded(target))
        assert files(target.parent) == before
    assert set(outcomes) == {OLD}


def test_old_data_that_cannot_be_deleted_is_no_failure(
    target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unlink = Path.unlink

    def refusing(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".data":
            raise PermissionError(13, "Permission denied")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refusing)
    export(target, *NEW)
    assert loaded(target) == NEW
    assert "cannot delete" in caplog.text


def test_a_folder_in_use_and_files_of_others_are_left_alone(target: Path) -> None:
    others = {"m[1].onnx.data", "m1.onnx.0011aabb.data", "m[1].onnx.0011aabb.data.txt"}
    for name in others:
        target.with_name(name).write_text("theirs")
    foreign = target.with_name(f".{target.name}.foreign")
    foreign.mkdir()
    with staging(target) as first:
        write(first, *OLD)
        export(target, *NEW)
        assert first.model.exists()
        first.commit(force=True)
    assert loaded(target) == OLD
    assert others | {foreign.name} <= files(target.parent)


def test_data_and_model_are_flushed_before_the_switch(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    flush, replace = placement.flush, Path.replace
    monkeypatch.setattr(
        placement, "flush", lambda path: (order.append(f"flush {path.suffix}"), flush(path))
    )

    def moving(self: Path, to: Path) -> Path:
        order.append(f"move {self.suffix}")
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", moving)
    export(target, *NEW)
    data = ["flush .data"] * 3
    assert order == ["flush .onnx", *data, *["move .data"] * 3, "flush ", "move .onnx", "flush "]
