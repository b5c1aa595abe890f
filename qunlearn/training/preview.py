"""`qunlearn data check`: show how a file is understood, before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qunlearn.config.settings import LoraConfig
from qunlearn.config.training import TrainConfig
from qunlearn.data.paths import data_path
from qunlearn.data.records import Dataset, FieldNames, Record, read_dataset
from qunlearn.data.shared_text import shared_passages
from qunlearn.data.statistics import Histogram, overlap, repeated_prompts, word_count
from qunlearn.errors import ModelError
from qunlearn.hub.checked import check_model
from qunlearn.hub.download import ModelSource, fetch, go_offline, is_offline, resolve_model
from qunlearn.utils.console import clean, out, stage

if TYPE_CHECKING:
    from qunlearn.data.tokenize import Encoded, Example, Template
    from qunlearn.model.policy import Policy

_SHOWN_ROWS, _SHOWN_PAIRS, _SHOWN_CHARS = 2, 4, 400
_BAR_WIDTH = 40
_TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "tokenizer*", "vocab*", "merges*"]


@dataclass(frozen=True)
class PreviewOptions:
    """How `data check` looks at a file.

    `model`: whose tokenizer counts and whose template frames; without one words are counted.
    `tokens`: the rule by which answer tokens are marked that a run would push.
    """

    fields: FieldNames = field(default_factory=FieldNames)
    model: str | None = None
    against: str | None = None
    template: str = "auto"
    max_length: int = 512
    tokens: str = "specific"


@dataclass(frozen=True)
class _Tokenised:
    """`pushed`: the rows with the weights of their answers' tokens."""

    tokenizer: Any
    template: Template
    encoded: Encoded
    pushed: Sequence[Example]


def check_data(file: str, options: PreviewOptions, *, to_stdout: bool) -> dict[str, Any]:
    """Read a file as `forget` would, show what was understood, and return it; no text of a row is in the result.

    Raises DataError, ModelError, ConfigError.
    """
    dataset = read_dataset(data_path(file, stdin=True), options.fields, role="FILE")
    other = read_dataset(data_path(options.against), options.fields, role="--against") if options.against else None
    tokenised = _tokenise(dataset, other, options) if options.model else None
    unit, lengths = "words", [word_count(record) for record in dataset.records]
    if tokenised is not None:
        unit, lengths = "tokens", [len(example.input_ids) for example in tokenised.encoded.examples]
    result = {
        "file": dataset.path,
        "sha256": dataset.sha256,
        "shape": dataset.shape,
        "fields": list(dataset.fields),
        "other_fields": _other_fields(dataset),
        "rows": len(dataset.records),
        "duplicates": dataset.duplicates,
        "repeated_prompts": repeated_prompts(dataset),
        "earlier_answers": dataset.earlier,
        "unit": unit,
        "lengths": asdict(Histogram.of(lengths)),
        **(_tokens(tokenised, options) if tokenised else {}),
        "overlap": _overlap(dataset, other) if other else None,
    }
    if to_stdout:
        _show(result, _samples(dataset, tokenised))
    return result


def _overlap(dataset: Dataset, other: Dataset) -> dict[str, Any]:
    found = overlap(dataset, other)
    whole = {there for _, there in found.rows}
    passages = tuple(pair for pair in shared_passages(dataset, other) if pair[1] not in whole)
    return {"with": other.path, **asdict(found), "passages": passages}


def _other_fields(dataset: Dataset) -> dict[str, int]:
    """Fields that are neither prompt nor answer, and how many rows have them."""
    return dict(Counter(str(name) for record in dataset.records for name in record.meta))


# -- tokens ----------------------------------------------------------------------------------------------


def _tokenise(dataset: Dataset, other: Dataset | None, options: PreviewOptions) -> _Tokenised:
    name = options.model or ""
    folder = _tokenizer_folder(resolve_model(name))
    with stage("loading the tokenizer"):
        from qunlearn.data.tokenize import choose_template, encode
        from qunlearn.model.load import load_tokenizer
        from qunlearn.roles.token_weights import weigh

        tokenizer = load_tokenizer(folder)
    template = choose_template(tokenizer, options.template, dataset)
    encoded = encode(dataset, tokenizer, template, options.max_length)
    retain_rows = encode(other, tokenizer, template, options.max_length).examples if other else ()
    limit = TrainConfig().pass_tokens
    pushed = weigh(options.tokens, encoded.examples, retain_rows, tokenizer, template, lambda: _policy(name), limit)
    return _Tokenised(tokenizer, template, encoded, pushed)


def _policy(name: str) -> Policy:
    """The whole model, which the rule `context` asks. Raises ModelError."""
    from qunlearn.model.load import LoadSpec, load_base
    from qunlearn.model.policy import Policy

    checked = check_model(resolve_model(name))
    with stage("loading the model"):
        return Policy.new(load_base(checked.folder, LoadSpec()), LoraConfig())


def _tokenizer_folder(source: ModelSource) -> Path:
    """A model's folder; of a hub id the tokenizer's files alone are fetched. Raises ModelError."""
    folder = Path(source.location)
    if source.kind == "hub":
        offline = is_offline()
        try:
            folder = fetch(source, _TOKENIZER_FILES, offline=offline)
        except ModelError as error:
            hint = f"{error.hint}; or leave --model out: words are counted then"
            message = f"the tokenizer cannot be fetched: {error.message}"
            raise ModelError(message, where=source.location, hint=hint) from error
    go_offline()
    return folder


