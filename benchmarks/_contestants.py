"""Four ways to do one step on the same rows, weights, adapter and optimizer.

(a) the published LLMU step, (b) what a careful engineer would write with peft, (c) plain QLoRA fine-tuning on as many
tokens, (d) qunlearn. Each adds its gradients to the adapter and returns its losses per term.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from _engine import Cache, engine_backward, engine_tokens, fill_cache
from _models import Shape, random_base
from _report import say
from _rows import Drawer, Rows
from qunlearn.config.objective import ObjectiveConfig
from qunlearn.config.settings import Config, LoraConfig
from qunlearn.config.training import TrainConfig
from qunlearn.data.batch import ALL, ANSWER, CLOSED, Batch, collate, single_batches
from qunlearn.data.tokenize import Example
from qunlearn.model.kernels.lora import make_lean, make_plain
from qunlearn.model.policy import Policy

# The published weights; the floor under the ascent is off, for the others have none.
OBJECTIVE = ObjectiveConfig("llmu", eps1=0.5, eps2=1.0, eps3=1.0, floor_nll=float("inf"))
_QUIRK_START = 2  # where the published mismatch loss begins, whatever the prompt's length


Split = Callable[[Tensor], list[Tensor]]  # (B, T, V) -> B of (T, V)


@dataclass
class Arena:
    """What the contestants share: one policy, the settings, and what some of them hold besides."""

    policy: Policy
    config: Config
    optimizer: torch.optim.Optimizer
    second: Any = None  # (a)'s reference: a whole second model
    cache: Cache = field(default_factory=Cache)
    plain: dict[int, list[Example]] = field(default_factory=dict)  # (c)'s rows, by their number of tokens
    graphs: Any = None  # recorded passes, on a GPU

    @classmethod
    def build(cls, policy: Policy, max_tokens: int) -> Arena:
        config = Config(objective=OBJECTIVE, train=TrainConfig(max_tokens=max_tokens))
        optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-4, weight_decay=0.0)
        arena = cls(policy, config, optimizer)
        policy.model.train()
        # The optimizer's state from the start, so that the first step measured is like any other; a step without
        # gradients' content and without decay moves nothing.
        for p in policy.trainable().values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return arena

    def prepare(self, key: str, shape: Shape, steps: Sequence[Rows], seed: int) -> None:
        """What a contestant has before its first step: the second model, the cache, the rows to fine-tune on."""
        if key in ("a", "a'") and self.second is None:
            self.second = random_base(shape, self.policy.device, seed=seed).model
        if key in ("d'", "d+"):
            self.cache = fill_cache(self.policy, steps)
        if key == "c":
            for n in map(engine_tokens, steps):
                self.plain.setdefault(n, Drawer(shape.vocabulary, seed + n).plain(n))

    def drop(self) -> None:
        """Give up what `prepare` made."""
        self.second, self.cache, self.plain, self.graphs = None, Cache(), {}, None
        self.policy.graphs = None

    def limit_passes(self, max_tokens: int) -> None:
        """Tokens of one pass, for those contestants that split a step."""
        self.config = replace(self.config, train=replace(self.config.train, max_tokens=max_tokens))

    def step(self, key: str, rows: Rows) -> dict[str, float]:
        """One optimizer step of a contestant; its losses per term."""
        contestant = CONTESTANTS[key]
        set_checkpointing(self.policy.base.model, contestant.checkpointing)
        if contestant.lean:
            make_lean(self.policy.layers, whole=self.policy.device.type == "cuda")
        else:
            make_plain(self.policy.layers)
        if contestant.recorded and self.graphs is None:
            self.policy.record_passes(lambda why: say(f"  not recorded: {why}"))
            self.graphs = self.policy.graphs
        self.policy.graphs = self.graphs if contestant.recorded else None
        self.policy.zero_grad()
        losses = contestant.backward(self, rows)
        self.optimizer.step()
        return losses


def published(arena: Arena, rows: Rows) -> dict[str, float]:
    """(a) Three passes of whole logits, one backward pass through all of them (unlearn_harm.py, utils.py).

    As there: a mean over each row's positions and then over the rows; the mismatch loss from the third position on;
    the reference is a second model; -sum p0 log(p + 1e-12) averaged over every position, prompt and padding included.
    More generous than there: padded to the longest row rather than to the model's maximum, padding is masked whatever
    its id is, and no cross-entropy is computed on the normal rows only to be thrown away.
    """
    return _published(arena, rows, lambda z: [z[b] for b in range(len(z))])


def published_unbound(arena: Arena, rows: Rows) -> dict[str, float]:
    """(a') The same, relieved of an accident: the script indexes its logits row by row.

    Autograd answers each index with a zero gradient of the whole size. `unbind` gives the same numbers without them.
    """
    return _published(arena, rows, lambda z: list(z.unbind(0)))


def _published(arena: Arena, rows: Rows, split: Split) -> dict[str, float]:
    model, pad = arena.policy.model, arena.policy.tokenizer.pad_token_id
    ascent = -_row_means(model, _padded(rows.forget, pad, arena), [e.start - 1 for e in rows.forget], split)
    mismatch = _row_means(model, _padded(rows.mismatch, pad, arena), [_QUIRK_START] * len(rows.mismatch), split)
    normal = _padded(rows.retain, pad, arena)
    q = model(**normal).logits.float().softmax(-1)
    with torch.no_grad():
        p = arena.second(**normal).logits.float().softmax(-1)
    kl = -(p * torch.log(q + 1e-12)).sum(-1).mean()
    c = arena.config.objective
    torch.autograd.backward(c.eps1 * ascent + c.eps2 * mismatch + c.eps3 * kl)
    return {"ascent": float(ascent.detach()), "mismatch": float(mismatch.detach()), "kl": float(kl.detach())}


def _padded(examples: Sequence[Example], pad: int, arena: Arena) -> dict[str, Tensor]:
    return _inputs(collate(examples, ALL, pad), examples, arena)


def _inputs(batch: Batch, examples: Sequence[Example], arena: Arena) -> dict[str, Tensor]:
    """What transformers wants of rows that are padded on the right."""
    lengths = torch.tensor([len(example.input_ids) for example in examples]).unsqueeze(1)
    mask = torch.arange(batch.input_ids.shape[1]).unsqueeze(0) < lengths
    device = arena.policy.device
    return {"input_ids": batch.input_ids.to(device), "attention_mask": mask.long().to(device)}


def _row_means(model: Any, inputs: dict[str, Tensor], starts: Sequence[int], split: Split) -> Tensor:
    """Cross-entropy: over each row's positions from its start to its last token, then a mean over rows. -> ()

    A row's last token predicts nothing and counts in the mean all the same, as published.
    """
    mask = inputs["attention_mask"]
    labels = inputs["input_ids"].masked_fill(mask == 0, -100)[:, 1:]
    losses = []
    for b, z in enumerate(split(model(**inputs).logits[:, :-1])):
        weight = mask[b].float()
        weight[: starts[b]] = 0
        nll = F.cross_entropy(z.float(), labels[b], reduction="none")
        losses.append((weight[:-1] * nll).sum() / weight.sum())
    return torch.stack(losses).mean()


def careful(arena: Arena, rows: Rows) -> dict[str, float]:
    """(b) One pass and one backward for each term, the loss on supervised tokens, adapters off as the reference."""
    policy, c, losses = arena.policy, arena.config.objective, {}
    for name, examples, span, weight in (
        ("ascent", rows.forget, ANSWER, c.eps1),
        ("mismatch", rows.mismatch, CLOSED, c.eps2),
        ("kl", rows.retain, ALL, c.eps3),
    ):
        batch = collate(examples, span, policy.tokenizer.pad_token_id).to(policy.device)
        inputs = _inputs(batch, examples, arena)
        z0 = None
        if name == "kl":
            with torch.no_grad(), policy.model.disable_adapter():
                z0 = batch.pick(policy.model(**inputs).logits).float().log_softmax(-1)
        z = batch.pick(policy.model(**inputs).logits).float()
        if z0 is not None:
            loss = F.kl_div(z.log_softmax(-1), z0, reduction="sum", log_target=True) / batch.supervised_tokens
        elif name == "ascent":  # within a row first, then over rows
            each = F.cross_entropy(z, batch.labels, reduction="none")
            sums = each.new_zeros(len(examples)).index_add(0, batch.rows, each)
            loss = -(sums / torch.bincount(batch.rows, minlength=len(examples))).mean()
        else:
            loss = F.cross_entropy(z, batch.labels)
        del z, z0
        torch.autograd.backward(weight * loss)
        losses[name] = float(loss.detach())
    return losses


def plain_qlora(arena: Arena, rows: Rows) -> dict[str, float]:
    """(c) Cross-entropy on as many tokens as (d) passes through the model, sorted by length, the same token budget."""
    policy, examples = arena.policy, arena.plain[engine_tokens(rows)]
    supervised, total = sum(len(e.input_ids) - e.start for e in examples), 0.0
    for part in single_batches(examples, arena.config.train.pass_tokens):
        members = [examples[i] for i in part]
        batch = collate(members, CLOSED, policy.tokenizer.pad_token_id).to(policy.device)
        # Labels are moved to the logits' positions, as transformers' own loss does: the logits need no copy.
        labels = torch.full_like(batch.input_ids, -100).flatten().scatter(0, batch.source, batch.labels)
        z = policy.model(**_inputs(batch, members, arena)).logits.flatten(0, 1)
        loss = F.cross_entropy(z.float(), labels, reduction="sum") / supervised
        del z
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return {"nll": total}


def qunlearn_live(arena: Arena, rows: Rows) -> dict[str, float]:
    """(d) qunlearn, the reference computed in every step."""
    return engine_backward(arena.policy, rows, arena.config, None)


def qunlearn_cached(arena: Arena, rows: Rows) -> dict[str, float]:
    """(d') qunlearn, the reference computed once before the steps."""
    return engine_backward(arena.policy, rows, arena.config, arena.cache)


@dataclass(frozen=True)
class Contestant:
    """One way to do a step. `tokens`: what passes through its trained forwards, padding aside; `lean`: qunlearn's
    adapters, not peft's."""

    title: str
    backward: Callable[[Arena, Rows], dict[str, float]]
    tokens: Callable[[Rows], int]
    checkpointing: bool = True
    lean: bool = False
    recorded: bool = False  # as CUDA graphs, where there is a GPU


CONTESTANTS = {
    "a": Contestant("published LLMU step", published, lambda r: r.row_tokens, checkpointing=False),
    "a'": Contestant("published, indexing relieved", published_unbound, lambda r: r.row_tokens, checkpointing=False),
    "b": Contestant("careful peft", careful, lambda r: r.row_tokens),
    "c": Contestant("plain QLoRA", plain_qlora, engine_tokens),
    "d": Contestant("qunlearn", qunlearn_live, engine_tokens, lean=True, recorded=True),
    "d-": Contestant("qunlearn, --compile off", qunlearn_live, engine_tokens, lean=True),
    "d'": Contestant("qunlearn, cached reference", qunlearn_cached, engine_tokens, lean=True, recorded=True),
    "d*": Contestant(
        "qunlearn, activations kept", qunlearn_live, engine_tokens, checkpointing=False, lean=True, recorded=True
    ),
    "d+": Contestant(
        "qunlearn, both kept", qunlearn_cached, engine_tokens, checkpointing=False, lean=True, recorded=True
    ),
}


def checkpoint_published(on: bool) -> None:
    """The published script keeps every activation; `on` gives it checkpointing as the others have."""
    for key in ("a", "a'"):
        CONTESTANTS[key] = replace(CONTESTANTS[key], checkpointing=on)


def set_checkpointing(model: Any, on: bool) -> None:
    """Switch activation checkpointing, under the name this transformers knows (5.22 renamed it)."""
    new = hasattr(model, "activation_checkpointing_enable")
    if on and new:
        model.activation_checkpointing_enable({"use_reentrant": False})
    elif on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        (model.activation_checkpointing_disable if new else model.gradient_checkpointing_disable)()


def new_policy(base: Any, seed: int = 0) -> Policy:
    """LoRA r = 16 on every linear layer, the defaults."""
    return Policy.new(base, LoraConfig(), seed=seed)
