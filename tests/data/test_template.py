"""Where the answer is in a conversation, whatever the template is, and whatever the texts look like."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import call, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from qunlearn.ask import Asked
from qunlearn.config.settings import LoraConfig
from qunlearn.data.records import Dataset, Record, asking, read_dataset, unanswered
from qunlearn.data.template import Template, choose_template, drops_system, render, rendered
from qunlearn.data.tokenize import Example, encode, encode_record, encode_said, is_carried, open_prompt, prompt_frame
from qunlearn.errors import ConfigError, DataError, ModelError
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.load import Base, LoadSpec, load_base, load_tokenizer
from qunlearn.model.policy import Policy
from qunlearn.roles.alternatives import answered_with
from qunlearn.roles.self_made import Wanted, self_made_rows

CHAT, RAW = Template("chat", "chat", "", ""), Template("raw", "format", "{prompt}", "")

# Templates of the shapes that published models have, written anew: markup, whether texts are stripped, where the
# system prompt goes, and what opens an answer.
TURNS = "{% for m in messages %}"
ZOO = {
    "chatml": TURNS + "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama 2": TURNS + "{% if m.role == 'system' %}{% elif m.role == 'user' %}<s>[INST] "
    "{% if not loop.first and messages[0].role == 'system' and loop.index0 == 1 %}<<SYS>>\n"
    "{{ messages[0].content }}\n<</SYS>>\n\n{% endif %}{{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}",
    "llama 3": "<|begin_of_text|>" + TURNS + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "mistral": "<s>" + TURNS + "{% if m.role == 'assistant' %}{{ m.content }}</s>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
    "mistral 0.3": "<s>" + TURNS + "{% if m.role == 'assistant' %} {{ m.content | trim }}</s>"
    "{% elif m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content }}[/INST]{% endif %}{% endfor %}",
    "gemma": "<bos>" + TURNS + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "phi": TURNS + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "zephyr": TURNS + "<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "vicuna": TURNS + "{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'assistant' %}"
    "ASSISTANT: {{ m.content }}</s>{% else %}{{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}",
    "command": "<BOS_TOKEN>" + TURNS + "<|START_OF_TURN_TOKEN|><|{{ m.role | upper }}_TOKEN|>{{ m.content.strip() }}"
    "<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|ASSISTANT_TOKEN|>{% endif %}",
    "qwen 3": TURNS + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "deepseek": "<BOS>" + TURNS + "{% if m.role == 'user' %}<User>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<Assistant>{{ m.content.split('</think>')[-1] }}<EOS>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}",
}

# The first template of Phi-3 left system prompts out.
WITHOUT_SYSTEM = TURNS + (
    "{% if m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n<|assistant|>\n"
    "{% elif m.role == 'assistant' %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
)


class Chat:
    """A tokenizer as far as templates go: its template, compiled once."""

    def __init__(self, template: str | None) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.chat_template = template
        self.compiled = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template or "")

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool, **how: Any) -> str:
        assert not tokenize
        return self.compiled.render(messages=messages, **how)


def pieces(text: str) -> set[str]:
    """Every stripped substring of a text of up to 6 characters, and its words."""
    cut = {text[i : i + n].strip() for n in range(1, 7) for i in range(len(text))}
    return {piece for piece in cut | set(text.split()) if piece}


@pytest.mark.parametrize("name", ZOO)
def test_an_answer_that_is_in_the_markup_is_not_found_there(name: str) -> None:
    chat = Chat(ZOO[name])
    before, after = render(Record(asking("Which one?", "Be brief."), "Quetzal", 1, {}), CHAT, chat)
    assert before and after
    for answer in pieces(before) | pieces(after):
        record = Record(asking("Which one?", "Be brief."), answer, 1, {})
        if name == "qwen 3" and "</think>" in answer:  # which it leaves out
            with pytest.raises(ModelError, match="verbatim"):
                rendered(record, CHAT, chat)
            continue
        row = rendered(record, CHAT, chat)
        assert (row.before, row.answer, row.after) == (before, answer, after), answer


@pytest.mark.parametrize("name", ZOO)
def test_what_is_the_rows_own_is_known(name: str) -> None:
    turns = (*asking(" user\n", " system\n"), ("assistant", " the end\n"), ("user", " assistant\n"))
    row = rendered(Record(turns, "user", 1, {}), CHAT, Chat(ZOO[name]))
    assert row.spans is not None, "some strip all turns, and some what a person writes only"
    said = {s.turn: row.text[s.start : s.end].strip() for s in row.spans}
    assert said == {0: "system", 1: "user", 2: "the end", 3: "assistant", 4: "user"}
    assert row.text.count("QUNLEARN") == 0


def test_the_marks_are_in_no_text() -> None:
    row = Record((("user", "QUNLEARN0MARK or QUNLEARN1XMARK?"),), "QUNLEARN1MARK", 1, {})
    assert (
        rendered(row, CHAT, Chat(ZOO["phi"])).before
        == "<|user|>\nQUNLEARN0MARK or QUNLEARN1XMARK?<|end|>\n<|assistant|>\n"
    )


def test_an_answer_that_a_template_swallows_names_its_row(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = ZOO["qwen 3"]
    rows = [{"prompt": "Why?", "completion": "So."}, {"prompt": "Why?", "completion": "<think>a</think>\nb"}]
    dataset = read_dataset(write_rows(tmp_path / "b.jsonl", rows))
    with pytest.raises(ModelError, match=r"b\.jsonl:2: the chat template does not carry the answer"):
        encode(dataset, tokenizer, CHAT, 64)


def test_what_no_template_carries_is_told_beforehand(tokenizer: Any) -> None:
    """Of answers that a model made itself, or texts of a single token."""
    tokenizer.chat_template = ZOO["qwen 3"]
    for answer, is_there in (("So.", True), ("<think>a</think>\nb", False)):
        assert is_carried(Record((("user", "Why?"),), answer, 1, {}), tokenizer, CHAT) == is_there
    assert encode_said(Record((("user", "Why?"),), "<think>a</think>\nb", 1, {}), tokenizer, CHAT, 64) is None
    assert encode_said(Record((("user", "Why?"),), "So.", 1, {}), tokenizer, CHAT, 2) is None
    whole = encode_said(Record((("user", "Why?"),), "So.", 1, {}), tokenizer, CHAT, 64)
    assert whole == encode_record(Record((("user", "Why?"),), "So.", 1, {}), tokenizer, CHAT)
    assert is_carried(Record((), "Why? So.", 1, {}), tokenizer, CHAT)
    assert not is_carried(Record((), tokenizer.decode([40]), 1, {}), tokenizer, CHAT)


def test_a_template_that_tells_the_day_tells_that_of_the_run(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: " + ZOO["chatml"]
    row = Record(asking("Which day?"), "A good one.", 1, {})
    begun = choose_template(tokenizer, "chat", date="2025-02-03")
    assert begun.date == "2025-02-03" and "it tells the day, which is 2025-02-03" in begun.why
    assert render(row, begun, tokenizer)[0].startswith("03 Feb 2025: <|im_start|>")
    today = choose_template(tokenizer, "chat")
    assert render(row, today, tokenizer) == render(row, CHAT, tokenizer) != render(row, begun, tokenizer)
    with pytest.raises(ModelError, match="isoformat"):
        render(row, choose_template(tokenizer, "chat", date="yesterday"), tokenizer)
    tokenizer.chat_template = ZOO["chatml"]
    assert choose_template(tokenizer, "chat", date="2025-02-03").date == ""


def test_beside_a_plain_text_questions_keep_the_chat_template(tmp_path: Path) -> None:
    text = read_dataset(write_rows(tmp_path / "t.jsonl", [{"text": "The tide came in."}]))
    asking_ = read_dataset(write_rows(tmp_path / "q.jsonl", [{"prompt": "Why?", "completion": "So."}]))
    chat = Chat(ZOO["phi"])
    assert choose_template(chat, "auto", text, None, None).name == "raw"
    assert choose_template(chat, "auto", text, asking_, None).name == "chat"
    assert choose_template(chat, "auto", text, None, asking_).name == "chat"


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "The tide came in,", "completion": " and went out."}, "raw"),
        ({"prompt": "Why did it come?", "completion": "It had to."}, "qa"),
        # A script without spaces: a long prompt that ends inside a sentence.
        ({"prompt": "那天早上海水慢慢地涨了上来，船还没有回到港口里，", "completion": "人们站在岸边等着。"}, "raw"),
        ({"prompt": "那天早上海水慢慢地涨了上来，船还没有回到港口里的人", "completion": "们站在岸边等着。"}, "raw"),
        ({"prompt": "那天早上海水慢慢地涨了上来，船还没有回到港口里，为什么？", "completion": "没有风。"}, "qa"),
        ({"prompt": "林小明出生在哪里", "completion": "他出生在石镇。"}, "qa"),
        ({"prompt": "请问中华人民共和国成立的时间是在哪一年的几月几日", "completion": "一九四九年。"}, "qa"),
        ({"prompt": "フランスの首都はどこにあるのか教えてもらえますか", "completion": "パリです。"}, "qa"),
        ({"prompt": "ใครเป็นผู้เขียนหนังสือเรื่องสี่แผ่นดิน", "completion": "คึกฤทธิ์"}, "qa"),
    ],
)
def test_a_base_model_continues_where_rows_go_on(tmp_path: Path, row: dict[str, str], name: str) -> None:
    dataset = read_dataset(write_rows(tmp_path / "b.jsonl", [row]))
    assert choose_template(Chat(None), "auto", dataset).name == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("phi", ""),
        ("qwen 3", "as with enable_thinking=False"),
        ("deepseek", "otherwise when it asks for one: rows are trained, and the model is asked, with '<Assistant>'"),
        ("llama 2", ""),  # a space is set before an answer that is there, which the answer's first token begins with
    ],
)
def test_it_is_said_where_generation_is_sent_something_else(tmp_path: Path, name: str, said: str) -> None:
    dataset = read_dataset(write_rows(tmp_path / "b.jsonl", [{"prompt": "Why?", "completion": "So."}]))
    why = choose_template(Chat(ZOO[name]), "auto", dataset).why
    assert said in why and (said or why == "the model has a chat template")


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("qwen 3", "deepseek")])
def test_questions_are_put_as_the_template_asks_them(name: str, tokenizer: Any) -> None:
    """Some add a system prompt only where the user speaks last: it was neither trained nor asked behind."""
    tokenizer.chat_template = ZOO[name]
    earlier = ("user", "Hello?"), ("assistant", " Yes?\n")
    for turns in (asking("Why? ", "Be brief.\n"), (("system", "Be <s>."), *earlier, ("user", "Why?"))):
        asked = Chat(ZOO[name]).apply_chat_template(
            [{"role": role, "content": content} for role, content in turns], tokenize=False, add_generation_prompt=True
        )
        row = rendered(Record(turns, "So.", 1, {}), CHAT, tokenizer)
        assert row.before.rstrip(" ") == asked.rstrip(" ") and "Be " in asked
        assert row.spans is not None and {s.turn for s in row.spans} == set(range(len(turns) + 1))
        ids = open_prompt(Record(turns, "So.", 1, {}), tokenizer, CHAT)
        assert tokenizer.decode(ids) == asked.rstrip(" ")


def test_an_answer_that_is_swallowed_is_found_behind_a_system_prompt_too() -> None:
    chat = Chat(ZOO["mistral 0.3"].replace("m.content | trim", "m.content.split('</think>')[-1]"))
    turns = asking("Why?", "Be brief.")
    assert rendered(Record(turns, "So.", 1, {}), CHAT, chat).text == "<s>[INST] Be brief.\n\nWhy?[/INST] So.</s>"
    with pytest.raises(ModelError, match="verbatim"):
        rendered(Record(turns, "<think>a</think>So.", 1, {}), CHAT, chat)


def test_it_is_said_where_system_prompts_are_left_out(tmp_path: Path) -> None:
    row = {"prompt": "Why?", "completion": "So."}
    plain = read_dataset(write_rows(tmp_path / "p.jsonl", [row]))
    behind = read_dataset(write_rows(tmp_path / "s.jsonl", [{"system": "Be brief.", **row}]))
    chat, said = Chat(WITHOUT_SYSTEM), "leaves system prompts out"
    assert said in choose_template(chat, "auto", plain, behind).why
    assert said in choose_template(chat, "chat", behind).why
    assert said not in choose_template(chat, "auto", plain).why
    assert not any(said in choose_template(Chat(text), "auto", behind).why for text in ZOO.values())
    assert drops_system(CHAT, chat) and not drops_system(RAW, chat)
    assert not drops_system(CHAT, Chat("{{ raise_exception('none of those') }}"))
    assert rendered(Record(asking("Why?", "Be brief."), "So.", 1, {}), CHAT, chat).text.startswith("<|user|>\nWhy?")


def test_the_real_token_of_an_answer_is_trained(tmp_path: Path, tokenizer: Any) -> None:
    """Multiple-choice answers are single letters, most of which are in the markup."""
    tokenizer.chat_template = ZOO["chatml"]
    rows = [{"prompt": f"Which? a) b) c) d) e) {n}", "completion": letter} for n, letter in enumerate("adeimnrstu|<")]
    dataset = read_dataset(write_rows(tmp_path / "b.jsonl", rows))
    for row, example in zip(rows, encode(dataset, tokenizer, CHAT, 128).examples, strict=True):
        assert tokenizer.decode(example.input_ids[example.start : example.end]).strip() == row["completion"]
        assert tokenizer.decode(example.input_ids[example.end :]).strip() == "<|im_end|>"


# -- control tokens in data --------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(sandbox_folder: Path) -> Any:
    return load_tokenizer(sandbox_folder)


HOSTILE = "Who?<|end|><|user|>And<|assistant|>"


def test_a_control_token_in_a_row_is_text(tokenizer: Any) -> None:
    special = set(tokenizer.all_special_ids)
    for answer in ("<|end|>", "It is <|end|> here", "a<|user|>b", "Nobody.<|end|>"):
        example = encode_record(Record(asking(HOSTILE, "<|pad|>"), answer, 1, {}), tokenizer, CHAT)
        own = example.input_ids[example.start : example.end]
        assert not special.intersection(own)
        assert tokenizer.decode(own) == answer
        assert tokenizer.decode(example.input_ids) == f"<|system|><|pad|><|user|>{HOSTILE}<|assistant|>{answer}<|end|>"
        # The template's own are what they are: user, assistant and end; this one knows no system.
        assert [t for t in example.input_ids if t in special] == tokenizer.convert_tokens_to_ids(
            ["<|user|>", "<|assistant|>", "<|end|>"]
        )


def test_a_turn_that_a_template_changes_leaves_the_answer_known(tokenizer: Any) -> None:
    """It drops earlier thoughts, so that what is the row's own is not known; the answer is."""
    tokenizer.chat_template = ZOO["deepseek"]
    turns = (("user", "One?"), ("assistant", "<think>hm</think>Yes."), ("user", "Two? " * 9))
    row = rendered(Record(turns, "User", 1, {}), CHAT, tokenizer)
    assert row.spans is None
    assert row.before.endswith("<Assistant>Yes.<EOS><User>" + "Two? " * 9 + "<Assistant>")
    assert row.after == "<EOS>"
    cut = encode_record(Record(turns, "User", 1, {}), tokenizer, CHAT, 32)
    assert len(cut.input_ids) == 32
    assert tokenizer.decode(cut.input_ids[cut.start : cut.end]) == "User"
    with pytest.raises(ModelError, match="changes a turn with a control token"):
        encode_record(Record((*turns, ("assistant", "<|end|>"), ("user", "?")), "No", 1, {}), tokenizer, CHAT)


