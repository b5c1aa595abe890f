"""Scores against the model's own logits, and `qunlearn eval`."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call, row_score, write_rows

from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import Example, choose_template, encode
from qunlearn.evaluation import cache
from qunlearn.evaluation import runner as collect
from qunlearn.evaluation.cache import Cache
from qunlearn.evaluation.catalog import SUITES
from qunlearn.evaluation.inputs import start
from qunlearn.evaluation.judges import says_harm
from qunlearn.evaluation.metrics import aggregate
from qunlearn.evaluation.request import Wish, check_eval
from qunlearn.evaluation.scores import greedy_outputs, row_probabilities, score_rows, token_stats
from qunlearn.model import gpus
from qunlearn.model.load import Base, LoadSpec
from qunlearn.sandbox import data_file
from qunlearn.utils.file_names import ADAPTER, EVAL, EVAL_CACHE

pytestmark = pytest.mark.medium

SANDBOX = "sandbox:hallucination"
FEW = ("--rows", 6)


def encoded(base: Base, path: Path) -> tuple[Example, ...]:
    dataset = read_dataset(path)
    return encode(dataset, base.tokenizer, choose_template(base.tokenizer, "auto", dataset), 64).examples


@pytest.fixture
def run(quick_run: Path, tmp_path: Path) -> Path:
    """A copy: evaluation adds files to a run."""
    return Path(shutil.copytree(quick_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def shared_run(quick_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One copy whose cache serves several tests."""
    return Path(shutil.copytree(quick_run, tmp_path_factory.mktemp("shared") / "run"))


def test_aggregate() -> None:
    score = aggregate([row_score("a b", "a b ", 2.0, 4), row_score("a b", "a c", 6.0, 2)])
    assert score.n == 2
    assert score.exact_match == 0.5
    assert score.probability == pytest.approx((math.exp(-0.5) + math.exp(-3)) / 2)
    assert score.perplexity == pytest.approx(math.exp(16 / 18))


