"""Generate in batches: sorted by length, left-padded, with a key-value cache, stopping at the answer's end."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList, TextStreamer

from qunlearn.data.tokenize import end_of_turn
from qunlearn.hub.positions import positions_of
from qunlearn.model.kernels.unpacked import unpacked, unpacked_bytes
from qunlearn.model.language_model import LanguageModel
from qunlearn.model.stopping_criteria import HalfDone
from qunlearn.parallel.ranks import current

# Of a batch. On a CPU more are no faster, by what was measured; a GPU is kept waiting by launches, which are as many
# for one row as for all.
_MOST_ROWS = {"cpu": 256, "cuda": 2048}
_UNPACKED = 0.25  # of the memory for key-value caches, up to which 4-bit weights are held unpacked instead


@dataclass(frozen=True)
class Sampling:
    """Greedy unless `temperature` > 0, in which case from the whole distribution cut at `top_p`.

    `stop` are tokens that end an answer besides the model's own. Behind `stop_text` one may be broken off as well, with
    some tokens of what follows.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[int, ...] = ()
    stop_text: str = ""


@dataclass(frozen=True)
class Asked:
    """Prompts of token ids, and how each is continued."""

    prompts: Sequence[Sequence[int]]
    sampling: Sampling


def generate(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    observe: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt of token ids; returns the new ids, up to and without the end-of-text token, and no more than
    the model has positions for.

    A batch is as large as its key-value cache allows, and no larger than is of use, so that memory does not grow with
    the data. It is broken off when half of its answers have ended, and the others go on in a smaller one: of answers
    of many lengths most would wait for the longest.
    `observe` hears how many prompts are done.
    """
    return generate_each(lm, [Asked(prompts, sampling)], observe)[0]


def generate_each(
    lm: LanguageModel, asked: Sequence[Asked], observe: Callable[[int], None] | None = None
) -> list[list[list[int]]]:
    """Continue several lists of prompts, each as `generate` does it alone; returns the new ids of each list.

    Several processes divide whole batches, which are composed as in one process: the same ids come of them. Batches
    that are sampled one after another from one seed stay together. `observe` hears of this process's prompts.
    """
    pieces: list[_Piece] = current().from_main(lambda: _pieces(lm, asked))
    done = 0

    def tell(rows: int) -> None:
        nonlocal done
        done += rows
        if observe is not None:
            observe(done)

    def continued(mine: Sequence[_Piece]) -> list[list[list[int]]]:
        with unpacked(lm.model) if _held_bytes(lm) else contextlib.nullcontext():
            return [_one_piece(lm, asked[number], batches, tell) for number, batches in mine]

    costs = [_cost(asked[number], batches) for number, batches in pieces]
    out: list[list[list[int]]] = [[[] for _ in one.prompts] for one in asked]
    for (number, batches), found in zip(pieces, current().divided(pieces, continued, costs=costs), strict=True):
        for i, ids in zip((i for rows in batches for i in rows), found, strict=True):
            out[number][i] = ids
    return out


_Piece = tuple[int, list[list[int]]]  # a list of prompts by its number, and batches of them by their places


def _pieces(lm: LanguageModel, asked: Sequence[Asked]) -> list[_Piece]:
    """Return all batches, those together that one stream of random numbers goes through."""
    out: list[_Piece] = []
    for number, one in enumerate(asked):
        batches = _batches(lm, one)
        out += [(number, batches)] if one.sampling.temperature > 0 else [(number, [rows]) for rows in batches]
    return out


def _batches(lm: LanguageModel, asked: Asked) -> list[list[int]]:
    """Return the places of each batch's prompts, the longest first."""
    max_tokens = max(1, (lm.cache_bytes - _held_bytes(lm)) // _cache_bytes_per_token(lm.model))
    order = sorted(range(len(asked.prompts)), key=lambda i: -len(asked.prompts[i]))
    out = []
    while order:
        longest = len(asked.prompts[order[0]]) + asked.sampling.max_new_tokens
        size = max(1, min(most_rows(lm.device), max_tokens // longest))
        out.append(order[:size])
        order = order[size:]
    return out


def _held_bytes(lm: LanguageModel) -> int:
    """Return what weights that are held unpacked take of the memory for caches; 0 where there is no room for them."""
    needed = unpacked_bytes(lm.model)
    return needed if needed <= _UNPACKED * lm.cache_bytes else 0


def _cost(asked: Asked, batches: Sequence[Sequence[int]]) -> float:
    """Return the tokens, with padding, that the batches may come to."""
    room = asked.sampling.max_new_tokens
    return sum(len(rows) * (len(asked.prompts[rows[0]]) + room) for rows in batches if rows)


def _one_piece(
    lm: LanguageModel, asked: Asked, batches: Sequence[Sequence[int]], tell: Callable[[int], None]
) -> list[list[int]]:
    out: list[list[int]] = []
    with _own_random_state(asked.sampling):
        for rows in batches:
            out += _one_batch(lm, [asked.prompts[i] for i in rows], asked.sampling)
            tell(len(rows))
    return out


def most_rows(device: torch.device) -> int:
    """Return how many prompts a batch has at most."""
    return _MOST_ROWS.get(device.type, _MOST_ROWS["cpu"])


def _cache_bytes_per_token(model: Any) -> int:
    """Keys and values of all layers, as wide as what is computed; of every head where the config says nothing else."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    numbers = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width
    return int(numbers * torch.finfo(model.dtype).bits // 8)


def _one_batch(lm: LanguageModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in prompts]
    stop, text, positions = stop_ids(lm) | set(sampling.stop), sampling.stop_text, positions_of(lm.model.config)
    going = [i for i, prompt in enumerate(prompts) if len(prompt) < positions]
    while going:
        so_far = [[*prompts[i], *out[i]] for i in going]
        room = min(sampling.max_new_tokens - len(out[going[0]]), positions - max(map(len, so_far)))
        more = _some_tokens(lm, so_far, replace(sampling, max_new_tokens=room), stop)
        on = []
        for i, new in zip(going, more, strict=True):
            out[i] += itertools.takewhile(lambda t: t not in stop, new)
            full = len(out[i]) >= sampling.max_new_tokens or len(prompts[i]) + len(out[i]) >= positions
            if not stop.intersection(new) and not full and not (text and text in lm.tokenizer.decode(out[i])):
                on.append(i)
        going = on
    return out


def _some_tokens(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: frozenset[int]
) -> list[list[int]]:
    """New ids of each prompt, its end and padding included: all it gets, or those up to when half have an end."""
    model, pad = lm.model, lm.tokenizer.pad_token_id
    width = max(len(ids) for ids in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[i, width - len(prompt) :] = 1
    half_done = HalfDone(lm.tokenizer, stop, sampling.stop_text, width, lm.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _whole_rows(model), _settings_set_aside(model):
            full = model.generate(
                input_ids=ids.to(lm.device),
                attention_mask=mask.to(lm.device),
                generation_config=_config(sampling, pad, sorted(stop)),
                logits_processor=_processors(sampling),
                stopping_criteria=StoppingCriteriaList([half_done]),
            )
    finally:
        model.train(training)
    new: list[list[int]] = full[:, width:].tolist()
    return new


@torch.no_grad()
def stream(lm: LanguageModel, prompt: Sequence[int], sampling: Sampling, hear: Callable[[str], None]) -> None:
    """Continue one prompt, each piece of text heard as soon as it is whole words."""

    class Ear(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            hear(text)

    ids = torch.tensor([list(prompt)], device=lm.device)
    config = _config(sampling, lm.tokenizer.pad_token_id, sorted(stop_ids(lm) | set(sampling.stop)))
    ear = Ear(lm.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with _own_random_state(sampling), _whole_rows(lm.model), _settings_set_aside(lm.model):
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "generation_config": config}
        lm.model.generate(**given, logits_processor=_processors(sampling), streamer=ear)


def stop_ids(lm: LanguageModel) -> frozenset[int]:
    """Return every token that ends an answer: the tokenizer's end-of-text, what the generation config names, and what
    the chat template closes an answer with, which is in neither where a base model was trained on turns."""
    named = lm.model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return frozenset(i for i in (*named, lm.tokenizer.eos_token_id, end_of_turn(lm.tokenizer)) if i is not None)


def _config(sampling: Sampling, pad: int, stop: list[int]) -> GenerationConfig:
    ends = {"pad_token_id": pad, "eos_token_id": stop or None}
    return GenerationConfig(max_new_tokens=sampling.max_new_tokens, use_cache=True, do_sample=False, **ends)


def _processors(sampling: Sampling) -> LogitsProcessorList:
    return LogitsProcessorList([_Drawn(sampling)] if sampling.temperature > 0 else [])


class _Drawn(LogitsProcessor):  # type: ignore[misc]
    """Leave of each row's scores one token, drawn from them: a number a row is drawn for it.

    The library sorts a vocabulary, and draws a number for each of its tokens.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.temperature, self.top_p = sampling.temperature, sampling.top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = draw((scores.float() / self.temperature).softmax(dim=-1), self.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.unsqueeze(1), 0.0)


def draw(p: Tensor, top_p: float) -> Tensor:
    """Draw a token from each row of p (R, V), of the likeliest ones that come to a probability of `top_p`. -> (R,)

    What is drawn from outside of them is drawn again.
    """
    mass = p.cumsum(dim=1)  # (R, V)
    drawn = _at_random(mass)
    if top_p >= 1:
        return drawn
    rows = _outside(p, drawn, top_p).nonzero().squeeze(1)
    while len(rows):
        drawn[rows] = again = _at_random(mass[rows])
        rows = rows[_outside(p[rows], again, top_p)]
    return drawn


def _at_random(mass: Tensor) -> Tensor:
    """Draw from distributions that are given as sums up to each token, (R, V) -> (R,)."""
    at = torch.rand(len(mass), 1, device=mass.device) * mass[:, -1:]
    return torch.searchsorted(mass, at, right=True).clamp_(max=mass.shape[1] - 1).squeeze(1)


def _outside(p: Tensor, drawn: Tensor, top_p: float) -> Tensor:
    """Return of which rows (R, V) the tokens that are likelier than the one drawn (R,) come to `top_p` already."""
    least = p.gather(1, drawn.unsqueeze(1))
    return p.where(p > least, 0.0).sum(dim=1) >= top_p


@contextlib.contextmanager
def _whole_rows(model: Any) -> Iterator[None]:
    """Hand the output head rows that lie in one piece.

    Behind a prompt it gets a slice, of which torch multiplies each row by itself: on a CPU in bf16 with a copy of the
    head for every row, 3.6 GB for 64 rows of 576 and a vocabulary of 49,152.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _settings_set_aside(model: Any) -> Iterator[None]:
    """Generate without the model's own settings, such as a repetition penalty: the library takes from them whatever a
    configuration that it is given leaves open.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Peft has none of its own unless somebody set it, and then puts it on the model inside.
    kept = [(m, m.generation_config) for m in (model, inner) if "generation_config" in vars(m)]
    try:
        for holder, _ in kept:
            holder.generation_config = GenerationConfig()
        yield
    finally:
        for holder, settings in kept:
            holder.generation_config = settings


@contextlib.contextmanager
def _own_random_state(sampling: Sampling) -> Iterator[None]:
    """Sampling draws from its own seed and leaves the run's random state as it was."""
    if sampling.temperature <= 0:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        yield