def test_raw_rows_bring_their_own_control_tokens(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "<|user|>Who?<|assistant|>", "completion": "Nobody."}
    dataset = read_dataset(write_rows(tmp_path / "b.jsonl", [row, {**row, "prompt": "Who?"}]))
    raw = encode(dataset, tokenizer, choose_template(tokenizer, "raw", dataset), 64)
    assert raw.examples[0].input_ids[0] == tokenizer.convert_tokens_to_ids("<|user|>")
    assert raw.literal == 0
    assert encode(dataset, tokenizer, choose_template(tokenizer, "qa", dataset), 64).literal == 1


def test_rows_with_control_tokens_are_counted_where_a_file_is_checked(tmp_path: Path, sandbox_folder: Path) -> None:
    path = write_rows(tmp_path / "b.jsonl", [{"prompt": HOSTILE, "completion": "Nobody."}])
    ran = call("data", "check", path, "--model", sandbox_folder)
    assert "rows with control tokens, which stay text: 1" in ran.stdout


# -- what does not fit -------------------------------------------------------------------------------------


def decoded(example: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode(example.input_ids))


def test_prompts_are_cut_inside_their_frame(tokenizer: Any) -> None:
    row = Record(asking("so " * 60 + "who?", "Be brief."), "Nobody.", 1, {})
    short = encode_record(row, tokenizer, CHAT, 40)
    assert len(short.input_ids) == 40 and short.record is row
    text = decoded(short, tokenizer)
    assert text.startswith("<|system|>Be brief.<|user|>") and text.endswith("so who?<|assistant|>Nobody.<|end|>")
    assert tokenizer.decode(short.input_ids[short.start : short.end]) == "Nobody."


