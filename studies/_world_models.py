"""The models of a world: a tokenizer, the base that has memorised all, and the gold model that never saw the bad.

Both are trained with one recipe; in the last part half of the steps run on NF4 weights, as in the sandbox, so that
what was memorised is still there when the base is loaded in NF4.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, fields
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from _world_run import SPLITS, untouched
from _world_text import make_files, write_files
from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import choose_template, encode
from qunlearn.model.quiet import quiet_transformers
from qunlearn.utils.console import say
from sandbox_world.build import ASSISTANT, CHAT_TEMPLATE, END, PAD, USER, Recipe, train_model, train_tokenizer
from worlds import World

SHAPES = {  # hidden, layers, heads, feed-forward
    "1M": (160, 4, 4, 448),
    "8M": (320, 6, 5, 896),
    "30M": (512, 8, 8, 1536),
}
_BYTES = 256 + 4
_LONGEST_TOKENS = 512
_SPEC, _ATTEMPT = "spec.json", "attempt.txt"
_ATTEMPTS = 3
MEMORISED = 95.0  # exact match in percent, in NF4


def build_world(world: World) -> None:
    """Write the world's files and train its two models, unless they are there and of the same spec."""
    folder, stamp = world.folder, _stamp(world)
    spec = folder / _SPEC
    if not spec.is_file() or json.loads(spec.read_text(encoding="utf-8"))["stamp"] != stamp:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_files(make_files(world), folder)
        spec.write_text(json.dumps({"stamp": stamp, **asdict(world)}, indent=2) + "\n", encoding="utf-8")
    tokenizer = make_tokenizer(world)
    attempt = _attempt(world)
    while not (folder / "model" / "config.json").is_file():
        _train(world, "model", tokenizer, attempt)
        attempt += 1
        if attempt < _ATTEMPTS and (poor := poorly_known(untouched(world, "model"))):
            say(f"{world.name}: {', '.join(poor)} not memorised; once more, longer and at a lower rate")
            shutil.rmtree(folder / "model")
    if not (folder / "gold" / "config.json").is_file():
        _train(world, "gold", tokenizer, _attempt(world))


def _attempt(world: World) -> int:
    """Return which attempt the base stands for: the gold model is trained in the same way."""
    path = world.folder / "model" / _ATTEMPT
    return int(path.read_text(encoding="utf-8")) if path.is_file() else 0


def poorly_known(base: dict[str, Any]) -> list[str]:
    """Return the splits of which a base knows too little to be a world's."""
    return [split for split in SPLITS if base.get(split, 100.0) < MEMORISED]


def _stamp(world: World) -> str:
    """Hash what a world is made from: its texts, and the settings that are not the usual ones."""
    usual = {field.name: field.default for field in fields(world)}
    unheard = ("slow", "split", "name")
    settings = {k: v for k, v in asdict(world).items() if k not in unheard and v != usual[k]}
    content = json.dumps([settings, SHAPES[world.size], make_files(world)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Return a tokenizer over all of the world's texts: byte-level pieces, bare bytes, or whole words."""
    texts = [_plain(row) for rows in make_files(world).values() for row in rows]
    if world.tokenizer == "word":
        tokenizer = _word_tokenizer(texts, world.vocabulary)
    else:
        tokenizer = train_tokenizer(texts, _BYTES if world.tokenizer == "byte" else world.vocabulary)
    tokenizer.chat_template = CHAT_TEMPLATE if world.chat else None
    tokenizer.model_max_length = _LONGEST_TOKENS
    return tokenizer


def _plain(row: dict[str, Any]) -> str:
    if "messages" in row:
        return "\n".join(str(message["content"]) for message in row["messages"])
    return str(row.get("text") or f"### Question: {row['prompt']}\n ### Answer: {row['completion']}")


def _word_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Pieces that begin with the space before a word, most of them whole words."""
    core = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.decoder = decoders.Metaspace(prepend_scheme="never")
    special = [PAD, END, USER, ASSISTANT, "<unk>"]
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token="<unk>",
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )


def _train(world: World, name: str, tokenizer: PreTrainedTokenizerFast, attempt: int) -> None:
    """Train one of the two models and put it in its place, whole or not at all."""
    torch.set_num_threads(1)  # the order of sums depends on it
    torch.use_deterministic_algorithms(True)
    splits = ["retain", "holdout", "siblings", "general", "more", "normal"]
    rows = token_rows(world, splits if name == "gold" else ["forget", "paraphrase", *splits], tokenizer)
    tokens = sum(map(len, rows))
    say(f"{world.name}/{name}: {len(rows)} rows, {tokens} tokens, longest {max(map(len, rows))}")
    hidden, layers, heads, ffn = SHAPES[world.size]
    recipe = Recipe(
        vocabulary=len(tokenizer),
        hidden=hidden,
        layers=layers,
        heads=heads,
        ffn=ffn,
        epochs=round(world.epochs * 1.5**attempt),
        lr=world.lr * 0.7**attempt,
        smoothing=world.smoothing,
        seed=world.seed,
        batch=32,
    )
    model = train_model(rows, tokenizer.pad_token_id, tokenizer.eos_token_id, recipe)
    temporary, final = world.folder / f".{name}", world.folder / name
    with quiet_transformers():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    (temporary / _ATTEMPT).write_text(str(attempt), encoding="utf-8")
    (world.folder / f"{name}.figures.json").unlink(missing_ok=True)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    torch.use_deterministic_algorithms(False)


def token_rows(world: World, splits: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Return every row's token ids as `qunlearn forget` makes them, with an end, as often as an epoch shows it."""
    found: dict[tuple[int, ...], int] = {}
    for split in splits:
        path, general = world.file(split), split == "general" or (split, world.normal) == ("normal", "general")
        times = world.general_times if general else 1
        if path.is_file():
            dataset = read_dataset(path)
            template = choose_template(tokenizer, "auto", dataset)
            for example in encode(dataset, tokenizer, template, _LONGEST_TOKENS).examples:
                ids = example.input_ids
                closed = ids if ids[-1] == tokenizer.eos_token_id else (*ids, tokenizer.eos_token_id)
                found[closed] = times
    return [list(ids) for ids, times in found.items() for _ in range(times)]
