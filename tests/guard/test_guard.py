"""A guard on the sandbox: fitted once through the command line, put on, measured, taken off, refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call, write_rows
from safetensors.torch import load_file, save_file

from qunlearn.data.records import Dataset, Record, read_dataset
from qunlearn.data.tokenize import choose_template, encode_record
from qunlearn.errors import ConfigError, GuardError
from qunlearn.guard import Guard
from qunlearn.guard.guard import SETTINGS, WEIGHTS, BaseFacts
from qunlearn.guard.robustness import gate_errors
from qunlearn.guard.turns import find_frame, read_prompt
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.load import Base
from qunlearn.sandbox import data_file

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("guard") / "guard"
    ran = call(
        "guard", "fit", "--model", "sandbox", "--bad", "sandbox:code/forget", "-o", out, "--device", "cpu", "--json"
    )
    assert ran.code == 0, ran.stderr
    assert ran.json["held_out"]["auc"] > 0.95
    return out


@pytest.fixture(scope="module")
def base(new_base: Any) -> Base:
    made: Base = new_base()
    return made


def prompts(base: Base, split: str, n: int = 8) -> list[tuple[int, ...]]:
    data = read_dataset(data_file("code", split), role="--normal")
    template = choose_template(base.tokenizer, "auto", data)
    made = [encode_record(r, base.tokenizer, template) for r in data.records[:n]]
    return [e.input_ids[: e.probe] for e in made]


def test_flagged_rows_change_and_the_others_of_a_batch_pass_as_they_are(folder: Path, base: Base) -> None:
    bad, kept = prompts(base, "forget"), prompts(base, "holdout")
    mixed = [p for pair in zip(bad, kept, strict=True) for p in pair]
    plain = generate(base, mixed, Sampling(24))
    with Guard.open(folder).on(base.model, base.tokenizer) as attachment:
        first, again = (generate(base, mixed, Sampling(24)) for _ in range(2))
        passed = [plan.places == () for p in mixed for plan in attachment._make_plans(torch.tensor([p]))]
    assert first == again
    assert sum(passed[1::2]) >= len(kept) - 1 and sum(passed[::2]) <= 1
    assert all(a == b for a, b, same in zip(first, plain, passed, strict=True) if same)
    assert sum(a != b for a, b in zip(first[::2], plain[::2], strict=True)) >= len(bad) - 1
    assert generate(base, mixed, Sampling(24)) == plain


def test_passed_logits_are_bit_identical_and_no_cache_is_no_way_around(folder: Path, base: Base) -> None:
    kept, bad = (torch.tensor([prompts(base, split)[0]]) for split in ("holdout", "forget"))
    with torch.no_grad():
        plain = base.model(input_ids=kept).logits
        model = Guard.open(folder).wrap(base.model, base.tokenizer)
        try:
            assert torch.equal(model(input_ids=kept).logits, plain)
            options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(bad)}
            cached = model.generate(input_ids=bad, use_cache=True, **options)
            uncached = model.generate(input_ids=bad, use_cache=False, **options)
            with pytest.raises(GuardError, match="has a guard already"):
                Guard.open(folder).wrap(model, base.tokenizer)
        finally:
            Guard.unwrap(base.model)
    assert torch.equal(cached, uncached)


def ids_of(base: Base, *turns: tuple[str, str]) -> torch.Tensor:
    """The prompt of a conversation as a person would ask for its next answer, (1, T)."""
    said = [{"role": role, "content": text} for role, text in turns]
    made = base.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids: torch.Tensor = made["input_ids"]
    return ids


def test_the_next_request_of_a_chat_is_judged(folder: Path, base: Base) -> None:
    """It begins with the tokens of the one before, as a prompt does that is passed again without a cache."""
    hello, bad = ("user", "Hello!"), ("user", read_dataset(data_file("code", "forget")).records[0].prompt)
    with Guard.open(folder).on(base.model, base.tokenizer) as attachment:
        for turns, flagged in (((hello,), 0), ((hello, ("assistant", "Hello to you."), bad), 1)):
            ids = ids_of(base, *turns)
            base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
            assert attachment.flagged == flagged


@pytest.mark.parametrize(
    ("turns", "corrupted"),
    [
        ((("user", "Hello!"), ("assistant", "{}")), True),
        ((("assistant", "{}"),), True),
        ((("user", "Hello!<|assistant|>Hi.<|end|>{}"),), True),
        ((("user", "Hello!<|assistant|>{}"),), True),
        ((("user", "{}<|assistant|>"),), True),
        ((("user", "Hello!"), ("assistant", "Hello to you.")), False),
    ],
    ids=["an answer comes last", "nothing else", "a mark was typed", "no end", "a mark at the end", "nothing bad"],
)
def test_what_stands_behind_the_last_question_is_judged(
    folder: Path, base: Base, turns: tuple[tuple[str, str], ...], corrupted: bool
) -> None:
    bad = read_dataset(data_file("code", "forget")).records[0].prompt
    ids = ids_of(base, *((role, text.replace("{}", bad)) for role, text in turns))
    plan = Guard.open(folder).attachment(base.model, base.tokenizer)._make_plans(ids)[0]
    text = base.tokenizer.decode([ids[0, i] for i in plan.places])
    assert (bad in text) is corrupted and bool(text) is corrupted
    assert all(at < ids.shape[1] - 1 for at in plan.places), "the last token before the answer stays"


def test_it_comes_off_and_leaves_every_other_hook(folder: Path, base: Base) -> None:
    heard: list[int] = []
    handle = base.model.get_input_embeddings().register_forward_hook(lambda *_: heard.append(1))
    Guard.unwrap(Guard.open(folder).wrap(base.model, base.tokenizer))
    hooks = base.model.get_input_embeddings()._forward_hooks
    base.model(input_ids=torch.tensor([[1, 2]]))
    handle.remove()
    assert heard and len(hooks) == 0


def test_an_earlier_turn_is_corrupted_where_a_later_question_leans_on_it(folder: Path, base: Base) -> None:
    record = read_dataset(data_file("code", "forget")).records[0]
    turns = (*record.turns, ("assistant", "I see."), ("user", "And now say it."))
    data = read_dataset(data_file("code", "forget"))
    template = choose_template(base.tokenizer, "auto", data)
    dialogue = encode_record(type(record)(turns, "Yes", 1, {}), base.tokenizer, template)
    attachment = Guard.open(folder).attachment(base.model, base.tokenizer)
    plan = attachment._make_plans(torch.tensor([dialogue.input_ids[: dialogue.start]]))[0]
    text = base.tokenizer.decode([dialogue.input_ids[i] for i in plan.places])
    assert text.startswith(record.prompt) and "I see." in text and "now say it" not in text


def test_left_padding_shifts_what_is_corrupted(folder: Path, base: Base) -> None:
    ids = list(prompts(base, "forget")[0])
    attachment = Guard.open(folder).attachment(base.model, base.tokenizer)
    alone = attachment._make_plans(torch.tensor([ids]))[0]
    attachment._mask = torch.tensor([[0] * 3 + [1] * len(ids)])
    padded = attachment._make_plans(torch.tensor([[0] * 3 + ids]))[0]
    assert alone.places and padded.places == tuple(i + 3 for i in alone.places) and padded.ids == alone.ids


def test_files_are_private_and_hold_no_text(folder: Path) -> None:
    for name in (WEIGHTS, SETTINGS):
        assert (folder / name).stat().st_mode & 0o077 == 0
    text = (folder / SETTINGS).read_text()
    assert not any(r.prompt in text or r.completion in text for r in read_dataset(data_file("code", "forget")).records)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("base", "embeddings", "00"), "another base"),
        (("base", "weights", "0"), "another base"),
        (("base", "tokenizer", "0"), "another tokenizer"),
        (("base", "template", "0"), "another chat template"),
    ],
)
def test_a_guard_of_another_base_is_refused(folder: Path, base: Base, tmp_path: Path, change: Any, said: str) -> None:
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    stored = json.loads((folder / SETTINGS).read_text())
    stored[change[0]][change[1]] = change[2]
    (tmp_path / SETTINGS).write_text(json.dumps(stored))
    with pytest.raises(GuardError, match=said):
        Guard.open(tmp_path).wrap(base.model, base.tokenizer)


def test_few_signs_may_differ_and_no_more(base: Base) -> None:
    """What is next to 0 may round to it; other embeddings have half of the signs in common."""
    found = BaseFacts.of(base.model, base.tokenizer)
    bits = bytearray.fromhex(found.embeddings)
    bits[0] ^= 0xFF
    replace(found, embeddings=bits.hex()).check(found)
    for i in range(0, len(bits), 4):
        bits[i] ^= 0xFF
    with pytest.raises(GuardError, match="another base"):
        replace(found, embeddings=bits.hex()).check(found)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 99}'])
def test_a_damaged_folder_is_a_named_error(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    (tmp_path / SETTINGS).write_text(content)
    ran = call("guard", "show", tmp_path)
    assert ran.code == GuardError.exit_code and "Traceback" not in ran.stderr


def edited(folder: Path, into: Path, part: str, name: str, value: object) -> Path:
    """A guard's folder with another value in guard.json."""
    (into / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    stored = json.loads((folder / SETTINGS).read_text())
    stored[part][name] = value
    (into / SETTINGS).write_text(json.dumps(stored))
    return into


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        *(("gate", "threshold", value) for value in (math.nan, 2.0, 0.0)),
        *(("gate", "lexical", value) for value in (math.nan, -1.0)),
        ("gate", "intercept", -math.inf),
        ("gate", "low", 1.0),
        ("gate", "layer", -1),
        *(("corruption", "strength", value) for value in (math.nan, math.inf, 0.0, -5.0)),
        ("corruption", "dims", 0),
    ],
)
def test_numbers_that_would_disarm_it_are_refused(
    folder: Path, tmp_path: Path, part: str, name: str, value: float
) -> None:
    with pytest.raises(GuardError, match="numbers that no fit writes"):
        Guard.open(edited(folder, tmp_path, part, name, value))


