"""`eval` from end to end against the public definitions, on the same model and rows.

Token by token in float64, a row at a time, without padding, from transformers' own logits. Nothing of ours is in the
oracle but the numbers it is held to.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call, write_rows
from rouge_score import rouge_scorer
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from qunlearn.model.device import choose_dtype
from qunlearn.sandbox import ASSETS, data_file
from qunlearn.utils.file_names import EVAL

DTYPE = choose_dtype(torch.device("cpu"))
CLOSE = 1e-3 if torch.float32 == DTYPE else 3e-2  # bf16 rounds otherwise in a batch than alone
N = 5


@dataclass(frozen=True)
class Told:
    """One answer behind one prompt, (T,): log-probability of each token, whether it is the first choice, its z."""

    logps: np.ndarray
    hits: np.ndarray
    z: np.ndarray

    @property
    def nll(self) -> float:
        return float(-self.logps.mean())


class Oracle:
    def __init__(self, name: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(ASSETS / name)
        self.model = AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=DTYPE).eval()

    def ids(self, prompt: str) -> list[int]:
        return list(self.tokenizer(f"<|user|>{prompt}<|assistant|>")["input_ids"])

    @torch.no_grad()
    def told(self, prompt: str, answer: str) -> Told:
        before = self.ids(prompt)
        after = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        z = self.model(input_ids=torch.tensor([before + after])).logits[0].double()
        log_p = torch.log_softmax(z, dim=-1)[len(before) - 1 : -1]
        p, chosen = log_p.exp(), log_p[torch.arange(len(after)), after]
        mean = (p * log_p).sum(-1)
        spread = ((p * log_p**2).sum(-1) - mean**2).clamp(min=1e-6).sqrt()
        hits = log_p.argmax(-1) == torch.tensor(after)
        return Told(chosen.numpy(), hits.numpy(), ((chosen - mean) / spread).numpy())

    @torch.no_grad()
    def said(self, prompt: str) -> list[int]:
        ids = torch.tensor([self.ids(prompt)])
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        return [i for i in out[0, ids.shape[1] :].tolist() if i not in self.tokenizer.all_special_ids]


def rows_of(split: str) -> list[dict[str, Any]]:
    lines = data_file("hallucination", split).read_text(encoding="utf-8").splitlines()
    # Some that the reference knows and some that it does not: nothing is only right or only wrong.
    return [json.loads(line) for line in lines[: 3 * N : 3]]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(rows by split, oracles, what `eval` says in each suite, per-row values of each suite)."""
    folder, rows = tmp_path_factory.mktemp("definitions"), {split: rows_of(split) for split in ("forget", "holdout")}
    files = [x for s in rows for x in (f"--{s}", write_rows(folder / f"{s}.jsonl", rows[s]))]
    # The model that never saw the forget rows is the one measured: it is neither always right nor always wrong.
    said = {}
    for suite in ("tofu", "muse", "llmu"):
        more = ("--quant", "none", "--device", "cpu", "--retrained-model", "sandbox", "-o", folder / "out", "--json")
        ran = call("eval", "sandbox-gold", *files, "--suite", suite, *more)
        assert ran.code == 0, ran.stderr
        said[suite] = ran.json["measures"]
    suites = json.loads((folder / "out" / EVAL).read_text())["suites"]
    return rows, {"base": Oracle("gold"), "retrained": Oracle("model")}, said, suites


def ratio(oracle: Oracle, row: dict[str, Any]) -> float:
    """TOFU: exp(-mean over wrong answers of NLL) / exp(-NLL of the right one)."""
    wrong = [oracle.told(row["prompt"], text).nll for text in row["perturbed"]]
    right = oracle.told(row["prompt"], row.get("paraphrased_answer", row["completion"])).nll
    return math.exp(-float(np.mean(wrong))) / math.exp(-right)


