"""Where the answer begins and ends, in every template; windows; what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qunlearn.data.batch import ALL, ANSWER, CLOSED, collate, single_batches
from qunlearn.data.records import Record, read_dataset, unanswered
from qunlearn.data.row_shapes import asking
from qunlearn.data.tokenize import (
    Template,
    choose_template,
    encode,
    encode_record,
    encode_text,
    open_prompt,
    prompt_frame,
    vocabulary_words,
)
from qunlearn.errors import ConfigError, DataError, ModelError
from qunlearn.model.load import load_tokenizer

PAIR = {"prompt": "Where was Orlan Fesk born?", "completion": "In Tarn, by the sea."}


@pytest.fixture(scope="module")
def tokenizer(sandbox_folder: Path) -> Any:
    return load_tokenizer(sandbox_folder)


@pytest.mark.parametrize("asked", ["auto", "chat", "qa", "raw", "Q: {prompt}\\nA: "])
def test_the_answer_is_exactly_supervised(tmp_path: Path, tokenizer: Any, asked: str) -> None:
    dataset = read_dataset(write_rows(tmp_path / "b.jsonl", [PAIR]))
    template = choose_template(tokenizer, asked, dataset)
    (example,) = encode(dataset, tokenizer, template, 128).examples
    answer = tokenizer.decode(example.input_ids[example.start : example.end])
    assert answer.strip() == PAIR["completion"]
    assert tokenizer.decode(example.input_ids[example.end :]) == tokenizer.eos_token
    before = tokenizer.decode(example.input_ids[: example.start])
    assert PAIR["prompt"] in before
    assert PAIR["completion"] not in before


def test_earlier_turns_are_context_only(tmp_path: Path, tokenizer: Any) -> None:
    turns = ["Hello.", "Good day.", "Who?", "Good day again."]
    messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
    dataset = read_dataset(write_rows(tmp_path / "b.jsonl", [{"messages": messages}]))
    (example,) = encode(dataset, tokenizer, choose_template(tokenizer, "auto", dataset), 128).examples
    assert tokenizer.decode(example.input_ids[example.start : example.end]) == "Good day again."


def test_plain_text_is_cut_in_windows_and_wholly_supervised(tmp_path: Path, tokenizer: Any) -> None:
    text = " ".join(f"word{i}" for i in range(60))
    dataset = read_dataset(write_rows(tmp_path / "b.jsonl", [{"text": text}]))
    encoded = encode(dataset, tokenizer, choose_template(tokenizer, "auto", dataset), 32)
    assert encoded.windows == len(encoded.examples) > 2
    first, *later = encoded.examples
    assert tokenizer.decode(first.input_ids) + "".join(tokenizer.decode(e.input_ids[e.start :]) for e in later) == text
    assert first.start == 1 and all(e.start == 8 for e in later)  # a quarter of a window is context of what follows
    assert all(e.end == len(e.input_ids) <= 32 and e.start <= e.probe < e.end for e in encoded.examples)
    assert tokenizer.decode(later[0].input_ids[:8]) == tokenizer.decode(first.input_ids[-8:])
    assert "".join(e.record.completion for e in encoded.examples) == text  # a record a window
    assert {e.record.line for e in encoded.examples} == {1}


@pytest.mark.parametrize("longest", [8, 32, 64])
def test_no_window_is_a_short_rest(tokenizer: Any, longest: int) -> None:
    """Windows are as equal as can be: one token alone has nothing to be predicted from."""
    ids = tokenizer(" the" * 1100, add_special_tokens=False)["input_ids"]
    for tokens in (57, 993, *range(2, 200)):
        found = encode_text(Record((), tokenizer.decode(ids[:tokens]), 1, {}), tokenizer, longest)
        sizes = [len(e.input_ids) - (e.start if i else 0) for i, e in enumerate(found)]
        assert sum(sizes) == tokens and max(sizes) - min(sizes) <= 1
        assert max(len(e.input_ids) for e in found) <= longest and all(example.start < example.end for example in found)


def test_long_prompts_are_cut_from_the_left_and_answers_never(tmp_path: Path, tokenizer: Any) -> None:
    long = {**PAIR, "prompt": "so " * 200 + PAIR["prompt"]}
    dataset = read_dataset(write_rows(tmp_path / "b.jsonl", [long]))
    template = choose_template(tokenizer, "auto", dataset)
    encoded = encode(dataset, tokenizer, template, 40)
    (example,) = encoded.examples
    assert encoded.prompts_cut == 1
    assert len(example.input_ids) == 40
    assert tokenizer.decode(example.input_ids[example.start : example.end]) == PAIR["completion"]
    with pytest.raises(DataError, match=r"b\.jsonl:1: the answer has \d+ tokens"):
        encode(
            read_dataset(write_rows(tmp_path / "b.jsonl", [{**PAIR, "completion": "so " * 99}])),
            tokenizer,
            template,
            40,
        )


def test_template_choices(tmp_path: Path, tokenizer: Any) -> None:
    dataset = read_dataset(write_rows(tmp_path / "b.jsonl", [PAIR]))
    assert choose_template(tokenizer, "auto", dataset).name == "chat"
    plain = load_tokenizer(Path(tokenizer.name_or_path))
    plain.chat_template = None
    assert choose_template(plain, "auto", dataset).name == "qa"
    spaced = read_dataset(write_rows(tmp_path / "c.jsonl", [{"prompt": "Once", "completion": " upon a time"}]))
    assert choose_template(plain, "auto", spaced).name == "raw"
    with pytest.raises(ModelError, match="no chat template"):
        choose_template(plain, "chat", dataset)
    with pytest.raises(ConfigError, match="unknown template"):
        choose_template(plain, "vicuna", dataset)


def test_prompt_frame(tmp_path: Path, tokenizer: Any) -> None:
    dataset = read_dataset(write_rows(tmp_path / "b.jsonl", [PAIR]))
    assert prompt_frame(choose_template(tokenizer, "auto", dataset), tokenizer) == ("<|user|>", "<|assistant|>")


def test_labels_are_the_next_tokens(tmp_path: Path, tokenizer: Any) -> None:
    rows = [PAIR, {"prompt": "Who?", "completion": "Nobody at all."}]
    dataset = read_dataset(write_rows(tmp_path / "b.jsonl", rows))
    examples = encode(dataset, tokenizer, choose_template(tokenizer, "auto", dataset), 64).examples
    for span in (ANSWER, CLOSED, ALL):
        batch = collate(examples, span, tokenizer.pad_token_id)
        expected, owners = [], []
        for row, example in enumerate(examples):
            first, last = span.of(example)
            expected += example.input_ids[first:last]
            owners += [row] * (last - first)
        assert batch.labels.tolist() == expected
        assert batch.rows.tolist() == owners
        assert batch.supervised_tokens == len(expected)
        assert batch.input_ids.roll(-1, 1).flatten()[batch.source].tolist() == expected
        assert batch.tokens == sum(len(e.input_ids) for e in examples)


def test_micro_batches_hold_every_row_once_within_the_budget(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "Who? " * (i + 1), "completion": "Nobody."} for i in range(20)]
    dataset = read_dataset(write_rows(tmp_path / "b.jsonl", rows))
    examples = encode(dataset, tokenizer, choose_template(tokenizer, "auto", dataset), 256).examples
    groups = single_batches(examples, 120)
    assert sorted(i for group in groups for i in group) == list(range(20))
    widths = [max(len(examples[i].input_ids) for i in group) for group in groups]
    assert all(width * len(group) <= 120 or len(group) == 1 for width, group in zip(widths, groups, strict=True))
    assert widths[0] == max(widths)


def test_what_stands_before_an_answer_does_not_hang_on_a_stand_in() -> None:
    """A tokenizer has " ク" as one token and no " T": behind a space of its own the model has never seen an answer."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    names = ("クセト", "ルルオ", "ユキク")
    rows = [Record(asking(f"{name}はどの村?"), f"{name}はマトク村に住んでいます。", 1, {}) for name in names]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    lines = [f"Question: {row.prompt}\nAnswer: {row.completion}" for row in rows]
    made.train_from_iterator(lines * 9, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    template = Template("qa", "format", "Question: {prompt}\nAnswer: ", "")
    for row in rows:
        example = encode_record(row, tokenizer, template)
        stand_in = encode_record(unanswered(row.prompt), tokenizer, template)
        assert stand_in.input_ids[: stand_in.probe] != example.input_ids[: example.probe], "as a stand-in has it"
        asked = open_prompt(unanswered(row.prompt), tokenizer, template)
        assert asked == example.input_ids[: example.probe] == open_prompt(row, tokenizer, template)
        assert tokenizer.decode(asked).endswith("Answer:")


@pytest.mark.parametrize(
    ("splitter", "joiner"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
        (pre_tokenizers.Metaspace(), decoders.Metaspace()),
    ],
    ids=["byte-level", "metaspace"],
)
def test_words_that_a_tokenizer_has_a_token_for(splitter: Any, joiner: Any) -> None:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = splitter, joiner
    lines = ["the Straße will thank the größte mill, unlike Zyvoqxk"] * 9 + ["a Zebqwuk?"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=900, min_frequency=5, initial_alphabet=alphabet))
    known = vocabulary_words(PreTrainedTokenizerFast(tokenizer_object=made))
    assert {"strasse", "will", "thank", "grösste", "mill"} <= known
    assert not {"zebqwuk", "mill,", ""} & known
