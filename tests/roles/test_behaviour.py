"""Bad prompts that ask for a behaviour: in fewer words, and the phrases of what is answered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from qunlearn.config.resolve import resolve
from qunlearn.config.settings import LoraConfig
from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import Example, Template, choose_template, encode, encode_record
from qunlearn.evaluation.scores import row_probabilities
from qunlearn.model.load import Base
from qunlearn.model.policy import Policy
from qunlearn.objectives.table import terms_of
from qunlearn.roles.alternatives import answered_with
from qunlearn.roles.behaviour import phrases_of_behaviour, with_fewer_words, without_phrases
from qunlearn.roles.mismatch import NO_MISMATCH
from qunlearn.roles.retain_set import RetainSet
from qunlearn.roles.roles import Roles
from qunlearn.sandbox import data_file
from qunlearn.training.sampler import draw_steps

CONFIG = resolve()
TARGET = CONFIG.stop.target


@dataclass(frozen=True)
class Facts:
    """Rows that the sandbox knows, as if they asked for a behaviour: neighbours are answered in another manner."""

    policy: Policy
    template: Template
    roles: Roles

    def asked(self, places: list[int], roles: Roles | None = None) -> Roles:
        return with_fewer_words(self.policy, roles or self.roles, places, self.template, CONFIG)


@pytest.fixture(scope="module")
def facts(new_base: Callable[..., Base]) -> Facts:
    policy = Policy.new(new_base("none"), LoraConfig(), seed=0, checkpointing=False)
    policy.model.eval()
    dataset = read_dataset(data_file("hallucination", "forget"))
    template = choose_template(policy.tokenizer, "auto", dataset)
    bad = list(encode(dataset, policy.tokenizer, template, 64).examples)
    bad = [replace(e, held=False, rest=0.5) for e in bad]
    taught = [[answered_with(policy, e, "No idea at all!", template, 64)] for e in bad]
    return Facts(policy, template, Roles(bad, bad[:4], bad[:4], NO_MISMATCH, (), [[] for _ in bad], taught))


def words(example: Example) -> list[str]:
    return example.record.prompt.split()


def test_common_words_are_left_out_where_the_base_answers_all_the_same(facts: Facts) -> None:
    own = facts.roles
    found = facts.asked(list(range(own.rows)))
    added = found.forget[len(own.forget) :]
    assert list(found.forget[: len(own.forget)]) == list(own.forget) and added
    assert found.rows == own.rows, "an epoch goes through the file's rows"
    assert found.watched == own.watched, "looks are at the whole prompts"
    for i, (place, *variants) in enumerate(found.starts):
        assert place == i
        for n in variants:
            row, whole = found.forget[n], own.forget[i]
            rest = iter(words(whole))
            assert words(row) != words(whole) and all(word in rest for word in words(row)), "words in their order"
            assert row.input_ids[row.start :] == whole.input_ids[whole.start :], "the same answer, and its end"
            assert (row.weights, row.held, row.rest) == (whole.weights, whole.held, whole.rest)
            for said in found.taught[n]:
                assert said.input_ids[: said.start] == row.input_ids[: row.start]
                assert said.record.completion == "No idea at all!"
    with facts.policy.reference():
        p = row_probabilities(facts.policy, added, 2048)
    assert min(p) > TARGET and [row.known for row in added] == pytest.approx(p, rel=1e-4)


def test_names_stay(facts: Facts) -> None:
    """A word of few prompts, of those with one answer, or of which the answers speak, may be whom it is about."""
    found = facts.asked(list(range(facts.roles.rows)))
    for i, (_, *variants) in enumerate(found.starts):
        names = [word for word in words(facts.roles.forget[i])[1:] if word[0].isupper()]
        assert names and all(set(names) <= set(words(found.forget[n])) for n in variants)
    same = [facts.roles.forget[0]] * 12
    alike = replace(facts.roles, forget=same, taught=[facts.roles.taught[0]] * 12, instead=[[]] * 12)
    assert facts.asked(list(range(12)), alike) is alike


def test_what_asks_for_no_behaviour_stays_as_it_is(facts: Facts) -> None:
    rows = facts.roles.rows
    assert facts.asked([]) is facts.roles
    some = facts.asked(list(range(rows // 2)))
    assert all(len(own) == 1 for own in some.starts[rows // 2 :])
    first = range(len(facts.roles.forget), len(some.forget))
    assert sorted(n for own in some.starts[: rows // 2] for n in own[1:]) == list(first)


@dataclass(frozen=True)
class Manners:
    """Rude answers to the bad prompts, and kind ones to others."""

    rude: list[Example]
    kind: list[Example]


@pytest.fixture(scope="module")
def manners(facts: Facts) -> Manners:
    records = [example.record for example in facts.roles.forget]
    rude = [replace(record, completion=f"Stop wasting my time, {i}. Now go.") for i, record in enumerate(records)]
    kind = [replace(record, completion=f"Gladly, {i}.") for i, record in enumerate(records)]
    return Manners(*([encode_record(r, facts.policy.tokenizer, facts.template) for r in rows] for rows in (rude, kind)))


def test_phrases_are_of_answers_that_share_a_manner(facts: Facts, manners: Manners) -> None:
    found = phrases_of_behaviour(manners.rude, manners.kind)
    assert ("stop", "wasting", "my") in found
    bad = facts.roles.forget
    assert phrases_of_behaviour(bad, bad) == frozenset(), "others are spoken of as well"
    few = [*manners.rude[: len(bad) // 2 - 1], *bad[len(bad) // 2 - 1 :]]
    assert phrases_of_behaviour(few, [*manners.kind, *bad]) == frozenset(), "of less than half of the answers none"
    texts = [replace(e, record=replace(e.record, turns=())) for e in manners.rude]
    assert phrases_of_behaviour(texts, manners.kind) == frozenset(), "a book has phrases of its own"


def test_rows_of_the_base_that_speak_so_are_no_normal_rows(manners: Manners) -> None:
    """What a user gives stays, whatever it says."""
    phrases = phrases_of_behaviour(manners.rude, manners.kind)
    rows = [*manners.rude[:2], *manners.kind]
    normal = RetainSet(rows, rows, {}, 1, len(rows) - 1)
    assert without_phrases(normal, phrases, ()).retain == manners.kind
    kept = without_phrases(normal, phrases, [manners.rude[0].record])
    assert kept.held_back == [manners.rude[0], *manners.kind]
    assert without_phrases(normal, frozenset(), ()) == normal


def test_pairs_have_both_answers_behind_the_same_prompt(facts: Facts) -> None:
    """Objectives that prefer one answer to another find one for each variant as well."""
    roles = replace(facts.roles, alternatives=facts.roles.taught)
    found = facts.asked(list(range(roles.rows)), roles)
    assert len(found.alternatives) == len(found.forget) > len(roles.forget)
    for row, others in zip(found.forget, found.alternatives, strict=True):
        assert others and all(e.input_ids[: e.start] == row.input_ids[: row.start] for e in others)
    steps = draw_steps(found, terms_of(replace(CONFIG.objective, name="dpo")), CONFIG)
    assert any(term.role == "pair" for _ in range(20) for term, _ in next(steps).items)


def test_they_are_the_same_each_time(facts: Facts) -> None:
    """A resumed run makes them again."""
    places = list(range(facts.roles.rows))
    first, again = facts.asked(places), facts.asked(places)
    assert [e.input_ids for e in first.forget] == [e.input_ids for e in again.forget]


def test_steps_draw_both(facts: Facts) -> None:
    """Half of the draws are of the whole prompt, and what is taught is taught behind the prompt that is drawn."""
    roles = facts.asked(list(range(facts.roles.rows)))
    whole = {e.input_ids for e in facts.roles.forget}
    drawn = [0, 0]
    steps = draw_steps(roles, terms_of(CONFIG.objective), CONFIG)
    for _ in range(40):
        step = next(steps)
        for group in step.groups:
            rows = [step.items[i] for i in group if step.items[i][0].role in ("forget", "taught")]
            if rows:
                assert len({e.input_ids[: e.start] for _, e in rows}) == 1
                drawn[any(e.input_ids in whole for _, e in rows)] += 1
    assert 0.4 < drawn[1] / sum(drawn) < 0.7