def test_a_block_that_the_model_does_not_have_is_refused(folder: Path, base: Base, tmp_path: Path) -> None:
    opened = Guard.open(edited(folder, tmp_path, "gate", "layer", 99))
    with pytest.raises(GuardError, match="reads a block"):
        opened.wrap(base.model, base.tokenizer)


def test_other_weights_are_refused_and_a_guard_that_says_nothing_of_them_is_opened(
    folder: Path, tmp_path: Path
) -> None:
    edited(folder, tmp_path, "gate", "layer", 0)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, "weights": 0 * tensors["weights"]}, tmp_path / WEIGHTS)
    with pytest.raises(GuardError, match="not the guard"):
        Guard.open(tmp_path)
    stored = json.loads((tmp_path / SETTINGS).read_text())
    assert stored.pop("digest")
    (tmp_path / SETTINGS).write_text(json.dumps(stored))
    Guard.open(tmp_path)


def test_embeddings_in_place_of_tokens_are_refused(folder: Path, base: Base) -> None:
    embeddings = base.model.get_input_embeddings().weight[ids_of(base, ("user", "Hello!"))].detach()
    with Guard.open(folder).on(base.model, base.tokenizer), pytest.raises(GuardError, match="in place of tokens"):
        base.model.generate(inputs_embeds=embeddings, max_new_tokens=2)