def _tokens(made: _Tokenised, options: PreviewOptions) -> dict[str, Any]:
    from qunlearn.roles.token_weights import count

    encoded = made.encoded
    return {
        "template": made.template.name,
        "template_why": made.template.why,
        "tokens": encoded.tokens,
        "trained_tokens": encoded.answer_tokens,
        "prompts_cut": encoded.prompts_cut,
        "windows": encoded.windows,
        "literal": encoded.literal,
        "specific": {"rule": options.tokens, "tokens": count(made.pushed), "normal": options.against},
    }


# -- for people ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """A row as it is trained: `trained` between what stands before and after it; `marked`: what would be pushed."""

    line: int
    before: str
    trained: str
    after: str
    marked: str = ""


def _samples(dataset: Dataset, made: _Tokenised | None) -> list[_Sample]:
    if made is None:
        return [_untokenised(record) for record in dataset.records[:_SHOWN_ROWS]]
    return [_decoded(example, made.tokenizer) for example in made.pushed[:_SHOWN_ROWS]]


def _untokenised(record: Record) -> _Sample:
    before = "\n".join(f"{role}: {content}" if role != "user" else content for role, content in record.turns)
    return _Sample(record.line, f"{before}\n" if before else "", record.completion, "")


def _decoded(example: Example, tokenizer: Any) -> _Sample:
    from qunlearn.roles.token_weights import marked

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    ids = example.input_ids
    parts = (ids[: example.start], ids[example.start : example.end], ids[example.end :])
    before, trained, after = map(text, parts)
    return _Sample(example.record.line, before, trained, after, marked(example, tokenizer))


def _show(result: dict[str, Any], samples: Sequence[_Sample]) -> None:
    _line(f"{result['file']}: {result['rows']} rows, {result['shape']} ({', '.join(result['fields'])})")
    if result["other_fields"]:
        _line("also there: " + ", ".join(f"{name} ({n})" for name, n in result["other_fields"].items()))
    if result["earlier_answers"]:
        _line(f"{result['earlier_answers']} dialogues have earlier answers, which are context: --turns all pushes each")
    _line(f"duplicates: {result['duplicates']} dropped; prompts asked again: {result['repeated_prompts']}")
    if "template" in result:
        _line(f"template: {result['template']}, {result['template_why']}")
        cut = f"; prompts cut: {result['prompts_cut']}" if result["prompts_cut"] else ""
        cut += f"; windows: {result['windows']}" if result["windows"] else ""
        cut += f"; rows with control tokens, which stay text: {result['literal']}" if result["literal"] else ""
        _line(f"tokens: {result['tokens']}, of which {result['trained_tokens']} are trained{cut}")
        _show_specific(result["specific"], result["trained_tokens"])
    for sample in samples:
        _show_sample(sample)
    _show_lengths(result["unit"], result["lengths"])
    if result["overlap"]:
        _show_overlap(result["overlap"])


def _show_specific(found: dict[str, Any], answer_tokens: int) -> None:
    share = f"{found['tokens']} of {answer_tokens} answer tokens ({100 * found['tokens'] / answer_tokens:.0f} %)"
    counted = f"words counted in {found['normal']}" if found["normal"] else "--against NORMAL counts them as a run does"
    why = counted if found["rule"] == "specific" else "what the model does not know from the last tokens alone"
    _line(f"--forget-tokens {found['rule']} would push {share}; {why}")


def _show_sample(sample: _Sample) -> None:
    """The trained part stands between guillemets, and is bold on a terminal."""
    from rich.text import Text

    trained = f"»{_short(sample.trained)}«"
    text = Text(f"\nline {sample.line}, trained between » and «:\n")
    text.append(clean(_short(sample.before, from_end=True)), style="dim")
    text.append(clean(trained), style="bold")
    text.append(clean(_short(sample.after)), style="dim")
    if sample.marked:
        text.append(f"\npushed between ‹ and ›: {clean(_short(sample.marked))}")
    out().print(text)


def _short(text: str, *, from_end: bool = False) -> str:
    if len(text) <= _SHOWN_CHARS:
        return text
    return f"…{text[1 - _SHOWN_CHARS :]}" if from_end else f"{text[: _SHOWN_CHARS - 1]}…"


def _show_lengths(unit: str, lengths: dict[str, Any]) -> None:
    edges, counts = lengths["edges"], lengths["counts"]
    _line(f"\n{unit} of a row: {lengths['least']} to {lengths['most']}, half of them at most {lengths['median']}")
    wide = len(str(edges[-1]))
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * -(-_BAR_WIDTH * count // max(counts))
        _line(f"  {low:>{wide}} - {high - 1:<{wide}} {bar} {count}")


def _show_overlap(found: dict[str, Any]) -> None:
    kinds = {
        "rows": "rows that say the same",
        "prompts": "rows with the same prompt, another answer",
        "answers": "rows with the same answer, another prompt",
        "passages": "rows that hold a passage of one, cut otherwise",
    }
    for name, what in kinds.items():
        pairs = found[name]
        listed = ", ".join(f"{here} and {there}" for here, there in pairs[:_SHOWN_PAIRS])
        more = f", and {len(pairs) - _SHOWN_PAIRS} more" if len(pairs) > _SHOWN_PAIRS else ""
        _line(f"in {found['with']} too: {len(pairs)} {what}" + (f" (lines {listed}{more})" if pairs else ""))


def _line(text: str) -> None:
    out().print(clean(text), markup=False)
