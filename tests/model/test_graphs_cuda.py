"""What only a GPU can show of recorded passes: the replay's numbers are those of the same pass, launched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_graphs import batch_of
from torch import Tensor

from qunlearn.config.settings import LoraConfig
from qunlearn.model.kernels.buckets import bucketed
from qunlearn.model.load import LoadSpec, load_base
from qunlearn.model.policy import Policy

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("checkpointing", "kept"), [(True, 0), (True, 2), (False, 0)])
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_a_replay_gives_the_bits_of_the_pass(sandbox_folder: Path, quant: str, checkpointing: bool, kept: int) -> None:
    base = load_base(sandbox_folder, LoadSpec(quant, device="cuda"))
    policy = Policy.new(base, LoraConfig(), seed=0, checkpointing=checkpointing, kept_blocks=kept)
    for name, p in policy.trainable().items():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.05)
    policy.model.train()
    batches = [bucketed(batch_of(lengths), 0).to("cuda") for lengths in ((9, 12), (10, 8), (60, 30), (57, 33))]

    def step() -> list[Tensor]:
        policy.zero_grad()
        with policy.cast_once():
            for batch in batches:
                with policy.reference():
                    wanted = batch.pick(policy.hidden(batch)).float()
                (batch.pick(policy.hidden(batch)).float() - wanted).square().sum().backward()
        return [p.grad.clone() for p in policy.trainable().values() if p.grad is not None]

    launched = step()
    policy.record_passes(pytest.fail)
    found = [step() for _ in range(3)]
    assert policy.graphs is not None and policy.graphs.shapes == 4  # of two buckets, trained and reference
    for replayed in found:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(replayed, launched, strict=True))
    with torch.no_grad():  # what is trained in between is seen
        for p in policy.trainable().values():
            p.mul_(1.1)
    assert not any(torch.equal(mine, theirs) for mine, theirs in zip(step(), launched, strict=True))