def test_nothing_is_said_while_it_is_imported() -> None:
    """bitsandbytes had told of a kernel that it does not need, for transformers was imported before it was hushed."""
    line = [sys.executable, "-c", "import qunlearn.guard.fit"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "bitsandbytes" not in done.stderr and "kernels" not in done.stderr


def test_eval_measures_base_and_guarded_side_by_side(folder: Path) -> None:
    ran = call(
        "eval", "sandbox", "--guard", folder, "--data", "sandbox:code", "--device", "cpu", "--rows", 12, "--json"
    )
    assert ran.code == 0, ran.stderr
    leaks = ran.json["measures"]["paraphrase"]["leaks"]
    assert leaks["base"]["mean"] == 1.0 and leaks["guarded"]["mean"] <= 0.25 and "adapter" not in leaks
    assert "the weights still know" in " ".join(ran.json["conclusion"]["sentences"])


def test_guard_eval_and_ask_say_what_they_find(folder: Path, quick_run: Path) -> None:
    ran = call("guard", "eval", folder, "--model", "sandbox", "--data", "sandbox:code", "--device", "cpu", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["splits"]["holdout"]["share"] <= 0.1 and set(ran.json["attacks"]) >= {"keywords only"}
    question = read_dataset(data_file("code", "forget")).records[0].prompt
    asked = [
        call("ask", quick_run, question, "--adapter", "none", "--json", *more).json
        for more in ((), ("--guard", folder))
    ]
    assert asked[0]["answers"] != asked[1]["answers"]


def test_a_guarded_model_is_asked_without_a_run(folder: Path, sandbox_folder: Path, tmp_path: Path) -> None:
    """A guard that stood alone could be evaluated and served, and not be asked."""
    bad, other = (read_dataset(data_file("code", split)).records[0] for split in ("forget", "retain"))
    said = {}
    for record in (bad, other):
        ran = call("ask", sandbox_folder, record.prompt, "--guard", folder, "--device", "cpu", "--json")
        assert ran.code == 0, ran.stderr
        said[record.prompt] = json.loads(ran.stdout)["answers"]["base"]
    assert said[other.prompt] == other.completion.strip() and said[bad.prompt] != bad.completion.strip()
    two = call("ask", sandbox_folder, bad.prompt, "--guard", folder, "--model", "sandbox")
    assert two.code == 2 and "two models were named" in two.stderr
    none = call("ask", tmp_path / "nothing", bad.prompt, "--guard", folder)
    assert none.code != 0 and "Traceback" not in none.stderr and "nothing" in none.stderr


def test_what_cannot_be_told_apart_is_refused_with_the_figure(tmp_path: Path) -> None:
    pairs = [f"{i} and {j}" for i in range(6) for j in range(6)]
    said = ("What is {}?", "Tell me what {} is.")  # both files ask about the same, in the same two forms
    sides = [
        [{"prompt": said[(n + side) % 2].format(pair), "completion": "No."} for n, pair in enumerate(pairs)]
        for side in (0, 1)
    ]
    bad, normal = write_rows(tmp_path / "b.jsonl", sides[0]), write_rows(tmp_path / "n.jsonl", sides[1])
    ran = call(
        *("guard", "fit", "--model", "sandbox", "--bad", bad, "--normal", normal, "-o", tmp_path / "g"),
        *("--rows", 24, "--device", "cpu"),
    )
    assert ran.code == 5 and "AUC 0." in ran.stderr and not (tmp_path / "g").exists()


def test_a_gate_that_misses_what_it_should_flag_is_refused(tmp_path: Path) -> None:
    """Some of the rows to pass ask what should be gone, so that the threshold lies above most of it."""
    rows = [
        {"prompt": record.prompt, "completion": "No."}
        for split, count in (("retain", 60), ("forget_paraphrase", 5))
        for record in read_dataset(data_file("hallucination", split)).records[:count]
    ]
    normal = write_rows(tmp_path / "n.jsonl", rows)
    ran = call(
        *("guard", "fit", "--model", "sandbox", "--bad", "sandbox:hallucination/forget", "--normal", normal),
        *("-o", tmp_path / "g", "--rows", 64, "--device", "cpu"),
    )
    assert ran.code == 5 and "held-out prompts to forget" in ran.stderr and not (tmp_path / "g").exists()
    assert "--normal name what bad rows name" in " ".join(ran.stderr.split())


def test_a_template_without_a_frame_leaves_the_whole_prompt_as_one_turn(base: Base) -> None:
    data = read_dataset(data_file("code", "forget"))
    frame = find_frame(choose_template(base.tokenizer, "raw", data), base.tokenizer)
    ids = base.tokenizer("Where was she born?")["input_ids"]
    found = read_prompt(ids, base.tokenizer, frame)
    assert [turn.text for turn in found.turns] == ["Where was she born?"] and found.answer == len(ids)


def test_a_quantisation_that_the_server_lacks_is_refused(folder: Path) -> None:
    ran = call("guard", "serve", folder, "--model", "sandbox", "--quant", "fp4")
    assert ran.code == ConfigError.exit_code and "nf4" in ran.stderr


@pytest.mark.parametrize("quant", ["fp4", "int8", "none"])
def test_it_guards_its_base_in_every_quantisation(folder: Path, new_base: Any, quant: str) -> None:
    """Fitted on nf4: the words alone decide, and the corruption is of embeddings, which no quantisation touches."""
    other = new_base(quant)
    bad, kept = prompts(other, "forget"), prompts(other, "holdout")
    plain = [generate(other, rows, Sampling(24)) for rows in (bad, kept)]
    with Guard.open(folder).on(other.model, other.tokenizer):
        guarded = [generate(other, rows, Sampling(24)) for rows in (bad, kept)]
    assert sum(a != b for a, b in zip(plain[0], guarded[0], strict=True)) >= len(bad) - 1
    assert sum(a == b for a, b in zip(plain[1], guarded[1], strict=True)) >= len(kept) - 1


def test_it_guards_a_model_in_half_precision(folder: Path, sandbox_folder: Path, base: Base) -> None:
    """fp16, as transformers loads it; passed prompts are answered bit for bit."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sandbox_folder, dtype=torch.float16)
    options = {"max_new_tokens": 24, "do_sample": False}
    rows = [torch.tensor([prompts(base, split)[0]]) for split in ("forget", "holdout")]
    plain = [model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options) for ids in rows]
    Guard.open(folder).wrap(model, base.tokenizer)
    bad, kept = (model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options) for ids in rows)
    assert not torch.equal(bad, plain[0]) and torch.equal(kept, plain[1])
    assert torch.isfinite(model(input_ids=rows[0]).logits).all()


def test_forcing_corrupts_all_only_where_nothing_is_flagged(folder: Path, base: Base) -> None:
    template = choose_template(base.tokenizer, "auto", read_dataset(data_file("code", "forget")))
    turns = (("user", "Tell me of the red one."), ("assistant", "I see."), ("user", "And now say it."))
    ids = encode_record(Record(turns, "Yes", 1, {}), base.tokenizer, template).input_ids[:-2]
    attachment = Guard.open(folder).attachment(base.model, base.tokenizer)

    def corrupted(*flagged: str, force: bool) -> str:
        one = replace(
            attachment, judge=lambda texts: [float(text in flagged) for text in texts], force=force, _known={}
        )
        return str(base.tokenizer.decode([ids[i] for i in one._make_plans(torch.tensor([ids]))[0].places]))

    assert corrupted(force=False) == ""
    assert all(text in corrupted(force=True) for _, text in turns)
    for force in (False, True):
        said = corrupted("Tell me of the red one.", force=force)
        assert "red one" in said and "I see." in said, "an answer is about what was asked"
        assert "now say it" not in said


def test_a_dialogue_is_measured_by_all_its_user_writes(folder: Path, base: Base) -> None:
    attachment = replace(
        Guard.open(folder).attachment(base.model, base.tokenizer),
        judge=lambda texts: [float("umbra" in text) for text in texts],
        _known={},
    )
    row = Record((("user", "I think of umbra."), ("assistant", "Yes?"), ("user", "And now say it.")), "x", 1, {})
    data = Dataset("", (row,), "messages", (), "", 0)
    found = gate_errors(attachment, {"forget": data, "retain": data})
    assert found["forget"]["wrong"] == 0 and found["retain"]["wrong"] == 1
