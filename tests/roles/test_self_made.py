"""Prompts that the base writes itself: where they end, and which are no prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from qunlearn.data.records import read_dataset
from qunlearn.data.template import choose_template
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.load import Base
from qunlearn.roles import self_made
from qunlearn.roles.self_made import Wanted
from qunlearn.sandbox import data_file

BAD = read_dataset(data_file("harm", "forget"))
TEMPLATE = "{% for m in messages %}{{ ('<|user|>' if m.role == 'user' else 'Q') + m.content }}{% endfor %}"
WANTED = Wanted(8, 0.4, 24, 0, 16)


@pytest.fixture(scope="module")
def base(new_base: Callable[..., Base]) -> Base:
    return new_base("none")


def test_a_control_token_ends_a_prompt_and_is_in_none(base: Base, with_control: Callable[..., Any]) -> None:
    """Whatever it is called: beside the end of text few of them have a name."""
    closing, other = base.tokenizer.convert_tokens_to_ids(["Q", "Z"])
    tokenizer = with_control(closing, other)
    tokenizer.chat_template = TEMPLATE
    template = choose_template(tokenizer, "auto", BAD)
    draw = self_made._prompt_draw(replace(base, tokenizer=tokenizer), BAD, template, WANTED, 0)
    assert draw.asked.sampling.stop == (closing,)
    said = [tokenizer(text)["input_ids"] for text in (" old Finch?", " old Z Finch?")]
    read = draw.read([said[i % 2] for i in range(len(draw.asked.prompts))])
    assert len(read) == len(draw.asked.prompts) / 2
    assert all(one.text.endswith("old Finch?") for one in read)


def test_a_text_ends_a_prompt_too(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 2 closes a prompt with "[/INST]", which are four tokens: all that came behind it was for nothing."""
    template = choose_template(base.tokenizer, "USER: {prompt} ASSISTANT: ", BAD)
    draw = self_made._prompt_draw(base, BAD, template, WANTED, 0)
    assert (draw.asked.sampling.stop, draw.asked.sampling.stop_text) == ((), "ASSISTANT:")
    whole = generate(base, draw.asked.prompts, Sampling(24))
    texts = [base.tokenizer.decode(ids) for ids in whole]
    end = texts[0][4:9]
    steps: list[int] = []
    theirs = base.model.generate

    def counted(**given: Any) -> Any:
        out = theirs(**given)
        steps.append((out.shape[1] - given["input_ids"].shape[1]) * len(out))
        return out

    monkeypatch.setattr(base.model, "generate", counted)
    for few in (draw.asked.prompts[:1], [*draw.asked.prompts, *draw.asked.prompts]):
        steps.clear()
        generate(base, few, Sampling(24))
        before = sum(steps)
        steps.clear()
        found = [base.tokenizer.decode(ids) for ids in generate(base, few, Sampling(24, stop_text=end))]
        assert sum(steps) < before
        for text, said in zip(found, (texts * 2)[: len(few)], strict=True):
            assert said.startswith(text) and text.split(end)[0] == said.split(end)[0]
