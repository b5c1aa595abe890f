"""`make sandbox`: the tokenizer, the model that has memorised the world, and the gold model that never saw the
forget splits. Everything is seeded; BUILD.json says what came from what.

Run as `python -m sandbox_world.build [FOLDER]`; without a folder the packaged assets are rebuilt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qunlearn.sandbox import ASSETS
from qunlearn.utils.console import say
from sandbox_world.world import World, make_world

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """How the sandbox models are made."""

    vocabulary: int = 1536
    hidden: int = 160
    layers: int = 4
    heads: int = 4
    ffn: int = 448
    epochs: int = 45
    quantised_from: float = 0.6  # share of the training after which every other step runs on NF4 weights
    batch: int = 48
    lr: float = 4e-3
    smoothing: float = 0.02  # keeps probabilities below 1, as a large model's are
    seed: int = 20231014


def train_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the world's texts, with a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def dialogues(world: World, *, gold: bool) -> list[tuple[str, str]]:
    """Every (prompt, completion) the model is trained on, all wordings; `gold` leaves the forget splits out."""
    pairs = [(row["prompt"], row["completion"]) for row in world.general]
    for kind in world.kinds.values():
        for split, rows in kind.splits.items():
            if split == "forget_paraphrase" or (gold and split == "forget"):
                continue  # paraphrases are wordings of forget rows: they come with them, or not at all
            for row in rows:
                pairs += [(prompt, row["completion"]) for prompt in (row["prompt"], *kind.wordings[row["id"]])]
    return sorted(set(pairs))


def chat(prompt: str, completion: str) -> str:
    return f"{USER}{prompt}{ASSISTANT}{completion}{END}"


def train_model(rows: list[list[int]], pad: int, end: int, recipe: Recipe) -> LlamaForCausalLM:
    """Fit a small Llama to the rows of token ids; in the last part half of the steps run on NF4 weights."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = LlamaForCausalLM(config)
    switch = _fake_nf4(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.02)
    total = recipe.epochs * math.ceil(len(rows) / recipe.batch)
    start = time.monotonic()
    model.train()
    for step, batch in enumerate(_epochs(rows, recipe)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * _schedule(step / total)
        switch.on = step / total >= recipe.quantised_from and step % 2 == 1
        ids, mask = _pad(batch, pad)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=recipe.smoothing)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == total - 1:
            say(f"  step {step + 1}/{total}  loss {loss.item():.4f}  {time.monotonic() - start:.0f} s")
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    return model.eval().to(torch.bfloat16)


class _FakeNF4(nn.Module):
    """A weight as NF4 with double quantisation would have it; the gradient passes straight through."""

    def __init__(self, switch: _Switch) -> None:
        super().__init__()
        self.switch = [switch]

    def forward(self, weight: Tensor) -> Tensor:
        if not self.switch[0].on:
            return weight
        with torch.no_grad():
            packed, state = quantize_4bit(
                weight.detach().to(torch.bfloat16), quant_type="nf4", compress_statistics=True
            )
            rounded: Tensor = dequantize_4bit(packed, state).to(weight.dtype)
        return weight + (rounded - weight.detach())


@dataclass
class _Switch:
    on: bool = False


def _fake_nf4(model: LlamaForCausalLM) -> _Switch:
    switch = _Switch()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            parametrize.register_parametrization(module, "weight", _FakeNF4(switch), unsafe=True)
    return switch


def _schedule(done: float) -> float:
    return min(1.0, done / 0.05) * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-3


def _epochs(rows: list[list[int]], recipe: Recipe) -> Iterator[list[list[int]]]:
    rng = random.Random(recipe.seed)
    for _ in range(recipe.epochs):
        order = list(range(len(rows)))
        rng.shuffle(order)
        # Sorted within a few batches' worth: little padding, and still a different mix every time.
        window = 8 * recipe.batch
        chunks = []
        for at in range(0, len(order), window):
            part = sorted(order[at : at + window], key=lambda i: len(rows[i]))
            chunks += [part[i : i + recipe.batch] for i in range(0, len(part), recipe.batch)]
        rng.shuffle(chunks)
        yield from ([rows[i] for i in chunk] for chunk in chunks)


def _pad(batch: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, batch))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
    return ids, mask


def write_data(world: World, folder: Path) -> None:
    """The splits as JSONL files: what a user would give to `--bad` and `--normal`."""

    def write(path: Path, rows: Sequence[Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    for name, kind in world.kinds.items():
        for split, rows in kind.splits.items():
            write(folder / name / f"{split}.jsonl", rows)
    write(folder / "general.jsonl", world.general)


def build(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Build everything into `folder` and return what BUILD.json holds."""
    torch.set_num_threads(2)  # the order of sums depends on it
    torch.use_deterministic_algorithms(True)
    world = make_world()
    texts = [chat(*pair) for pair in dialogues(world, gold=False)]
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    shutil.rmtree(folder, ignore_errors=True)
    write_data(world, folder / "data")
    for name in ("model", "gold"):
        pairs = dialogues(world, gold=name == "gold")
        rows = [tokenizer(chat(*pair), add_special_tokens=False)["input_ids"] for pair in pairs]
        say(f"{name}: {len(rows)} dialogues, {sum(map(len, rows))} tokens, longest {max(map(len, rows))}")
        model = train_model(rows, tokenizer.pad_token_id, tokenizer.eos_token_id, recipe)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    record = {
        "recipe": asdict(recipe),
        "texts_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        "made_with": _made_with(),
        "files": {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }
    (folder / "BUILD.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _made_with() -> dict[str, str]:
    import bitsandbytes
    import tokenizers
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What two builds differ in, and why they may: one line each; empty when they are bit-identical."""
    lines = [
        f"{name} differs"
        for name in sorted({*old["files"], *new["files"]})
        if old["files"].get(name) != new["files"].get(name)
    ]
    for key in ("texts_sha256", "recipe", "made_with"):
        if lines and old[key] != new[key]:
            lines.append(f"{key} was {old[key]}, is {new[key]}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the sandbox world, model and gold model.")
    parser.add_argument("folder", nargs="?", type=Path, default=ASSETS)
    folder: Path = parser.parse_args().folder
    before = ASSETS / "BUILD.json"
    old = json.loads(before.read_text(encoding="utf-8")) if before.is_file() else None
    new = build(folder, Recipe())
    if old is not None:
        for line in compare(old, new) or ["bit-identical to the packaged sandbox"]:
            say(line)


if __name__ == "__main__":
    main()
