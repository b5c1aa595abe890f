"""Batches of a forward pass: sequence packing with shared prefixes, padding, and the shift and mask of labels.

Examples that begin alike (a bad answer and its mismatched ones) are a prefix group, whose beginning is computed once.
Groups are laid behind each other in rows; position ids restart, and a mask keeps them from seeing one another.
Where the model's attention takes a layout, the rows themselves lie end to end, without padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qunlearn.data.tokenize import Example


@dataclass(frozen=True)
class Span:
    """Which tokens of an example are supervised: `answer`, `closed` (answer and closing), `all` of them, or `form`.

    Answer tokens that weigh nothing are not supervised; `all` takes no account of weights. `form` are those that
    weigh nothing, and the closing: what stands around the content of an answer.
    """

    name: str

    def of(self, example: Example) -> tuple[int, int]:
        """First and last (exclusive) supervised position; the first token of a row has nothing to predict it from."""
        if self.name == "all":
            return 1, len(example.input_ids)
        last = example.end if self.name == "answer" else len(example.input_ids)
        return max(example.start, 1), last

    def positions(self, example: Example) -> list[int]:
        first, last = self.of(example)
        if self.name == "form":
            return [t for t in range(first, last) if t >= example.end or (example.held and example.weight(t) == 0)]
        if self.name == "all" or not example.weights:
            return list(range(first, last))
        return [t for t in range(first, last) if example.weight(t) > 0]

    def weights(self, example: Example) -> list[float]:
        """The weight of each supervised position."""
        return [1.0 if self.name in ("all", "form") else example.weight(t) for t in self.positions(example)]

    def count(self, example: Example) -> int:
        return len(self.positions(example))


ANSWER, CLOSED, ALL, FORM = Span("answer"), Span("closed"), Span("all"), Span("form")


# Rows are closed up where padding is at least such a share of them: less saves no more than attention's copies take.
_PADDING = 1 / 16


@dataclass(frozen=True)
class Layout:
    """How N tokens that lie end to end make B rows of T, padded on the right; `mask` as in `Batch`."""

    tokens: Tensor  # (B, T): the token at each place, some token where there is padding
    places: Tensor  # (N,): the place of each token
    mask: Tensor | None = None
    made: dict[torch.dtype, Tensor] = field(default_factory=dict, compare=False, repr=False)  # see `bias`
    copies: dict[torch.device, Layout] = field(default_factory=dict, compare=False, repr=False)  # see `to`

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return the mask as what is added to attention scores, 0 or -inf, made once for all layers."""
        if self.mask is not None and dtype not in self.made:
            zero = torch.zeros((), dtype=dtype, device=self.mask.device)
            self.made[dtype] = torch.where(self.mask, zero, zero - torch.inf)
        return self.made.get(dtype)

    def to(self, device: torch.device | str) -> Layout:
        """Return the layout on a device: itself where it is there, else one copy, for all layers that are there."""
        device = torch.device(device)
        if self.tokens.device == device:
            return self
        if device not in self.copies:
            mask = None if self.mask is None else self.mask.to(device)
            self.copies[device] = Layout(self.tokens.to(device), self.places.to(device), mask)
        return self.copies[device]