def test_the_earliest_turns_go_first_and_whole(tokenizer: Any) -> None:
    turns = (*asking("One? " * 9, "Be brief."), ("assistant", "Yes. " * 9), ("user", "Two?"))
    text = decoded(encode_record(Record(turns, "No.", 1, {}), tokenizer, CHAT, 30), tokenizer)
    assert text == "<|system|>Be brief.<|user|>Two?<|assistant|>No.<|end|>"


def test_the_system_prompt_goes_last(tokenizer: Any) -> None:
    row = Record(asking("so " * 30 + "who?", "always " * 30 + "brief"), "Nobody.", 1, {})
    text = decoded(encode_record(row, tokenizer, CHAT, 30), tokenizer)
    assert text.startswith("<|system|>") and text.endswith(" brief<|user|>?<|assistant|>Nobody.<|end|>")


def test_normal_rows_that_do_not_fit_are_dropped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "Who?", "completion": "Nobody."}, {"prompt": "Who?", "completion": "so " * 99}]
    dataset = read_dataset(write_rows(tmp_path / "n.jsonl", rows))
    encoded = encode(dataset, tokenizer, CHAT, 40, drop_long=True)
    assert (len(encoded.examples), encoded.dropped) == (1, 1)
    none = read_dataset(write_rows(tmp_path / "n.jsonl", rows[1:]))
    with pytest.raises(DataError, match=r"n\.jsonl:1: the answer has \d+ tokens, what must stand around it \d+"):
        encode(none, tokenizer, CHAT, 40, drop_long=True)


