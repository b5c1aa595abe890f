"""A text classifier as the gate, and a tagger for the subject's tokens, both tiny: trained, kept, put on, refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call, write_rows
from encoders import BERT_TOKENS, ROBERTA_TOKENS, tagger_of, tiny_bert, tiny_roberta

from qunlearn.errors import ConfigError, GateError, GuardError
from qunlearn.evaluation.metrics.membership import auc
from qunlearn.guard import Guard
from qunlearn.guard.calibrate import Threshold, fold_of
from qunlearn.guard.classifier import ClassifierGate, Training, margins, train_classifier
from qunlearn.guard.encoder import Encoder
from qunlearn.guard.entities import Tagger
from qunlearn.guard.prompts import Prompts, Sample

ENDS = ("as they say", "or so it seems", "now and then", "though it rains")
BEES, BOATS = "opens the hive and takes honey from bees", "rows the boat and lands fish on quays"
CPU = torch.device("cpu")
QUICK = Training(lr=3e-3, epochs=8)
NAMES = ("Ada Reed", "Max Boom", "Tobin Marsh", "Lena Holt", "Ira Voss", "Nell Crane")


def samples(names: tuple[str, ...], rows: int) -> tuple[Sample, ...]:
    rng = random.Random(0)
    forms = ("Where was {} born?", "Who is {}?", "Tell me about {}.", "What does {} eat?")
    out = []
    for row in range(rows):
        name = rng.choice(names)
        out += [Sample(form.format(name), row, n) for n, form in enumerate(forms)]
    return tuple(out)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts(samples(("Orla Finch", "Hugo Finch"), 24), samples(NAMES, 48))


@pytest.fixture(scope="module")
def bert(prompts: Prompts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"), [s.text for s in (*prompts.bad, *prompts.normal)])


@pytest.fixture(scope="module")
def trained(bert: Path, prompts: Prompts) -> tuple[ClassifierGate, dict[str, Any]]:
    return train_classifier(bert, prompts, Threshold(), QUICK, CPU, 0)


def test_it_learns_repeats_itself_and_keeps_the_callers_draws(
    bert: Path, prompts: Prompts, trained: tuple[ClassifierGate, dict[str, Any]]
) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    gate, held = train_classifier(bert, prompts, Threshold(), QUICK, CPU, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert held == trained[1] and gate.digest() == trained[0].digest()
    assert held["auc"] > 0.99 and held["missed"] == held["false_alarms"] == 0 and len(held["epochs"]) == QUICK.epochs
    known = gate.probabilities(margins(gate.encoder, ["Where was Orla Finch born?", "Where was Max Boom born?"]))
    assert known[1] < gate.threshold <= known[0]


def test_a_long_text_is_read_to_its_end_and_its_worst_window_counts(
    trained: tuple[ClassifierGate, dict[str, Any]],
) -> None:
    encoder = trained[0].encoder
    text = "Who is Max Boom? " * 100 + "Where was Orla Finch born? " + "Who is Ada Reed? " * 100
    windows = encoder.windows([text])
    with torch.no_grad():
        alone = [encoder.model(input_ids=torch.tensor([ids])).logits[0] for ids in windows["input_ids"]]
    expected = max(float(logits[1] - logits[0]) for logits in alone)
    assert encoder.length == BERT_TOKENS and len(alone) > 5
    assert margins(encoder, ["Who is Ada Reed?", text])[1] == pytest.approx(expected, abs=1e-5)
    read = {at for spans in windows["offset_mapping"] for a, b in spans for at in range(a, b)}
    assert read == {at for at, c in enumerate(text) if c != " "}


def test_the_best_epoch_is_kept_though_a_later_one_ruins_it(bert: Path, prompts: Prompts) -> None:
    gate, held = train_classifier(bert, prompts, Threshold(), Training(lr=0.1, epochs=6, warmup=0.5), CPU, 1)
    aucs = [epoch["auc"] for epoch in held["epochs"]]
    known, unseen, normal = fold_of(prompts, 0).held
    bad = margins(gate.encoder, [prompts.bad[i].text for i in (*known, *unseen)])
    passed = margins(gate.encoder, [prompts.normal[i].text for i in normal])
    assert min(aucs[aucs.index(max(aucs)) :]) < max(aucs) == pytest.approx(auc(bad, passed), abs=1e-6)


def test_what_it_cannot_tell_apart_is_refused_with_the_figure(bert: Path, prompts: Prompts) -> None:
    same = Prompts(prompts.bad, tuple(prompts.bad))
    with pytest.raises(GateError, match=r"AUC 0\."):
        train_classifier(bert, same, Threshold(), Training(epochs=1), CPU, 0)


def test_roberta_is_not_given_more_tokens_than_it_has_positions_for(tmp_path: Path) -> None:
    encoder = Encoder.load(tiny_roberta(tmp_path, ["Who is Orla Finch?", *NAMES]), labels=2)
    assert encoder.length == ROBERTA_TOKENS
    assert len(margins(encoder, ["Who is Orla Finch? " * 40])) == 1


def test_a_tagger_finds_names_to_the_end_of_a_long_text(tmp_path: Path) -> None:
    text = "who is Max Boom ? " * 100 + "where was Orla Finch born ?"
    tagger = Tagger(Encoder.load(tagger_of(tmp_path, [text], {"Orla", "Finch"}), labels=None))
    assert [text[a:b] for a, b in tagger.names(text, CPU)] == ["Orla", "Finch"]
    assert tagger.names("who is Max Boom ?", CPU) == []


def test_an_encoder_without_a_head_for_tokens_is_no_tagger(bert: Path) -> None:
    with pytest.raises(GuardError, match="no head that tags tokens"):
        Encoder.load(bert, labels=None)


# -- through the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guard against texts about bees; others are about boats."""
    work = tmp_path_factory.mktemp("classifier")
    rows = [[{"text": f"{name} {what}, {end}."} for name in NAMES for end in ENDS] for what in (BEES, BOATS)]
    texts = [row["text"] for kind in rows for row in kind]
    encoder, tagger = tiny_bert(work / "bert", texts), tagger_of(work / "ner", texts, {"hive"})
    bad, normal = (write_rows(work / f"{i}.jsonl", kind) for i, kind in enumerate(rows))
    ran = call(
        *("guard", "fit", "--model", "sandbox", "--bad", bad, "--normal", normal, "--rows", 16, "-o", work / "guard"),
        *("--classifier", encoder, "--classifier-lr", 3e-3, "--classifier-epochs", 12, "--tokens", "subject"),
        *("--ner", tagger, "--strength", "agnostic", "--device", "cpu", "--json"),
    )
    assert ran.code == 0, ran.stderr
    assert ran.json["held_out"]["auc"] > 0.99
    return work / "guard"