@dataclass(frozen=True)
class Batch:
    """Rows and the positions that are supervised.

    The hidden state at `source[n]` of the B * T positions predicts `labels[n]`, a token of example `rows[n]`, which
    weighs `weights[n]`; examples follow each other in the order of `examples`. `mask` is None where causality alone is
    enough: padding lies to the right, where no token sees it. With a `layout` B is 1 and T all tokens, and rows and
    mask are the layout's.
    """

    input_ids: Tensor  # (B, T)
    source: Tensor  # (N,)
    labels: Tensor  # (N,)
    rows: Tensor  # (N,)
    weights: Tensor  # (N,)
    examples: tuple[int, ...]
    tokens: int  # padding not counted
    position_ids: Tensor | None = None  # (B, T)
    mask: Tensor | None = None  # (B, 1, T, T) bool, true = may be seen
    layout: Layout | None = None

    @property
    def supervised_tokens(self) -> int:
        return int(self.labels.numel())

    @property
    def places(self) -> Tensor:
        """The rows that attention sees, (B, T)."""
        return self.input_ids if self.layout is None else self.layout.tokens

    def pick(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (N, D): the states that predict something."""
        return hidden.flatten(0, 1).index_select(0, self.source)

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            source=self.source.to(device),
            labels=self.labels.to(device),
            rows=self.rows.to(device),
            weights=self.weights.to(device),
            position_ids=None if self.position_ids is None else self.position_ids.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            layout=None if self.layout is None else self.layout.to(device),
        )


@dataclass(frozen=True)
class PrefixGroup:
    """Examples with the same first `shared` tokens, which are computed once; `length` tokens in all."""

    members: tuple[int, ...]
    shared: int
    length: int

    def offsets(self, examples: Sequence[Example]) -> Iterator[tuple[int, int]]:
        """(member, where its tokens after the shared ones begin, from the group's start)."""
        at = self.shared
        for member in self.members:
            yield member, at
            at += len(examples[member].input_ids) - self.shared


Row = Sequence[PrefixGroup]


def prefix_groups(examples: Sequence[Example], groups: Iterable[Sequence[int]], max_tokens: float) -> list[PrefixGroup]:
    """Groups of examples (by index) as prefix groups of at most `max_tokens` tokens, or of one example. Without a limit
    they stay whole, also where a cut prompt leaves them nothing to share: a pair is one loss."""
    made: list[PrefixGroup] = []
    for group in groups:
        open_group: PrefixGroup | None = None
        for i in group:
            grown = _prefix_group(examples, (*open_group.members, i)) if open_group else _prefix_group(examples, (i,))
            if open_group and (grown.length > max_tokens or not (grown.shared or math.isinf(max_tokens))):
                made.append(open_group)
                grown = _prefix_group(examples, (i,))
            open_group = grown
        if open_group:
            made.append(open_group)
    return made


def _prefix_group(examples: Sequence[Example], members: tuple[int, ...]) -> PrefixGroup:
    ids = [examples[i].input_ids for i in members]
    shared, most = 0, min(map(len, ids))
    while shared < most and len({row[shared] for row in ids}) == 1:
        shared += 1
    return PrefixGroup(members, shared, shared + sum(len(row) - shared for row in ids))


def micro_batches(made: Sequence[PrefixGroup], max_tokens: int, *, pack: bool, partners: int = 1) -> list[list[Row]]:
    """Rows in groups of at most `max_tokens` tokens with padding; a group that is longer makes a group of its own.

    Without `pack`, `partners` neighbours of `made` stay in one group: a preference pair is one loss.

    With `pack` the longest group sets a row's length and shorter ones fill the rows up (first fit, longest first),
    so that little padding is left. The longest group comes first, so that running out of memory shows at once.
    """
    if partners > 1 and not pack:
        return _kept_together(made, max_tokens, partners)
    order = sorted(made, key=lambda group: (-group.length, group.members))
    groups: list[list[Row]] = []
    while order:
        length, limit = order[0].length, max(1, max_tokens // order[0].length)
        rows: list[list[PrefixGroup]] = []
        room: list[int] = []
        left: list[PrefixGroup] = []
        for group in order:
            at = next((i for i, free in enumerate(room) if pack and free >= group.length), None)
            if at is not None:
                rows[at].append(group)
                room[at] -= group.length
            elif len(rows) < limit:
                rows.append([group])
                room.append(length - group.length)
            else:
                left.append(group)
        groups.append(list(rows))
        order = left
    return groups


def _kept_together(made: Sequence[PrefixGroup], max_tokens: int, partners: int) -> list[list[Row]]:
    units = [made[i : i + partners] for i in range(0, len(made), partners)]
    units.sort(key=lambda unit: -max(group.length for group in unit))
    groups: list[list[Row]] = []
    longest = 0
    for unit in units:
        if groups and longest * (len(groups[-1]) + partners) <= max_tokens:
            groups[-1] += [[group] for group in unit]
        else:
            groups.append([[group] for group in unit])
            longest = max(group.length for group in unit)
    return groups


def collate(
    examples: Sequence[Example],
    span: Span | Sequence[Span],
    pad_id: int,
    rows: Sequence[Row] | None = None,
    *,
    close_up: bool = False,
    always: bool = False,
) -> Batch:
    """Lay rows out, pad on the right and mark what is supervised: one span for all, or one for each example.

    Without `rows` every example is a row of its own. With `close_up` there is no padding where that saves something, or
    `always`.
    Shapes as in `Batch`.
    """
    spans = [span] * len(examples) if isinstance(span, Span) else span
    rows = rows if rows is not None else [[_prefix_group(examples, (i,))] for i in range(len(examples))]
    width = max(sum(group.length for group in row) for row in rows)
    laid: list[list[tuple[int, ...]]] = []  # of each token: its id, position, group, and branch
    source: list[int] = []
    labels: list[int] = []
    owner: list[int] = []
    weights: list[float] = []
    for r, row in enumerate(rows):
        line: list[tuple[int, ...]] = []
        for f, group in enumerate(row):
            start, shared = r * width + len(line), group.shared
            line += [(token, t, f, 0) for t, token in enumerate(examples[group.members[0]].input_ids[:shared])]
            for branch, (i, at) in enumerate(group.offsets(examples), 1):
                tokens = examples[i].input_ids
                line += [(token, t, f, branch) for t, token in enumerate(tokens[shared:], shared)]
                supervised = spans[i].positions(examples[i])
                before = [t - 1 for t in supervised]
                source += [start + (t if t < shared else at + t - shared) for t in before]
                labels += [tokens[t] for t in supervised]
                weights += spans[i].weights(examples[i])
                owner += [i] * len(supervised)
        laid.append(line + [(pad_id, 0, -1, -1)] * (width - len(line)))
    # As one tensor: on a GPU's machine every operation here is time that the GPU waits.
    ids, position, placed, branches = torch.tensor(laid, dtype=torch.long).permute(2, 0, 1).contiguous()
    members = tuple(i for row in rows for group in row for i in group.members)
    packed = any(len(row) > 1 or len(row[0].members) > 1 for row in rows)
    batch = Batch(
        ids,
        torch.tensor(source, dtype=torch.long),
        torch.tensor(labels, dtype=torch.long),
        torch.tensor(owner, dtype=torch.long),
        torch.tensor(weights, dtype=torch.float32),
        members,
        sum(group.length for row in rows for group in row),
        position if packed else None,
        _mask(placed, branches) if packed else None,
    )
    if not close_up or (not always and batch.tokens > ids.numel() * (1 - _PADDING)):
        return batch
    return _closed_up(batch, position, placed >= 0)


def _closed_up(batch: Batch, position: Tensor, real: Tensor) -> Batch:
    """The same rows end to end. `position` (B, T); `real` (B, T): no padding there."""
    places = real.flatten().nonzero().squeeze(1)
    tokens = torch.zeros(real.numel(), dtype=torch.long)
    tokens[places] = torch.arange(len(places))
    return replace(
        batch,
        input_ids=batch.input_ids.flatten()[places].unsqueeze(0),
        position_ids=position.flatten()[places].unsqueeze(0),
        source=tokens[batch.source],
        mask=None,
        layout=Layout(tokens.view_as(real), places, batch.mask),
    )


def _mask(group: Tensor, branch: Tensor) -> Tensor:
    """(B, T), (B, T) -> (B, 1, T, T): a token sees earlier ones of its own group that are shared or of its branch."""
    length = group.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = group.unsqueeze(2) == group.unsqueeze(1)
    seen = (branch.unsqueeze(1) == 0) | (branch.unsqueeze(2) == branch.unsqueeze(1))
    return (causal & same & seen).unsqueeze(1)


def single_batches(examples: Sequence[Example], max_tokens: int) -> list[list[int]]:
    """Indices in groups of similar length, each at most `max_tokens` with its padding, for scoring one by one."""
    made = prefix_groups(examples, ([i] for i in range(len(examples))), max_tokens)
    return [[row[0].members[0] for row in rows] for rows in micro_batches(made, max_tokens, pack=False)]
