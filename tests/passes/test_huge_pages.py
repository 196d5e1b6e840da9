from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lora_fx.passes._huge_pages import new_memory

MAPS = Path("/proc/self/smaps")


def flags(address: int) -> str:
    """What the kernel says of the mapping that an address is in."""
    inside = False
    for line in MAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line
    return ""


@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (1024, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_memory_like_any_other(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = new_memory(shape, dtype, "cpu")
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    values = torch.randn(shape).to(dtype)
    assert torch.equal(tensor.copy_(values), values)
    assert new_memory(shape, dtype, "meta").is_meta


def test_large_pages_are_asked_for() -> None:
    if not MAPS.exists() or "VmFlags" not in MAPS.read_text():
        pytest.skip("the kernel does not say")
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("the kernel has no large pages")
    tensor = new_memory((4096, 4096), torch.float32, "cpu")
    assert " hg" in flags(tensor.data_ptr() + tensor.nbytes // 2)