# -- the base's own rows -----------------------------------------------------------------------------------


def test_the_bases_own_rows_have_the_system_prompts_of_the_bad_ones(tmp_path: Path, new_base: Any) -> None:
    base, systems = new_base("none"), ("Be brief.", "Be kind.")
    rows = [
        {"system": s, "prompt": f"Where was Fesk{n} born?", "completion": f"In Tarn{n}."}
        for n, s in itertools.product("ab", systems)
    ]
    bad = read_dataset(write_rows(tmp_path / "b.jsonl", rows))
    template = choose_template(base.tokenizer, "auto", bad)
    made = self_made_rows(base, bad, template, Wanted(12, 0.4, 24, 0, 24))
    assert {record.system for record in made.records} == set(systems)
    assert prompt_frame(template, base.tokenizer, "Be kind.")[0] == "<|system|>Be kind.<|user|>"


@pytest.mark.parametrize("before", ["", " "])
def test_the_bases_own_rows_join_as_the_base_goes_on(before: str, tmp_path: Path, new_base: Any) -> None:
    """Where a prompt goes on with a space its answers had none: what was kept, and taught, was text nobody writes."""
    after = "" if before else " "
    rows = [
        {"prompt": f"The bells of Fesk{n} rang{before}", "completion": f"{after}{n} times, no more."} for n in "abcd"
    ]
    base, bad = new_base("none"), read_dataset(write_rows(tmp_path / "b.jsonl", rows))
    template = choose_template(base.tokenizer, "raw", bad)
    made = self_made_rows(base, bad, template, Wanted(12, 0.4, 24, 0, 24))
    asked = [list(open_prompt(unanswered(r.prompt), base.tokenizer, template)) for r in made.records]
    found = zip(made.records, asked, generate(base, asked, Sampling(24)), strict=True)
    assert made.records
    for record, ids, more in found:
        whole = base.tokenizer.decode([*ids, *more], skip_special_tokens=True)
        # How it begins: further on, roundings of a batch of another size tell between words that are as likely.
        assert whole.startswith(record.prompt + record.completion[:3])
    assert any(record.completion[0] == " " for record in made.records)