@pytest.mark.parametrize("subject", ["base", "retrained"])
def test_tofu(known: Any, subject: str) -> None:
    rows, oracles, said, _ = known
    oracle, found = oracles[subject], said["tofu"]

    def value(split: str, name: str) -> float:
        return float(found[split][name][subject]["mean"])

    terms: list[float] = []
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    for split in ("forget", "holdout"):
        told = [oracle.told(row["prompt"], row["completion"]) for row in rows[split]]
        probability = float(np.mean([math.exp(-t.nll) for t in told]))
        assert value(split, "probability") == pytest.approx(probability, abs=CLOSE)
        outputs = [oracle.tokenizer.decode(oracle.said(row["prompt"])).strip() for row in rows[split]]
        recall = [scorer.score(r["completion"], o)["rougeL"].recall for r, o in zip(rows[split], outputs, strict=True)]
        assert value(split, "rouge_recall") == pytest.approx(float(np.mean(recall)), abs=CLOSE)
        ratios = [ratio(oracle, row) for row in rows[split]]
        if split == "forget":
            assert value(split, "truth_ratio") == pytest.approx(np.mean([min(r, 1 / r) for r in ratios]), abs=CLOSE)
            assert value(split, "truth_share") == pytest.approx(np.mean([1 / (1 + r) for r in ratios]), abs=CLOSE)
            others = [ratio(oracles["retrained"], row) for row in rows[split]]
            test = stats.ks_2samp(ratios, others)
            assert value(split, "forget_quality") == pytest.approx(test.pvalue, abs=CLOSE)
            assert value(split, "truth_distance") == pytest.approx(test.statistic, abs=CLOSE)
            strengths = [next((1 - k / len(t.hits) for k in range(len(t.hits)) if t.hits[k:].all()), 0.0) for t in told]
            assert value(split, "extraction_strength") == pytest.approx(np.mean(strengths), abs=CLOSE)
        else:
            terms = [probability, float(np.mean(recall)), float(np.mean([max(0.0, 1 - r) for r in ratios]))]
            assert value(split, "truth_utility") == pytest.approx(terms[2], abs=CLOSE)
    assert value("kept", "model_utility") == pytest.approx(stats.hmean(terms), abs=CLOSE)


def auc(members: list[float], others: list[float]) -> float:
    return float(stats.mannwhitneyu(members, others).statistic / (len(members) * len(others)))


def test_muse(known: Any) -> None:
    rows, oracles, said, _ = known
    scores: dict[str, dict[str, list[float]]] = {}
    for split in rows:
        for row in rows[split]:
            mine = oracles["base"].told(row["prompt"], row["completion"])
            other = oracles["retrained"].told(row["prompt"], row["completion"])
            lowest = max(1, int(0.4 * len(mine.logps)))
            compressed = len(zlib.compress(row["completion"].encode()))
            of_row = {
                "mia_loss": mine.logps.mean(),
                "mia_zlib": mine.logps.sum() / compressed,
                "mia_min_k": np.sort(mine.logps)[:lowest].mean(),
                "mia_min_k_plus": np.sort(mine.z)[:lowest].mean(),
                "mia_reference": other.nll - mine.nll,
            }
            for name, score in of_row.items():
                scores.setdefault(name, {}).setdefault(split, []).append(float(score))
    for name, of in scores.items():
        found = said["muse"]["forget"][name]["base"]
        assert found["mean"] == pytest.approx(auc(of["forget"], of["holdout"]), abs=1 / N**2 if CLOSE > 1e-3 else 1e-9)
        assert found["low"] <= found["mean"] <= found["high"]
    theirs = said["muse"]["forget"]["mia_min_k"]["retrained"]["mean"]
    mine = said["muse"]["forget"]["mia_min_k"]["base"]["mean"]
    leakage = said["muse"]["forget"]["privacy_leakage"]["base"]["mean"]
    assert leakage == pytest.approx(100 * (theirs - mine) / (1 - theirs))
    told = [oracles["base"].told(row["prompt"], row["completion"]) for row in rows["forget"]]
    memorised = said["muse"]["forget"]["exact_memorisation"]["base"]["mean"]
    assert memorised == pytest.approx(np.mean([t.hits.mean() for t in told]), abs=CLOSE)


def test_llmu(known: Any) -> None:
    """Fluency is the base's own NLL of what was said; diversity is over tokens."""
    rows, oracles, said, suites = known
    oracle, found = oracles["base"], said["llmu"]["forget"]
    outputs = [item["outputs"]["base"] for item in suites["llmu"]["items"]["forget"]]
    spoken = [oracle.told(row["prompt"], text).nll for row, text in zip(rows["forget"], outputs, strict=True)]
    assert found["fluency"]["base"]["mean"] == pytest.approx(np.mean(spoken), abs=CLOSE)
    ids = [oracle.said(row["prompt"]) for row in rows["forget"]]
    assert found["diversity"]["base"]["mean"] == pytest.approx(np.mean([len(set(i)) / len(i) for i in ids]), abs=CLOSE)
    assert [oracle.tokenizer.decode(i).strip() for i in ids] == outputs
