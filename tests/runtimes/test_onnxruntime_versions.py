"""Files in other versions of ONNX Runtime than the one that they were checked with when they were written.

fp16 files whose adapters are inputs ended the process in versions 1.23 to 1.28.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lora_fx.export.fuse.pipeline import FUSIONS
from tests.runtimes.conftest import ROOT, require
from tests.runtimes.files import Case, case, check

pytestmark = [pytest.mark.runtime, pytest.mark.filterwarnings("ignore")]

VERSIONS = sorted(path.stem for path in (ROOT / "tests/runtimes/requirements").glob("ort-*.txt"))

FORMS = [
    (kind, adapters, dtype, optimize)
    for kind in ("encoder", "encoder-tanh", "decoder")
    for adapters in ("merge", "inputs", "bank")
    for dtype in ("fp32", "fp16")
    for optimize in ("standard", "runtime")
    # Adapters and precision have been tried with the other encoder.
    if kind != "encoder-tanh" or (adapters, dtype, optimize) == ("merge", "fp32", "runtime")
]
FORMS += [
    ("nf4", "inline", "fp32", "standard"),
    ("places", "inputs", "fp32", "standard"),
    ("places", "inputs", "fp16", "standard"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """Each file once, for all versions."""

    @cache
    def write(kind: str, adapters: str, dtype: str, optimize: str) -> Case:
        folder = tmp_path_factory.mktemp("file")
        return case(kind, adapters, folder, dtype=dtype, optimize=optimize)

    return write


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_gives_what_pytorch_does(
    version: str,
    form: tuple[str, ...],
    written: Callable[..., Case],
    tmp_path: Path,
    consume: Callable[..., Any],
) -> None:
    require(version)
    dtype = form[2]
    check(written(*form), consume, version, tmp_path, tolerance=2e-2 if dtype == "fp16" else 1e-4)


def test_every_fusion_for_the_cpu_is_in_one_of_the_files(written: Callable[..., Case]) -> None:
    if not any((ROOT / ".peers" / f".runtime-{version}").exists() for version in VERSIONS):
        require(VERSIONS[0])
    done = {name for form in FORMS if form[3] == "runtime" for name in written(*form).report.fused}
    wanted = {one.name for one in FUSIONS if one.level == "runtime" and "cpu" in (one.holds or ())}
    assert wanted <= done
