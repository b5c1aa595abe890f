"""A prompt's turns are found whatever the template is, and however its control tokens are decoded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from test_template import ZOO
from tokenizers import AddedToken

from qunlearn.data.records import Record, asking
from qunlearn.data.template import Template, render
from qunlearn.data.tokenize import encode_record, open_prompt
from qunlearn.guard.turns import Frame, find_frame, read_prompt
from qunlearn.model.load import load_tokenizer

CHAT = Template("chat", "chat", "", "")
DIALOGUE = (("user", "Hi there"), ("assistant", "Hello you!"), ("user", "Who wrote it?"))
MARKUP = re.compile(r"<[^<>]+>|\[/?INST\]")


@pytest.fixture
def tokenizer(sandbox_folder: Path) -> Any:
    return load_tokenizer(sandbox_folder)


@pytest.mark.parametrize("markup", ["text", "control tokens", "control tokens that swallow what follows"])
@pytest.mark.parametrize("name", ZOO)
def test_the_turns_of_a_prompt_are_those_of_its_row(name: str, markup: str, tokenizer: Any) -> None:
    tokenizer.chat_template = ZOO[name]
    if markup != "text":
        found = MARKUP.findall("".join(render(Record(DIALOGUE, "Ada.", 0, {}), CHAT, tokenizer)))
        swallows = markup != "control tokens"
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False, rstrip=swallows) for t in found])
    frame = find_frame(CHAT, tokenizer)
    for turns in (asking("Who wrote The Keeper of Low Water?"), DIALOGUE):
        record = Record(turns, "Ada.", 0, {})
        ids = open_prompt(record, tokenizer, CHAT)
        prompt = read_prompt(ids, tokenizer, frame)
        assert [turn.text for turn in prompt.turns if turn.asked] == [text for role, text in turns if role == "user"]
        assert len(prompt.turns) == len(turns), "nothing of the template's own is judged"
        assert prompt.answer == len(ids)
        answered = read_prompt(encode_record(record, tokenizer, CHAT).input_ids, tokenizer, frame)
        assert answered == prompt, "an answer that is being written is no part of it"


def test_a_header_with_the_date_is_the_templates_own_on_another_day(tokenizer: Any) -> None:
    header = "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {day}\n\n<|eot_id|>"
    dated = ZOO["llama 3"].replace("<|begin_of_text|>", f"<|begin_of_text|>{header}")
    tokenizer.chat_template = dated.replace("{day}", "09 Nov 2026")
    frame = find_frame(CHAT, tokenizer)
    assert Frame.of(frame.as_dict()) == frame
    for day in ("09 Nov 2026", "10 Nov 2026", "31 December 2027"):
        tokenizer.chat_template = dated.replace("{day}", day)
        ids = open_prompt(Record(DIALOGUE, "Ada.", 0, {}), tokenizer, CHAT)
        said = [turn.text for turn in read_prompt(ids, tokenizer, frame).turns]
        assert len(said) == 3 and said[0] == "Hi there"
    tokenizer.chat_template = dated.replace("{day}", "of the flood")
    ids = open_prompt(Record(DIALOGUE, "Ada.", 0, {}), tokenizer, CHAT)
    assert "of the flood" in read_prompt(ids, tokenizer, frame).turns[0].text
