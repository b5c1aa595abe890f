"""The benchmarks on tiny shapes: their figures are there, and the contestants compute what they say they compute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import _meter
import _models
import bench_evaluate as evaluate
import bench_gpu as gpu
from _contestants import CONTESTANTS, Arena, new_policy
from _engine import engine_supervised, engine_tokens
from _report import write_section
from _rows import Drawer, Lengths, Rows
from qunlearn.data.tokenize import Example
from qunlearn.hub.short_names import SHORT_NAMES

CPU = torch.device("cpu")
SHAPE = _models.Shape("tiny", 64, 2, 4, 2, 128, 512, tied=True)
LENGTHS = Lengths(prompt=(3, 9), answer=(2, 12), answer_median=6)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def arena(monkeypatch: pytest.MonkeyPatch) -> Arena:
    """In fp32 on every machine, with an adapter that does something."""
    monkeypatch.setattr(_models, "choose_dtype", lambda _: torch.float32)
    policy = new_policy(_models.random_base(SHAPE, CPU))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in policy.trainable().items():
            if ".lora_B." in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return Arena.build(policy, max_tokens=60)


@pytest.fixture
def rows() -> Rows:
    return Drawer(SHAPE.vocabulary, 3, LENGTHS).step(bad=3, normal=3, k=2)


def gradients(arena: Arena, key: str, rows: Rows) -> tuple[dict[str, float], list[torch.Tensor]]:
    arena.optimizer.zero_grad(set_to_none=True)
    arena.prepare(key, SHAPE, [rows], seed=0)
    losses = CONTESTANTS[key].backward(arena, rows)
    return losses, [p.grad.clone() for p in arena.policy.trainable().values() if p.grad is not None]


def logps(model: Any, example: Example) -> torch.Tensor:
    """One row on its own, in float64: (T - 1, V), what is said of each next token."""
    with torch.no_grad():
        z = model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1]
    return z.double().log_softmax(-1)  # type: ignore[no-any-return]


def nll(model: Any, example: Example, first: int, last: int) -> torch.Tensor:
    lp = logps(model, example)
    return torch.stack([-lp[t - 1, example.input_ids[t]] for t in range(first, last)])


@pytest.mark.parametrize("other", ["d", "d'"])
def test_qunlearn_computes_what_a_careful_engineer_would(arena: Arena, rows: Rows, other: str) -> None:
    theirs, their_gradients = gradients(arena, "b", rows)
    ours, our_gradients = gradients(arena, other, rows)
    assert min(abs(v) for v in theirs.values()) > 1e-3  # the adapter is felt in every term
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert len(our_gradients) == len(their_gradients) > 0
    for a, b in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_published_step_is_the_published_formula(arena: Arena, rows: Rows) -> None:
    """Row means with the last token's empty position counted; the mismatch's prompt too; KL over the padding too."""
    model, losses = arena.policy.model, gradients(arena, "a", rows)[0]
    second, width = arena.second, max(len(e.input_ids) for e in rows.retain)

    def mean(example: Example, start: int) -> torch.Tensor:
        n = len(example.input_ids)
        return nll(model, example, start + 1, n).sum() / (n - start)

    assert losses["ascent"] == pytest.approx(-float(torch.stack([mean(e, e.start - 1) for e in rows.forget]).mean()))
    assert losses["mismatch"] == pytest.approx(float(torch.stack([mean(e, 2) for e in rows.mismatch]).mean()))
    ids = torch.tensor([[*e.input_ids, *[0] * (width - len(e.input_ids))] for e in rows.retain])
    mask = torch.tensor([[1] * len(e.input_ids) + [0] * (width - len(e.input_ids)) for e in rows.retain])
    with torch.no_grad():
        q, p = (m(input_ids=ids, attention_mask=mask).logits.double().log_softmax(-1) for m in (model, second))
    assert losses["kl"] == pytest.approx(float(-(p.exp() * q).sum(-1).mean()), rel=1e-5)


def test_the_second_model_is_the_base(arena: Arena, rows: Rows) -> None:
    arena.prepare("a", SHAPE, [rows], seed=0)
    with arena.policy.reference():
        assert torch.equal(logps(arena.policy.model, rows.retain[0]), logps(arena.second, rows.retain[0]))


def test_relieving_the_indexing_changes_no_number(arena: Arena, rows: Rows) -> None:
    losses, grads = gradients(arena, "a", rows)
    relieved, same = gradients(arena, "a'", rows)
    assert relieved == pytest.approx(losses, rel=1e-6)
    for a, b in zip(same, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_plain_fine_tuning_is_cross_entropy_per_token_on_as_many_tokens(arena: Arena, rows: Rows) -> None:
    losses, _ = gradients(arena, "c", rows)
    (examples,) = arena.plain.values()
    assert sum(len(e.input_ids) for e in examples) == engine_tokens(rows)
    each = [nll(arena.policy.model, e, e.start, len(e.input_ids)) for e in examples]
    assert losses["nll"] == pytest.approx(float(torch.cat(each).mean()), rel=1e-5)


@pytest.mark.parametrize("tokens", [90, 127, 256, 1001])
def test_steps_and_fine_tuning_rows_have_exactly_so_many_tokens(tokens: int) -> None:
    drawer = Drawer(512, tokens, LENGTHS)
    rows = drawer.step_of(tokens, 2)
    assert rows.shared_tokens == tokens
    assert len(rows.mismatch) == 2 * len(rows.forget) > 0
    for i, e in enumerate(rows.mismatch):
        assert e.input_ids[: e.start] == rows.forget[i // 2].input_ids[: e.start]
    assert all(0 < e.start < e.end == len(e.input_ids) - 1 for e in (*rows.forget, *rows.mismatch, *rows.retain))
    plain = drawer.plain(tokens)
    assert sum(len(e.input_ids) for e in plain) == tokens
    assert all(0 < e.start <= e.end for e in plain)


def test_a_shared_prompt_is_counted_once() -> None:
    rows = Drawer(512, 0, LENGTHS).step(1, 0, 3)
    prompt = rows.forget[0].start
    answers = sum(len(e.input_ids) - prompt for e in (*rows.forget, *rows.mismatch))
    assert rows.shared_tokens == prompt + answers
    assert rows.row_tokens == 4 * prompt + answers


_PUBLISHED = {"SmolLM2-135M": 0.1345, "Qwen2.5-0.5B": 0.494}  # of those without a short name, in 10^9


def test_true_shapes_have_the_published_number_of_parameters() -> None:
    for shape in _models.TRUE_SHAPES:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)
        if shape.tied:
            model.tie_weights()
        known = SHORT_NAMES.get(shape.name.lower())
        published = known.params_b if known else _PUBLISHED[shape.name]
        assert model.num_parameters() / 1e9 == pytest.approx(published, abs=0.006), shape.name


def test_the_peak_of_memory_is_seen() -> None:
    size = 96 * 2**20
    with _meter.Peak(CPU) as quiet:
        pass
    with _meter.Peak(CPU) as peak:
        torch.ones(size // 4).mul_(2.0)  # held for milliseconds, and gone before the end
    if not quiet.peak_bytes:
        pytest.skip("this C library does not tell what is in use: a CPU's memory is not measured")
    assert peak.peak_bytes - quiet.peak_bytes == pytest.approx(size, rel=0.1)


def test_flop_are_counted_by_weight_and_token(arena: Arena, rows: Rows) -> None:
    h, kv, inner = SHAPE.hidden, SHAPE.hidden * SHAPE.kv_heads // SHAPE.heads, SHAPE.intermediate
    layers = SHAPE.layers * (2 * h * h + 2 * h * kv + 3 * h * inner)
    supervised = sum(e.end - e.start for e in rows.forget) + sum(len(e.input_ids) - e.start for e in rows.mismatch)
    supervised += sum(len(e.input_ids) - 1 for e in rows.retain)
    assert engine_supervised(rows) == supervised
    head = h * SHAPE.vocabulary
    assert gpu.step_flop(arena, "d", rows) == 6 * (layers * engine_tokens(rows) + head * supervised)


def test_a_step_that_runs_out_of_memory_is_split_then_given_up(
    monkeypatch: pytest.MonkeyPatch, arena: Arena, rows: Rows
) -> None:
    fits, tokens = 0, engine_tokens(rows)
    monkeypatch.setattr(gpu, "_SMALLEST_PASS", tokens // 4)

    def step(self: Arena, key: str, rows: Rows) -> dict[str, float]:
        if self.config.train.pass_tokens > fits:
            raise torch.OutOfMemoryError
        return {}

    monkeypatch.setattr(Arena, "step", step)
    assert gpu.cell(arena, "d", rows, 1e9) == {"status": "out of memory"}
    fits = tokens // 2
    assert gpu.cell(arena, "d", rows, 1e9)["max_tokens"] == tokens // 2
    assert gpu.cell(arena, "b", rows, 1e9) == {"status": "out of memory"}  # one pass per loss: nothing to split


def test_a_section_is_replaced_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text("before\n<!-- x: begin -->\nold\n<!-- x: end -->\nafter\n", encoding="utf-8")
    write_section("x", "new", path)
    write_section("x", "newer", path)
    assert path.read_text(encoding="utf-8") == "before\n<!-- x: begin -->\nnewer\n<!-- x: end -->\nafter\n"
    with pytest.raises(ValueError, match="no section"):
        write_section("y", "new", path)
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    for name in ("engine", "gpu", "sandbox", "evaluate"):
        assert f"<!-- {name}: begin -->" in results.partition(f"<!-- {name}: end -->")[0]


@pytest.mark.slow
def test_engine_benchmark(tmp_path: Path) -> None:
    """As `make bench` runs it, on a tiny shape: it starts processes of its own."""
    file = tmp_path / "engine.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_engine.py"), "--tiny", "--json", str(file)]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert ran.returncode == 0, ran.stderr
    record = json.loads(file.read_text(encoding="utf-8"))
    contest = {r["contestant"]: r for r in record["contest"]}
    assert list(contest) == ["a", "b", "c", "d", "d'", "d+"]
    assert contest["c"]["tokens"] == contest["d"]["tokens"]
    for r in contest.values():
        assert r["step_s"] > 0
        assert r["tokens_per_s"] == pytest.approx(r["tokens"] / r["step_s"])  # a single round here
        assert r["peak_bytes"] > 0 or not _meter.used_bytes(CPU)
        assert r["ratios"]["step/a"] == pytest.approx(r["step_s"] / contest["a"]["step_s"])
    (point,) = record["scaling"]
    assert point["axis"] == "K"
    assert point["k"] == 2
    lines = [line for line in ran.stdout.splitlines() if line.startswith("|")]
    assert sum(line.startswith("| tiny | 1 |") for line in lines) == 6
    assert {"torch", "transformers", "peft", "bitsandbytes", "date", "device"} <= set(record["machine"])
    for version in (record["machine"]["torch"], record["machine"]["date"]):
        assert version in ran.stdout


@pytest.mark.slow
def test_gpu_benchmark_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu.json"
    gpu.main(["--tiny", "--device", "cpu", "--json", str(file)])
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["matmul_flops_per_s"] > 0
    assert [(r["shape"], r["contestant"]) for r in record["results"]] == [
        (shape.name, key) for shape in gpu.TINY for key in ("d", "d'", "c")
    ]
    for r in record["results"]:
        assert r["status"] == "ok"
        assert r["trained_tokens"] == r["step_tokens"] == 64
        assert r["tokens_per_s"] == pytest.approx(64 / r["step_s"])
        assert r["share_of_matmul"] == pytest.approx(r["flops_per_s"] / record["matmul_flops_per_s"])
        assert {"peak_allocated_bytes", "peak_reserved_bytes", "loaded_bytes", "predicted_bytes"} <= set(r)
    table = capsys.readouterr().out
    assert sum(line.startswith("| tiny") for line in table.splitlines()) == 6
    assert all(len(gpu.cells(r)) == len(gpu.HEADER) for r in record["results"])


def test_gpu_benchmark_says_what_it_could_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    args = gpu.parse(["--tiny", "--device", "cpu", "--seconds", "0"])
    args.vram = [0]
    found = gpu.results(args, CPU, 1e9)
    assert {r["status"] for r in found} == {"not measured: out of time"}

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu, "random_base", full)
    found += gpu.results(args, CPU, 1e9)
    assert found[-1] == {"shape": "tiny, qwen2", "status": "out of memory while loading"}
    assert all(len(gpu.cells(r)) == len(gpu.HEADER) for r in found)


def test_batches_are_timed_against_the_same_answers() -> None:
    ((together, alone),) = evaluate.batched(1, count=6)  # ends the process where the answers differ
    assert together > 0 and alone > 0