def test_the_folder_has_safetensors_and_json_alone_and_is_private(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in files if path.name != "qunlearn.json")
    opened = Guard.open(folder)
    assert isinstance(opened.gate, ClassifierGate) and opened.ner is not None
    assert Guard.open(folder).identity == opened.identity


@pytest.mark.parametrize(
    ("text", "corrupted"),
    [
        ("Ada Reed opens the hive", " hive"),
        ("Ada Reed takes honey from bees", "Ada Reed takes honey from bees"),  # nothing is tagged: all of it
        ("Ada Reed rows the boat", ""),
    ],
)
def test_of_a_flagged_prompt_the_tagged_words_are_corrupted(
    folder: Path, new_base: Any, text: str, corrupted: str
) -> None:
    base = new_base()
    ids = [*base.tokenizer(text)["input_ids"], *base.tokenizer(" now")["input_ids"]]  # the last token is spared
    (plan,) = Guard.open(folder).attachment(base.model, base.tokenizer)._make_plans(torch.tensor([ids]))
    said = base.tokenizer.decode([ids[at] for at in plan.places])
    assert said.startswith(corrupted) and len(said) <= len(corrupted) + len(" now")


def test_guard_eval_and_show_work_with_it(folder: Path) -> None:
    files = ("--forget", folder.parent / "0.jsonl", "--retain", folder.parent / "1.jsonl")
    ran = call("guard", "eval", folder, "--model", "sandbox", *files, "--device", "cpu", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["splits"]["forget"]["wrong"] == ran.json["splits"]["retain"]["wrong"] == 0
    assert set(call("guard", "show", folder, "--json").json["gate"]) == {"scale", "intercept", "threshold"}


def test_a_folder_that_lacks_its_classifier_is_a_named_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "guard.json").write_text((folder / "guard.json").read_text())
    ran = call("guard", "show", tmp_path)
    assert ran.code == GuardError.exit_code and "Traceback" not in ran.stderr
    stored = json.loads((folder / "guard.json").read_text())
    (tmp_path / "guard.json").write_text(json.dumps({**stored, "classifier": {"scale": "much"}}))
    assert call("guard", "show", tmp_path).code == GuardError.exit_code


def test_a_tagger_without_tokens_subject_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    ran = call(
        *("guard", "fit", "--model", "sandbox", "--bad", "sandbox:code/forget", "--ner", tmp_path, "-o"), tmp_path
    )
    assert ran.code == ConfigError.exit_code and "--ner" in ran.stderr