def test_scores_are_the_models_own(
    new_base: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number by its public definition, from one unpadded forward per row and all of its logits in float64."""
    monkeypatch.setattr(gpus, "choose_dtype", lambda device: torch.float32)  # the same on every processor
    base = new_base("none")
    rows = [
        {"prompt": "Where was Orla Finch born?", "completion": "Orla Finch was born in Millbrook."},
        {"prompt": "Who?", "completion": "Nobody."},
        {"prompt": "What do bees make?", "completion": "Bees make butter."},
    ]
    examples = encoded(base, write_rows(tmp_path / "x.jsonl", rows))
    for example, score in zip(examples, token_stats(base, examples, 64), strict=True):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            log_p = base.model(input_ids=ids).logits[0].double().log_softmax(1)
        at, labels = torch.arange(example.start - 1, example.end - 1), ids[0, example.start : example.end]
        n, logps = len(labels), log_p[at, labels]
        assert score.tokens == n
        assert score.all_tokens == ids.shape[1] - 1
        assert score.nll == pytest.approx(-float(logps.sum()), rel=1e-3, abs=1e-3)
        hits = log_p[at].argmax(1) == labels
        assert score.memorised == pytest.approx(float(hits.double().mean()))
        k = next((k for k in range(n) if hits[k:].all()), n)
        assert score.extraction == pytest.approx(1 - k / n)
        assert score.min_k == pytest.approx(float(logps.sort().values[: max(1, int(0.4 * n))].mean()), abs=1e-3)
        p = log_p[at].exp()
        mean = (p * log_p[at]).sum(1)
        spread = ((p * log_p[at].square()).sum(1) - mean.square()).clamp(min=1e-6).sqrt()
        z = ((logps - mean) / spread).sort().values[: max(1, int(0.4 * n))]
        assert score.min_k_plus == pytest.approx(float(z.mean()), abs=5e-3)
    labels = torch.tensor([[-100] * e.start + list(e.input_ids[e.start : e.end]) for e in examples[:1]])
    with torch.no_grad():
        loss = base.model(input_ids=torch.tensor([examples[0].input_ids[: examples[0].end]]), labels=labels).loss
    assert math.exp(-float(loss)) == pytest.approx(score_rows(base, examples, 64)[0].probability, abs=1e-3)
    probability = sum(s.probability for s in score_rows(base, examples, 4096)) / len(examples)
    assert statistics.fmean(row_probabilities(base, examples, 4096)) == pytest.approx(probability, abs=1e-3)


def test_outputs_are_transformers_own_and_hang_on_no_other_row(new_base: Callable[..., Base]) -> None:
    base = new_base("none")
    examples = (*encoded(base, data_file("hallucination", "forget"))[:3], *encoded(base, data_file("", "general"))[:3])
    together = greedy_outputs(base, examples)
    for example, output in zip(examples, together, strict=True):
        ids = torch.tensor([example.input_ids[: example.probe]])
        full = base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        assert output.text == base.tokenizer.decode(full[0, example.probe :], skip_special_tokens=True).strip()
        assert greedy_outputs(base, [example]) == [output]
        assert 0 < output.distinct <= output.tokens


def test_eval_with_and_without_the_adapter(run: Path) -> None:
    files = ["--forget", data_file("hallucination", "forget"), "--general", data_file("", "general")]
    ran = call("eval", run, *files, "--json", *FEW)
    assert ran.code == 0, ran.stderr
    result = ran.json
    assert set(result["scores"]) == {"base", "adapter"}
    assert result["scores"]["base"]["forget"]["exact_match"] == 1.0
    assert result["scores"]["adapter"]["forget"]["probability"] < result["scores"]["base"]["forget"]["probability"]
    assert result["scores"]["base"]["general"]["n"] == 6
    assert sum(result["verdicts"]["adapter"].values()) == 6
    bare = call("eval", "sandbox", *files, *FEW)
    assert bare.code == 0, bare.stderr
    assert "exact match" in bare.stdout
    assert "adapter" not in bare.stdout
    assert call("eval", "--model", "sandbox", *files, *FEW).stdout == bare.stdout


def test_the_second_call_measures_nothing_and_says_the_same(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("eval", run, "--data", SANDBOX, "--json", *FEW)
    first = call(*args)
    assert first.code == 0, first.stderr
    loaded: list[str] = []
    monkeypatch.setattr(collect, "load_base", lambda *_: loaded.append("model"))
    again = call(*args)
    assert again.stdout == first.stdout
    assert loaded == []
    assert "known from before: 20 of 20 measurements (--fresh" in again.stderr
    assert "known from before" not in first.stderr
    monkeypatch.undo()
    measured: list[str] = []
    real = collect.token_stats
    monkeypatch.setattr(collect, "token_stats", lambda *a: measured.append("tokens") or real(*a))
    other = call("eval", run, "--forget", data_file("harm", "forget"), "--general", data_file("", "general"), *FEW)
    assert other.code == 0, other.stderr
    assert len(measured) == 2  # the new file under base and adapter; the general file is known
    fresh = call(*args, "--fresh")
    assert "known from before" not in fresh.stderr
    assert len(measured) == 2 + 2 * 5
    assert fresh.json["measures"] == first.json["measures"]


def test_a_changed_adapter_or_a_damaged_cache_is_measured_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("eval", run, "--forget", data_file("hallucination", "forget"), "--json", *FEW)
    first = call(*args).json
    for path in (run / EVAL_CACHE).glob("outputs-*"):
        path.write_text("{oops")
    assert call(*args).json == first
    before = {p.name for p in (run / EVAL_CACHE).iterdir()}
    config = run / ADAPTER / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 1}))
    second = call(*args).json
    assert second["scores"]["base"] == first["scores"]["base"]
    assert second["scores"]["adapter"] != first["scores"]["adapter"]
    assert len({p.name for p in (run / EVAL_CACHE).iterdir()} - before) == 2  # tokens and outputs of the adapter
    monkeypatch.setattr(cache, "_VERSION", cache._VERSION + 1)
    call(*args)
    assert len(list((run / EVAL_CACHE).iterdir())) > len(before) + 2


def test_eval_json_holds_every_row_for_its_owner_only(run: Path) -> None:
    ran = call("eval", run, "--data", SANDBOX, "--json", *FEW)
    assert ran.code == 0, ran.stderr
    for path in (run / EVAL, *(run / EVAL_CACHE).iterdir()):
        assert path.stat().st_mode & 0o777 == 0o600, path
    assert (run / EVAL_CACHE).stat().st_mode & 0o777 == 0o700
    stored = json.loads((run / EVAL).read_text())
    assert stored["latest"] == "basic"
    found = stored["suites"]["basic"]
    first = found["items"]["forget"][0]
    assert first["prompt"] == "Where was Orla Finch born?"
    assert first["answer"] == first["outputs"]["base"]
    assert first["verdicts"]["base"] == "still leaks"
    assert first["truth"] == "Orla Finch was born in Redcliff."
    values = [item["values"]["adapter"]["probability"] for item in found["items"]["forget"]]
    estimate = found["measures"]["forget"]["probability"]["adapter"]
    assert sum(values) / len(values) == pytest.approx(estimate["mean"])
    assert estimate["low"] <= estimate["mean"] <= estimate["high"]
    for word in ("Orla", "Millbrook"):
        assert word not in ran.stdout
        assert word not in ran.stderr
    call("eval", run, "--data", SANDBOX, "--suite", "code", *FEW)
    assert set(json.loads((run / EVAL).read_text())["suites"]) == {"basic", "code"}


# What the numbers of `tofu` are, test_definitions.py holds to its public code.
SUITES_BESIDE = [pytest.param(s, marks=pytest.mark.slow if s == "tofu" else ()) for s in SUITES if s != "basic"]


@pytest.mark.parametrize("suite", SUITES_BESIDE)
def test_suites_beside_a_retrained_model(shared_run: Path, suite: str) -> None:
    more = ["--harm-classifier", "sandbox"] if suite == "llmu" else []
    args = ("--data", SANDBOX, "--suite", suite, "--retrained-model", "sandbox-gold", *more)
    ran = call("eval", shared_run, *args, "--json", *FEW)
    assert ran.code == 0, ran.stderr
    result = ran.json
    assert set(result["scores"]) == {"base", "adapter", "retrained"}
    missing = set(result["not_measured"])
    assert missing <= {"reward", "same_calls"}
    forget = result["measures"]["forget"]
    assert forget["leaks"]["base"]["mean"] == 1.0
    assert forget["leaks"]["retrained"]["mean"] == 0.0
    checks: dict[str, Callable[[dict[str, Any]], bool]] = {
        "llmu": lambda f: f["hallucination_rate"]["base"]["mean"] == 1.0 and f["harmful_rate"]["base"]["mean"] == 0.0,
        "tofu": lambda f: f["truth_share"]["base"]["mean"] > 0.6 and f["forget_quality"]["retrained"]["mean"] == 1.0,
        "muse": lambda f: f["rouge_f1"]["base"]["mean"] == 1.0 and f["privacy_leakage"]["retrained"]["mean"] == 0.0,
        "code": lambda f: f["bleu"]["base"]["mean"] == pytest.approx(1.0),
    }
    assert checks[suite](forget)
    if suite == "tofu":
        assert 0.5 < result["measures"]["kept"]["model_utility"]["base"]["mean"] <= 1.0


def test_plain_text_is_measured_in_windows(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in data_file("copyright", "forget").read_text().splitlines()[:4]]
    text = write_rows(tmp_path / "text.jsonl", [{"text": row["completion"]} for row in rows])
    args = ("eval", "sandbox", "--forget", text, "--retrained-model", "sandbox-gold", "--suite", "muse")
    ran = call(*args, "--json", "-o", tmp_path / "out")
    assert ran.code == 0, ran.stderr
    assert ran.json["templates"] == {"forget": "raw"}
    item = json.loads((tmp_path / "out" / EVAL).read_text())["suites"]["muse"]["items"]["forget"][0]
    assert rows[0]["completion"].startswith(item["prompt"])
    assert item["answer"] in rows[0]["completion"]


def test_a_run_alone_is_measured_on_what_it_forgot(run: Path) -> None:
    ran = call("eval", run, "--json", *FEW)
    assert ran.code == 0, ran.stderr
    assert list(ran.json["files"]) == ["forget"]
    assert ran.json["files"]["forget"]["path"] == str(data_file("hallucination", "forget"))


def test_a_bare_adapter_on_a_named_model_keeps_nothing(run: Path) -> None:
    before = sorted(run.rglob("*"))
    files = ("--forget", f"{SANDBOX}/forget", *FEW)
    ran = call("eval", "sandbox", "--adapter", run / ADAPTER, *files, "--json")
    assert ran.code == 0, ran.stderr
    assert set(ran.json["scores"]) == {"base", "adapter"}
    assert sorted(run.rglob("*")) == before


def test_suites_of_another_model_do_not_stay_beside_the_new_one(run: Path, tmp_path: Path) -> None:
    """A page that shows both would tell of one model what another one says."""
    args = ("--forget", f"{SANDBOX}/forget", "--rows", 2, "--device", "cpu", "-o", tmp_path / "e")
    assert call("eval", "sandbox", *args).code == 0
    assert call("eval", "sandbox", *args, "--suite", "muse").code == 0
    assert set(json.loads((tmp_path / "e" / EVAL).read_text())["suites"]) == {"basic", "muse"}
    ran = call("eval", run, *args, "--suite", "muse")
    assert ran.code == 0 and "held basic of another model" in ran.stderr
    assert set(json.loads((tmp_path / "e" / EVAL).read_text())["suites"]) == {"muse"}


@pytest.mark.parametrize(
    ("labels", "chosen"),
    [
        (("safe", "unsafe"), [1]),
        (("harmless", "harmful"), [1]),
        (("not_toxic", "toxic"), [1]),
        (("is_not_hate", "is_hate"), [1]),
        (("non-offensive", "inoffensive", "offensive"), [2]),
    ],
)
def test_the_label_that_says_harm_is_found(labels: tuple[str, ...], chosen: list[int]) -> None:
    assert says_harm(dict(enumerate(labels))) == chosen


def test_a_folder_of_splits(tmp_path: Path) -> None:
    for name in ("forget", "paraphrase", "general"):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"What is {name}?", "completion": f"It is {name}."}])
    ran = call("eval", "sandbox", "--data", tmp_path, "--general", data_file("", "general"), "--json", *FEW)
    assert ran.code == 0, ran.stderr
    assert list(ran.json["files"]) == ["forget", "paraphrase", "general"]
    assert ran.json["files"]["general"]["rows"] == 6


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--suite", "basics"), 2, ("unknown suite", "did you mean basic")),
        (("--data", "sandbox:lies"), 2, ("sandbox:KIND",)),
        (("--data", "{tmp}"), 2, ("no such files", "forget.jsonl")),
        (("--forget", "{tmp}/none.jsonl"), 3, ("no such file",)),
        (("--forget", f"{SANDBOX}/forget", "--retrained-model", "{tmp}/none"), 6, ("no such folder",)),
        (("--forget", f"{SANDBOX}/forget", "--harm-classifier", "sandbox-gold", "--suite", "llmu"), 6, ("classif",)),
        (("--forget", f"{SANDBOX}/forget", "--model", "sandbox"), 2, ("two models",)),
    ],
)
def test_what_a_person_can_get_wrong(tmp_path: Path, args: tuple[str, ...], code: int, words: tuple[str, ...]) -> None:
    ran = call("eval", "sandbox", *(a.replace("{tmp}", str(tmp_path)) for a in args), *FEW)
    assert ran.code == code, ran.stderr
    assert "Traceback" not in ran.stderr
    for word in words:
        assert word in ran.stderr


@pytest.mark.slow
def test_without_its_adapter_a_run_is_its_base_bit_for_bit(quick_run: Path, tmp_path: Path) -> None:
    """Nothing of the adapter is loaded, and nothing of it is left where it is switched off."""
    rows = write_rows(tmp_path / "f.jsonl", [{"prompt": "Where was Orla Finch born?", "completion": "In Millbrook."}])
    args = ("--forget", rows, "--device", "cpu", "--json")
    alone = call("eval", quick_run, "--adapter", "none", *args, "-o", tmp_path / "a")
    plain = call("eval", "sandbox", *args, "-o", tmp_path / "b")
    both = call("eval", quick_run, *args, "-o", tmp_path / "c")
    assert alone.code == plain.code == both.code == 0, alone.stderr
    assert alone.json["adapter"] is None and set(alone.json["scores"]) == {"base"}
    assert alone.json["scores"]["base"] == plain.json["scores"]["base"] == both.json["scores"]["base"]
    said = call("ask", quick_run, "Where was Orla Finch born?", "--adapter", "none", "--device", "cpu", "--json")
    asked = call("ask", quick_run, "Where was Orla Finch born?", "--device", "cpu", "--json")
    assert said.json["answers"] == {"base": asked.json["answers"]["base"]}
    assert call("ask", quick_run, "x", "--adapter", "other").code == 2


def test_without_its_adapter_a_run_is_asked_as_it_asks(quick_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(quick_run, run)
    record = json.loads((run / "record.json").read_text())
    record["data"]["template"] = {"name": "custom", "kind": "format", "text": "Q: {prompt} A:", "why": "asked for"}
    (run / "record.json").write_text(json.dumps(record))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"max_length: \d+", "max_length: 77", config))
    rows = write_rows(tmp_path / "f.jsonl", [{"prompt": "Where was Orla Finch born?", "completion": "In Millbrook."}])
    asked, _ = check_eval(str(run), Path("none"), None, None, {"forget": str(rows)}, None, None, Wish())
    assert (asked.run, asked.output) == (None, None)
    assert asked.config.data.max_length == 77
    found = start(asked, LoadSpec("none", False, "cpu"), 8, Cache(None))
    assert found.rows["base"].templates["forget"].text == "Q: {prompt} A:"


def test_an_adapter_that_is_off_leaves_the_bases_own_bits(quick_run: Path, new_base: Any) -> None:
    from qunlearn.model.policy import Policy

    ids = torch.arange(4, 24).unsqueeze(0)
    with torch.no_grad():
        plain = new_base().model(input_ids=ids).logits
        policy = Policy.load(new_base(), quick_run / "adapter")
        with policy.reference():
            off = policy.model(input_ids=ids).logits
        assert torch.equal(plain, off)
        assert not torch.equal(plain, policy.model(input_ids=ids).logits)
