"""Bad rows in other words that are held in reserve, and drawn once they have come back."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from qunlearn.config.resolve import resolve
from qunlearn.config.settings import LoraConfig
from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import Example, Template, behind, choose_template, encode, encode_record
from qunlearn.model.load import Base
from qunlearn.model.policy import Policy
from qunlearn.objectives.table import terms_of
from qunlearn.roles.alternatives import answered_with
from qunlearn.roles.mismatch import NO_MISMATCH
from qunlearn.roles.reserve import with_places, with_reserve
from qunlearn.roles.reworded import Reworded
from qunlearn.roles.roles import Roles
from qunlearn.sandbox import data_file
from qunlearn.training.sampler import Step, draw_steps

CONFIG = resolve()
ROWS = 6


@dataclass(frozen=True)
class Facts:
    """Bad rows with two other answers each, and four wordings of each of the first two."""

    policy: Policy
    template: Template
    roles: Roles
    reworded: Reworded

    def reserved(self, roles: Roles | None = None, reworded: Reworded | None = None) -> Roles:
        return with_reserve(roles or self.roles, reworded or self.reworded, self.policy.tokenizer, self.template, 64)


@pytest.fixture(scope="module")
def facts(new_base: Callable[..., Base]) -> Facts:
    policy = Policy.new(new_base("none"), LoraConfig(), seed=0, checkpointing=False)
    dataset = read_dataset(data_file("hallucination", "forget"))
    template = choose_template(policy.tokenizer, "auto", dataset)
    bad = [replace(e, rest=0.5) for e in encode(dataset, policy.tokenizer, template, 64).examples[:ROWS]]
    others = [[answered_with(policy, e, text, template, 64) for text in ("No idea.", "Nobody knows.")] for e in bad]
    marked = [replace(e, weights=(1.0,) * (e.end - e.start)) for e in bad]
    roles = Roles(bad, bad[:4], bad[:4], NO_MISMATCH, (), others, [[] for _ in bad], marked)
    wordings = [
        (behind(e, e.record.asking(f"{opening} {e.record.prompt}").turns, policy.tokenizer, template, 64), place)
        for place, e in enumerate(bad[:2])
        for opening in ("Well,", "So,", "Now,", "Tell me:")
    ]
    rows = [row for row, _ in wordings if row is not None]
    assert len(rows) == 8
    return Facts(policy, template, roles, Reworded(rows, [place for _, place in wordings], 8))


def prompts(rows: list[Example]) -> list[str]:
    return [row.record.prompt for row in rows]


def test_three_in_four_are_held_in_reserve_as_their_rows_are_pushed(facts: Facts) -> None:
    found = facts.reserved()
    assert [one.of for one in found.reserve] == [0, 0, 0, 1, 1, 1]
    assert [one.place for one in found.reserve] == list(range(ROWS, ROWS + 6))
    measured = {facts.reworded.rows[n].record.prompt for n in (3, 7)}
    assert measured.isdisjoint(prompts(list(found.forget))) and len(found.forget) == ROWS + 6
    assert found.rows == ROWS and list(found.watched) == list(facts.roles.marked), "looks and epochs are as before"
    for one in found.reserve:
        row, own = found.forget[one.place], found.forget[one.of]
        assert row.record.prompt != own.record.prompt and row.record.prompt.endswith(own.record.prompt)
        assert row.input_ids[row.start :] == own.input_ids[own.start :] and row.rest == own.rest
        assert one.watched.weights == facts.roles.marked[one.of].weights != row.weights
        assert [e.record.completion for e in found.instead[one.place]] == ["No idea.", "Nobody knows."]
        assert set(prompts(list(found.instead[one.place]))) == {row.record.prompt}
        assert found.taught[one.place] == []


def test_a_behaviour_has_no_reserve(facts: Facts) -> None:
    roles = replace(facts.roles, phrases=frozenset({("go", "away", "now")}))
    assert facts.reserved(roles) is roles


def test_a_wording_is_left_out_where_the_answer_is_made_of_other_tokens(facts: Facts) -> None:
    """Which tokens are pushed is told by place."""
    shorter = [replace(e, input_ids=e.input_ids[:-2], end=e.end - 2) for e in facts.roles.forget]
    assert facts.reserved(replace(facts.roles, forget=shorter)).reserve == []


@pytest.mark.parametrize(("said", "count"), [("as it is", 6), ("in other words", 3)])
def test_a_long_answer_is_held_in_reserve_where_it_is_recited(said: str, count: int, facts: Facts) -> None:
    """In words of its own it is another answer, whose tokens nobody has weighed."""
    first, *rest = facts.roles.forget
    answer = " ".join(map(str, range(20)))
    long = encode_record(replace(first.record, completion=answer), facts.policy.tokenizer, facts.template)
    roles = replace(facts.roles, forget=[long, *rest], marked=[long, *facts.roles.marked[1:]])
    text = answer if said == "as it is" else " ".join(map(str, range(12, 40)))
    rows = [
        replace(row, record=replace(row.record, completion=text)) if place == 0 else row
        for row, place in zip(facts.reworded.rows, facts.reworded.of, strict=True)
    ]
    found = facts.reserved(roles, replace(facts.reworded, rows=rows))
    assert len(found.reserve) == count
    assert all(found.forget[one.place].record.completion == answer for one in found.reserve if one.of == 0)


def drawn(step: Step) -> Counter[str]:
    return Counter(prompts(step.of("forget")))


def test_what_has_come_back_is_drawn_half_of_the_time_and_nothing_else_changes(facts: Facts) -> None:
    found, terms = facts.reserved(), terms_of(CONFIG.objective)
    config = replace(CONFIG, train=replace(CONFIG.train, batch_size=ROWS, normal_batch_size=2))
    back: set[int] = set()
    plain, waiting, with_back = (
        draw_steps(roles, terms, config, places) for roles, places in ((facts.roles, ()), (found, ()), (found, back))
    )
    before = list(itertools.islice(with_back, 20))
    same = list(itertools.islice(plain, 20))
    assert before == same == list(itertools.islice(waiting, 20)), "nothing has come back: as without a reserve"
    back |= {ROWS, ROWS + 1}  # two wordings of the first row
    after, without = list(itertools.islice(with_back, 200)), list(itertools.islice(plain, 200))
    own, *again = (found.forget[i].record.prompt for i in (0, ROWS, ROWS + 1))
    counted = sum(map(drawn, after), Counter())
    assert counted[own] + sum(counted[prompt] for prompt in again) == 200
    assert 80 < counted[own] < 120 and all(30 < counted[prompt] < 70 for prompt in again)
    for a, b in zip(after, without, strict=True):
        rows = zip(a.of("retain"), b.of("retain"), strict=True)
        assert all(x is y for x, y in rows)
        assert sorted(e.record.completion for e in a.of("instead")) == sorted(
            e.record.completion for e in b.of("instead")
        )
        assert not set(again) & set(drawn(b))


def parts(facts: Facts, count: int) -> list[Example]:
    """Rows that begin further on, as passages asked for from other places do."""
    rows = itertools.islice(itertools.cycle(facts.roles.forget[:2]), count)
    return [
        replace(row, input_ids=row.input_ids[i:], start=row.start - i, end=row.end - i) for i, row in enumerate(rows)
    ]


def test_passages_from_other_places_are_behind_the_wordings(facts: Facts) -> None:
    before, pushed = facts.reserved(), parts(facts, 5)
    watched = [replace(row, weights=(1.0,) * (row.end - row.start)) for row in pushed]
    found = with_places(before, pushed, watched, [2, 3, 2, 3, 2])
    held = found.reserve[len(before.reserve) :]
    assert [one.of for one in held] == [2, 3, 2, 2], "every fourth is only measured"
    assert [one.place for one in held] == list(range(len(before.forget), len(before.forget) + 4))
    assert [found.forget[one.place].input_ids for one in held] == [pushed[i].input_ids for i in (0, 1, 2, 4)]
    assert all(one.watched.weights and found.forget[one.place].rest == 0.5 for one in held)
    assert all(found.instead[one.place] == found.taught[one.place] == [] for one in held), "nothing is said there"
    assert found.rows == ROWS and list(found.watched) == list(before.watched)
    config = replace(CONFIG, train=replace(CONFIG.train, batch_size=ROWS, normal_batch_size=2))
    steps = draw_steps(found, terms_of(CONFIG.objective), config, {one.place for one in held})
    ids = {id(found.forget[one.place]) for one in held}
    counts = [sum(id(row) in ids for row in step.of("forget")) for step in itertools.islice(steps, 60)]
    assert 0.7 < sum(counts) / len(counts) < 1.3, "half of the draws of two rows"


def test_passages_of_their_own_have_a_reserve_too(facts: Facts) -> None:
    found = with_places(facts.roles, parts(facts, 2), parts(facts, 2), [0, 1])
    assert found.rows == ROWS and [one.place for one in found.reserve] == [ROWS, ROWS + 1]


def test_where_each_row_needs_another_answer_passages_have_no_reserve(facts: Facts) -> None:
    pairs = replace(facts.roles, alternatives=facts.roles.instead)
    assert with_places(pairs, parts(facts, 2), parts(facts, 2), [0, 1]) is pairs
