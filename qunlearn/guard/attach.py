"""Stand before a model: judge each prompt as it enters, and corrupt what is flagged; the rest passes bit for bit.

Two hooks do it: one in front of the decoder learns where a pass begins, one behind the input embeddings changes rows.
Only a prompt's own pass is touched, never a decoding step. Both handles are kept, so that taking the guard off leaves
every other hook in place.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qunlearn.errors import GuardError
from qunlearn.guard.corrupt import Corruption
from qunlearn.guard.gate import StateReader
from qunlearn.guard.lexicon import Span
from qunlearn.guard.turns import Frame, Prompt, Turn, read_prompt
from qunlearn.model.load import backbone

ALL, TURN, SUBJECT = "all", "turn", "subject"
TOKENS = (ALL, TURN, SUBJECT)
_REMEMBERED = 4096  # texts whose probability is kept: earlier turns come again with every question


@dataclass(frozen=True)
class Plan:
    """What is done to a prompt: the places that are corrupted, and the ids that decide the noise."""

    places: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()


@dataclass
class Attachment:
    """A guard on a model. `judge` gives a text its probability; `force` flags all of a prompt that would pass, for the
    strength search."""

    model: Any
    reader: StateReader
    frame: Frame
    corruption: Corruption
    tokens: str
    threshold: float
    judge: Callable[[Sequence[str]], list[float]]
    telling: Callable[[str], list[Span]] | None = None  # the characters of a turn that betray its subject
    force: bool = False
    flagged: int = 0  # prompts, since it was put on
    _known: dict[bytes, float] = field(default_factory=dict)
    _past: int = 0
    _mask: Tensor | None = None
    _seen: Tensor | None = None
    _whole: bool = False  # whether the pass before was of a whole prompt
    _plans: list[Plan] = field(default_factory=list)
    _planned: Tensor | None = None

    def put_on(self) -> list[Any]:
        """Register both hooks; returns their handles."""
        body = backbone(self.model)
        return [
            body.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.get_input_embeddings().register_forward_hook(self._embedded),
        ]

    def flags(self, dialogues: Sequence[Sequence[str]]) -> int:
        """Return how many dialogues would be corrupted somewhere, each given as what its user writes, turn by turn."""
        joined = [[*turns, " ".join(turns)] if len(turns) > 1 else [*turns] for turns in dialogues]
        known = self._judged([text for texts in joined for text in texts])
        return sum(any(known[text] >= self.threshold for text in texts) for texts in joined)

    # -- the hooks -----------------------------------------------------------------------------------

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not self.reader.reading:
            if kwargs.get("inputs_embeds") is not None:
                message = "embeddings were given in place of tokens, and the gate reads tokens"
                raise GuardError(message, where="guard", hint="pass input_ids")
            cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
            self._past = int(cache.get_seq_length()) if cache is not None else 0
            self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _embedded(self, module: Any, args: Any, out: Tensor) -> Tensor | None:
        if self.reader.reading or not args:
            return None
        ids = args[0].detach().cpu()
        grown = self._seen is not None and self._past == self._seen.shape[1] and len(self._seen) == len(ids)
        whole = torch.cat([self._seen, ids], 1) if self._past and grown and self._seen is not None else ids
        plans = self._known_plans(whole)
        self._seen, self._whole = whole, self._past == 0
        if ids.shape[1] < 2:  # a decoding step
            return None
        if plans is None:
            plans = self._make_plans(whole)
            self._plans, self._planned = plans, whole
        begin = whole.shape[1] - ids.shape[1]
        rows = list(out)
        for i, plan in enumerate(plans):
            places = [at - begin for at in plan.places if at >= begin]
            if places:
                rows[i] = self.corruption.apply(out[i], places, plan.ids)
        return torch.stack(rows) if any(plan.places for plan in plans) else None

    def _known_plans(self, whole: Tensor) -> list[Plan] | None:
        """The plans of a prompt that is passed again with what was answered so far: generation without a cache, which
        adds one token a pass. The next request of a chat begins with the one before as well, and is judged."""
        seen, planned = self._seen, self._planned
        if self._past or not self._whole or seen is None or planned is None:
            return None
        if len(seen) != len(whole) or seen.shape[1] + 1 != whole.shape[1] or planned.shape[1] >= whole.shape[1]:
            return None
        passed = set(map(tuple, seen.tolist()))  # beams change places
        again = all(tuple(row) in passed for row in whole[:, :-1].tolist())
        return self._plans if again and torch.equal(planned, whole[:, : planned.shape[1]]) else None

    # -- what is done to whom ------------------------------------------------------------------------

    def _make_plans(self, whole: Tensor) -> list[Plan]:
        mask = self._mask if self._mask is not None and self._mask.shape == whole.shape else None
        real = [(row if mask is None else row[mask[i].cpu().bool()]).tolist() for i, row in enumerate(whole)]
        shifts = [0 if mask is None else int(mask[i].cpu().argmax()) for i in range(len(real))]  # left padding
        prompts = [read_prompt(ids, self.reader.tokenizer, self.frame) for ids in real]
        texts = [text for prompt in prompts for text in _texts(prompt)]
        known = self._judged(texts)
        plans = []
        for ids, shift, prompt in zip(real, shifts, prompts, strict=True):
            places = self._places(prompt, known)
            if self.force and not places:
                places = self._places(prompt, dict.fromkeys(_texts(prompt), 1.0))
            self.flagged += bool(places) and not self.force
            plans.append(Plan(tuple(shift + at for at in places), tuple(ids[: prompt.answer])))
        return plans

    def _judged(self, texts: Sequence[str]) -> dict[str, float]:
        keys = {text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts}
        new = [text for text, key in keys.items() if key not in self._known]
        if len(self._known) + len(new) > _REMEMBERED:
            self._known.clear()
            new = list(keys)
        if new:
            self._known.update({keys[text]: p for text, p in zip(new, self.judge(new), strict=True)})
        return {text: self._known[key] for text, key in keys.items()}

    def _places(self, prompt: Prompt, known: dict[str, float]) -> list[int]:
        """The tokens to corrupt: of every flagged turn and of the answer to it, or of all that was asked where only the
        turns together are.

        The last token before the answer stays, as published.
        """
        flagged = [turn for turn in prompt.turns if known[turn.text] >= self.threshold]
        if not flagged and len(_texts(prompt)) > len(prompt.turns) and known[_joined(prompt)] >= self.threshold:
            flagged = [turn for turn in prompt.turns if turn.asked]
        if not flagged:
            return []
        if self.tokens == ALL:
            return list(range(prompt.answer - 1))
        # An answer is about what was asked, whatever its own words tell.
        answers = [turn for before, turn in itertools.pairwise(prompt.turns) if before in flagged and not turn.asked]
        chosen = {at for turn in (*flagged, *answers) for at in self._of_turn(turn)}
        return sorted(at for at in chosen if at < prompt.answer - 1)

    def _of_turn(self, turn: Turn) -> list[int]:
        every = list(range(turn.first, turn.last))
        found = self.telling(turn.text) if self.tokens == SUBJECT and self.telling is not None else []
        return [
            at for at, (a, b) in zip(every, turn.spans, strict=True) if any(a < d and b > c for c, d in found)
        ] or every


def _joined(prompt: Prompt) -> str:
    return " ".join(turn.text for turn in prompt.turns if turn.asked)


def _texts(prompt: Prompt) -> list[str]:
    """Every turn by itself, and where there are several questions all of them together."""
    texts = [turn.text for turn in prompt.turns]
    return [*texts, _joined(prompt)] if sum(turn.asked for turn in prompt.turns) > 1 else texts


@contextlib.contextmanager
def attached(attachment: Attachment) -> Iterator[Attachment]:
    """Stand before the model while the block runs."""
    handles = attachment.put_on()
    try:
        yield attachment
    finally:
        for handle in handles:
            handle.remove()
