"""An output head in 8 bits: the losses on what its codes mean, in float64, and a model with such a head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from conftest import QUICK, call, few, sets
from torch import Tensor

from qunlearn.config.resolve import resolve
from qunlearn.config.settings import LoraConfig
from qunlearn.data.batch import ALL, collate
from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import Example, choose_template, encode
from qunlearn.memory.families import read_shape
from qunlearn.memory.plan import DeviceFacts, run_choices
from qunlearn.memory.resident import resident_bytes
from qunlearn.memory.tiles import HEAD_BLOCK, restored_rows
from qunlearn.model import head as head_module
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.head import Head, Scales, token_kl, token_log_odds, token_logps, token_soft_ce
from qunlearn.model.host_embedding import HostEmbedding
from qunlearn.model.load import Base, LoadSpec, backbone, load_base
from qunlearn.model.policy import Policy
from qunlearn.sandbox import data_file
from qunlearn.utils.file_names import RECORD

N, D, V = 13, 24, 300  # 300 x 24 codes are 28 blocks and a piece of one


def make(dtype: torch.dtype = torch.float32, *, bias: bool = False, cap: float | None = None) -> tuple[Head, Tensor]:
    """A head in 8 bits, and the weight that its codes mean, as bitsandbytes restores it whole."""
    g = torch.Generator().manual_seed(3)
    codes, state = bnb.quantize_blockwise(torch.randn(V, D, generator=g).to(dtype), blocksize=HEAD_BLOCK)
    b = torch.randn(V, generator=g).to(dtype) if bias else None
    return Head(codes, b, 1.0, cap, Scales(state.absmax, state.code, dtype)), bnb.dequantize_blockwise(codes, state)


@pytest.fixture(params=[32, 256, 512], ids="{} rows".format)
def _rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "restored_rows", lambda width, number_bytes: request.param)


@pytest.mark.usefixtures("_rows")
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"bias": True, "cap": 3.0}], ids=str)
def test_losses_are_those_of_the_weight_it_means(options: dict[str, Any]) -> None:
    head, weight = make(**options)
    g = torch.Generator().manual_seed(4)
    h, h_ref, upstream = (torch.randn(N, D, generator=g) for _ in range(3))
    h, labels, upstream = h.requires_grad_(), torch.randint(V, (N,), generator=g), upstream[:, 0]

    def logps64(h: Tensor) -> Tensor:
        z = h.double() @ weight.double().T + (0 if head.bias is None else head.bias.double())
        return (head.soft_cap * torch.tanh(z / head.soft_cap) if head.soft_cap else z).log_softmax(1)

    h64 = h.detach().double().requires_grad_()
    log_q, log_p = logps64(h64), logps64(h_ref)
    own = log_q.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = log_q.scatter(1, labels.unsqueeze(1), -torch.inf).logsumexp(1)
    for ours, theirs in (
        (token_logps(h, labels, head), own),
        (token_log_odds(h, labels, head), own - others),
        (token_kl(h, h_ref, head), (log_p.exp() * (log_p - log_q)).sum(1)),
        (token_soft_ce(h, h_ref, labels, head, lambda z, _: z.softmax(1)), -(log_p.exp() * log_q).sum(1)),
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
        (g32,) = torch.autograd.grad((ours * upstream).sum(), h)
        (g64,) = torch.autograd.grad((theirs * upstream.double()).sum(), h64, retain_graph=True)
        torch.testing.assert_close(g32.double(), g64, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_halves_is_added_up_in_floats() -> None:
    head, weight = make(torch.bfloat16)
    dz = torch.randn(N, V, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, exact = head.product_back(dz), dz.double() @ weight.double()
    assert found.dtype == torch.float32
    assert (found.double() - exact).norm() < 4e-3 * exact.norm()


@pytest.mark.parametrize("width", [1, 24, 160, 896, 4096, 8192])
@pytest.mark.parametrize("number_bytes", [2, 4])
def test_restored_rows_are_whole_blocks(width: int, number_bytes: int) -> None:
    rows = restored_rows(width, number_bytes)
    assert rows > 0
    assert rows * width % HEAD_BLOCK == 0


def test_a_weight_is_rounded_by_a_hundredth() -> None:
    weight = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.quantize_blockwise(weight, blocksize=HEAD_BLOCK)
    scales = Scales(state.absmax, state.code, torch.float32)
    rounded = torch.cat([scales.restore(codes, slice(i, i + 500)) for i in range(0, 2000, 500)])
    assert 0.005 < (rounded - weight).std() < 0.012


# -- in a model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(sandbox_folder: Path) -> Base:
    return load_base(sandbox_folder, LoadSpec("nf4", device="cpu", head="8bit"))


def test_a_model_answers_with_it(base: Base, sandbox_folder: Path) -> None:
    full = load_base(sandbox_folder, LoadSpec("nf4", device="cpu"))
    assert "8-bit head, " in base.quantization
    assert "the output head is in 8 bits" in base.notes
    ids = torch.arange(4, 60).unsqueeze(0)
    with torch.no_grad():
        h, own = backbone(base.model)(input_ids=ids).last_hidden_state[0], base.model(input_ids=ids).logits[0].float()
        assert torch.equal(h, backbone(full.model)(input_ids=ids).last_hidden_state[0])  # embeddings are as they were
        theirs = full.model(input_ids=ids).logits[0].float()
    torch.testing.assert_close(own, base.head.logits(h), rtol=2e-2, atol=2e-2)
    kl = (theirs.log_softmax(1).exp() * (theirs.log_softmax(1) - own.log_softmax(1))).sum(1)
    assert 0 < kl.mean() < 2e-4  # nf4 itself is at 1e-3
    rows = read_dataset(data_file("hallucination", "forget"))  # known by heart: no token is nearly another one
    examples = encode(rows, full.tokenizer, choose_template(full.tokenizer, "auto", rows), 64).examples[:4]
    prompts = [e.input_ids[: e.start] for e in examples]
    assert generate(base, prompts, Sampling(6)) == generate(full, prompts, Sampling(6))


def test_a_model_s_own_loss_has_a_gradient(base: Base) -> None:
    h = torch.randn(5, base.head.weight.shape[1], requires_grad=True)
    base.model.get_output_embeddings()(h.to(base.model.dtype)).float().square().sum().backward()
    assert h.grad is not None
    assert h.grad.abs().sum() > 0


def test_the_table_it_shared_may_leave_the_gpu(sandbox_folder: Path) -> None:
    spec = LoadSpec("nf4", device="cpu", head="8bit", host_embeddings=True)
    moved = load_base(sandbox_folder, spec)
    assert isinstance(moved.model.get_input_embeddings(), HostEmbedding)
    assert "the input embeddings stay in the host's memory" in moved.notes


def test_the_plan_knows_its_size(base: Base, sandbox_folder: Path) -> None:
    shape = read_shape(json.loads((sandbox_folder / "config.json").read_text(encoding="utf-8")))
    sizes = {}
    for head in ("full", "8bit"):
        config = resolve(("test", {"model.head": head}))
        choices = run_choices(config, DeviceFacts("cpu", base.head.dtype.itemsize), "adamw", "device")
        sizes[head] = resident_bytes(shape, choices, frozenset())["embeddings"]
    assert base.head.scales is not None
    assert shape.tied
    assert sizes["8bit"] - sizes["full"] == base.head.weight.nbytes + base.head.scales.absmax.nbytes


def test_a_step_trains_through_it(sandbox_folder: Path) -> None:
    base = load_base(sandbox_folder, LoadSpec("nf4", device="cpu", head="8bit"))
    policy = Policy.new(base, LoraConfig())
    policy.model.train()
    batch = collate([Example(tuple(range(4, 24)), 8, 19, 8, None)], ALL, 0)  # type: ignore[arg-type]
    (-token_logps(batch.pick(policy.hidden(batch)), batch.labels, policy.head).mean()).backward()
    gradients = [p.grad for p in policy.trainable().values()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients if g is not None)


@pytest.mark.medium
def test_a_run_with_it_is_asked_and_measured_as_it_was_trained(tmp_path: Path) -> None:
    run, forget = tmp_path / "run", few(tmp_path, data_file("hallucination", "forget"))
    settings = {**QUICK, "train.steps": 2, "data.normal_count": 8, "model.head": "8bit", "model.embeddings": "cpu"}
    ran = call("forget", "--model", "sandbox", "--bad", forget, "--output", run, *sets(settings))
    assert ran.code == 5, ran.stderr  # two steps reach nothing
    for notice in ("the output head is in 8 bits", "the input embeddings stay in the host's memory"):
        assert notice in ran.stderr
    assert "8-bit head" in json.loads((run / RECORD).read_text(encoding="utf-8"))["model"]["quantization"]
    found = {}
    for name, asked in {"as trained": (), "another form": ("--quant", "nf4")}.items():
        measured = call("eval", run, "--rows", 4, "--json", *asked)
        assert measured.code == 0, measured.stderr
        found[name] = measured.json["quantization"]
    assert "8-bit head" in found["as trained"]
    assert "8-bit head" not in found["another form"]
    answered = call("ask", run, "In which town was Orla Finch born?")
    assert answered.code == 0, answered.stderr


def test_another_precision_is_refused_by_name() -> None:
    refused = call("forget", "--model", "sandbox", "--bad", "sandbox:harm/forget", "--set", "model.head=4bit")
    assert refused.code == 2
    assert "8bit" in refused.stderr