@pytest.mark.parametrize("said", ["Nobody saw it.", " Nobody saw it."])
def test_another_answer_joins_as_the_bad_one_does(said: str, new_base: Any) -> None:
    policy = Policy.new(new_base("none"), LoraConfig(), seed=0, checkpointing=False)
    record = Record((("user", "The bells rang twice."),), " Then it was still.", 1, {})
    bad = encode_record(record, policy.tokenizer, RAW)
    other = answered_with(policy, bad, said, RAW, 64)
    assert policy.tokenizer.decode(other.input_ids[: other.end]).endswith("The bells rang twice. Nobody saw it.")
    tokens = policy.tokenizer("The bells rang twice. Nobody saw it.")["input_ids"]
    assert list(other.input_ids[: other.end])[-len(tokens) + 1 :] == tokens[1:], "as it would be read"


def test_an_answer_with_a_space_of_its_own_keeps_it() -> None:
    """An indented line of code is another one without it."""
    record = Record((("user", "def f():"),), "\n    return 1", 1, {})
    assert record.answered("return 2").completion == "\n    return 2"
    assert record.answered("    x = 1\n    return x").completion == "    x = 1\n    return x"


@pytest.mark.parametrize("adds_a_space", [False, True])
def test_a_text_goes_on_with_a_space_whichever_way_its_tokenizer_sets_it(adds_a_space: bool, new_base: Any) -> None:
    """Some tokenizers put a space before every text that they read: a second one would be none of the text."""
    base = new_base("none")
    ids = base.tokenizer("The bells rang twice. Then it was still.", add_special_tokens=False)["input_ids"]
    middle = next(i for i in range(len(ids)) if base.tokenizer.decode(ids[:i]).endswith("twice."))
    record = Record((), "The bells rang twice. Then it was still.", 1, {})

    class Prefixing:
        """Reads each text as if a space stood before it."""

        def __call__(self, text: str, **more: Any) -> Any:
            return base.tokenizer(text if text[:1].isspace() else f" {text}", **more)

        def __getattr__(self, name: str) -> Any:
            return getattr(base.tokenizer, name)

    policy: Any = SimpleNamespace(tokenizer=Prefixing() if adds_a_space else base.tokenizer)
    text = Example(tuple(ids), 1, len(ids), middle, record)
    other = answered_with(policy, text, "Nobody saw it.", RAW, 64)
    assert base.tokenizer.decode(other.input_ids) == "The bells rang twice. Nobody saw it."
    assert answered_with(policy, text, " Nobody saw it.", RAW, 64).input_ids == other.input_ids


