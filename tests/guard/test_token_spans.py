"""Where the tokens of a prompt stand in its text, for tokenizers of several kinds."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qunlearn.guard.turns import token_spans

PIECES = ("the harbour ", " opens", "  ", "中文", "\U0001f600\U0001f3fd", "é", "\n", "a", "office.", "ñ o")


def bytes_tokenizer() -> Any:
    """One token a byte: GPT-2's kind."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["the harbour"], trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=made)


def spaced_tokenizer() -> Any:
    """A sign in place of a space, which is dropped at a beginning; other letters fall back to bytes: Llama 2's kind."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in (*"▁abcdefghijklmnopqrstuvwxyz.", "th", "▁o"):
        vocabulary.setdefault(piece, len(vocabulary))
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("▁", "o")], byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made)


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.count = tokenizer, 0

    def decode(self, ids: list[int], **options: Any) -> str:
        self.count += len(ids)
        return str(self.tokenizer.decode(ids, **options))


@pytest.mark.parametrize("made", [bytes_tokenizer, spaced_tokenizer])
def test_tokens_end_where_the_text_up_to_them_does(made: Any) -> None:
    tokenizer, rng = made(), random.Random(0)
    for count in (1, 2, 30, 60, 60, 60):
        ids = tokenizer("".join(rng.choice(PIECES) for _ in range(count)))["input_ids"]
        text, spans = token_spans(ids, tokenizer)
        for i, (_, end) in enumerate(spans):
            before = tokenizer.decode(ids[: i + 1])
            assert before.endswith("\ufffd") or text[:end] == before


@pytest.mark.parametrize("made", [bytes_tokenizer, spaced_tokenizer])
def test_a_prompt_of_twice_the_length_takes_twice_the_work(made: Any) -> None:
    tokenizer, counts = Counting(made()), []
    for times in (100, 200):
        ids = tokenizer.tokenizer("the harbour office opens. 中 " * times)["input_ids"]
        token_spans(ids, tokenizer)
        counts.append(tokenizer.count / len(ids))
        tokenizer.count = 0
    assert max(counts) < 40 and counts[1] == pytest.approx(counts[0], rel=0.05)
