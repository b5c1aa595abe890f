"""What errors are told from others."""

from __future__ import annotations

import pytest
import torch

from qunlearn.errors import is_out_of_memory


def test_memory_that_is_refused_is_told_from_other_faults() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60, dtype=torch.uint8)  # torch's own words for it on a CPU
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("the shapes do not fit"))