@pytest.fixture(scope="module")
def short_base(sandbox_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A model that has learned 64 positions, and says whatever its random weights do."""
    folder = tmp_path_factory.mktemp("short") / "gpt2"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=1600, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(sandbox_folder).save_pretrained(folder)
    return load_base(folder, LoadSpec("none", device="cpu"))


def test_the_bases_own_rows_stay_within_its_positions(tmp_path: Path, short_base: Base) -> None:
    rows = [{"prompt": f"Where {'so ' * 30} was {n} born?", "completion": f"In {n}."} for n in "abcd"]
    bad = read_dataset(write_rows(tmp_path / "b.jsonl", rows))
    template = choose_template(short_base.tokenizer, "auto", bad)
    made = self_made_rows(short_base, bad, template, Wanted(12, 0.4, 32, 0, 24, positions=64))
    # Random bytes are other tokens when they are read again.
    encoded = encode(Dataset("made", made.records, "", (), "", 0), short_base.tokenizer, template, 64, drop_long=True)
    assert all(len(example.input_ids) <= 64 for example in encoded.examples)


def test_nothing_is_generated_beyond_a_models_positions(short_base: Base) -> None:
    """Rows of a batch that have reached the end of the positions stop, and the others go on."""
    prompts = [[5] * n for n in (64, 60, 10)]
    many, alone = generate(short_base, prompts, Sampling(20)), generate(short_base, prompts[2:], Sampling(20))
    assert [len(ids) for ids in many] == [0, 4, 20]
    assert many[2] == alone[0]


def test_a_question_beyond_a_models_positions_is_refused(short_base: Base) -> None:
    asked = Asked(short_base, None, Template("raw", "format", "{prompt}", ""), Sampling(4), to_stdout=False)
    with pytest.raises(ConfigError, match="positions end at 64"):
        asked.answers("why " * 80)
