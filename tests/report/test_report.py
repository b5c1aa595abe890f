"""The report: from records alone, complete, self-contained, and safe against what a row may say."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import call

from qunlearn.report.page import marked, plain, render
from qunlearn.report.read import read_story
from qunlearn.utils.file_names import ADAPTER, EVAL, METRICS, RECORD, REPORT

HOSTILE = [
    "</title></style><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "{{ 7 * 7 }} {% raw %}",
    '" onmouseover="alert(1)',
    "\u202eevil\u2066 \x00\x1b[31m",
    "]]><!-- -->",
]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """What a browser would find: every element balanced, every attribute, every text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def share(mean: float, n: int = 6) -> dict[str, Any]:
    return {"n": n, "mean": mean, "low": max(0.0, mean - 0.1), "high": min(1.0, mean + 0.1)}


def item(text: str, probability: float, verdict: str | None) -> dict[str, Any]:
    outputs = {"base": text, "adapter": f"not {text}"}
    values = {s: {"probability": probability, "truth_share": probability} for s in outputs}
    verdicts = {} if verdict is None else {"base": "still leaks", "adapter": verdict}
    return {"key": "k", "prompt": f"ask: {text}", "answer": text, "outputs": outputs, "verdicts": verdicts,
            "values": values}  # fmt: skip


def evaluation(texts: list[str]) -> dict[str, Any]:
    both = {"base": share(1.0), "adapter": share(0.0)}
    return {
        "model": f"models/{HOSTILE[0]}",
        "retrained_model": None,
        "quantization": "nf4",
        "suite": "basic",
        "files": {s: {"path": HOSTILE[1], "sha256": "0" * 64, "rows": len(texts)} for s in ("forget", "holdout")},
        "scores": {"base": {}, "adapter": {}},
        "measures": {
            "forget": {"leaks": both, "probability": both, "perplexity": both},
            "holdout": {"exact_match": {"base": share(1.0), "adapter": share(0.97)}},
        },
        "not_measured": {},
        "conclusion": {"level": "forgotten", "sentences": ["Verdict: gone.", HOSTILE[2]]},
        "items": {
            "forget": [item(t, 0.1 * i, "forgotten" if i % 2 else "gibberish") for i, t in enumerate(texts)],
            "holdout": [item(t, 0.9, None) for t in texts],
        },
    }


@pytest.fixture
def evaluated(tmp_path: Path) -> Path:
    result = {"suites": {"basic": evaluation(HOSTILE)}, "latest": "basic"}
    (tmp_path / EVAL).write_text(json.dumps(result), encoding="utf-8")
    return tmp_path


def check_safe(page: str) -> Page:
    """Nothing to run, nothing to fetch, no style that the policy would have to allow."""
    found = Page(page)
    for tag, attributes in found.tags:
        assert tag not in {"script", "iframe", "object", "embed", "link", "base", "form", "img", "foreignobject"}, tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "style", tag
            if name in ("href", "xlink:href", "src"):
                assert (value or "").startswith("#"), (tag, value)
            assert "url(" not in (value or "") or re.fullmatch(r"url\(#[\w-]+\)", value or ""), value
    policy = next(a["content"] for t, a in found.tags if t == "meta" and "http-equiv" in a) or ""
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    assert style is not None
    assert "@import" not in style[1] and "url(" not in style[1]
    return found


def test_hostile_texts_stay_texts(evaluated: Path) -> None:
    page = render(read_story(evaluated), include_samples=True)
    found = check_safe(page)
    for text in HOSTILE[:4]:
        assert f"ask: {text}" in found.text
    for character in "\u202e\u2066\x00\x1b":
        assert character not in page
    assert "49" not in page.split("<main>")[1].split("In pictures")[0]


@pytest.mark.parametrize(
    ("split", "measure", "headline"),
    [("holdout", "exact_match", "what it cost was not measured"), ("forget", "leaks", "Nothing to suppress")],
)
def test_only_what_was_measured_is_green(split: str, measure: str, headline: str, evaluated: Path) -> None:
    """Where the base scores nothing, nothing can be kept, or suppressed; whatever conclusion is stored beside it."""
    stored = json.loads((evaluated / EVAL).read_text(encoding="utf-8"))
    stored["suites"]["basic"]["measures"][split][measure]["base"] = share(0.0)
    (evaluated / EVAL).write_text(json.dumps(stored), encoding="utf-8")
    found = Page(render(read_story(evaluated), include_samples=False))
    assert headline in found.text
    shown = [a["class"] or "" for tag, a in found.tags if tag in ("section", "div") and a.get("class")]
    assert "verdict good" not in shown
    assert shown.count("tile good") == 1, "the other one"


def test_the_policys_hash_is_the_styles(evaluated: Path) -> None:
    import base64
    import hashlib

    page = render(read_story(evaluated), include_samples=False)
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    stated = re.search(r"sha256-([^']+)'", page)
    assert style is not None and stated is not None
    assert base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode() == stated[1]


def test_texts_are_in_it_only_where_asked_for(evaluated: Path) -> None:
    without = Page(render(read_story(evaluated), include_samples=False))
    assert "onerror" not in without.text.replace(HOSTILE[1], "", 2)  # the file's own name is in the provenance
    assert "ask: " not in without.text
    assert "3 gibberish" in without.text and "3 forgotten" in without.text
    marks = [a for t, a in without.tags if t == "span" and str(a.get("title", "")).startswith("row ")]
    assert len(marks) == 2 * len(HOSTILE)
    with_texts = Page(render(read_story(evaluated), include_samples=True))
    assert sum(t == "article" for t, _ in with_texts.tags) == 2 * len(HOSTILE)


def test_every_mark_that_occurs_can_be_filtered(evaluated: Path) -> None:
    page = render(read_story(evaluated), include_samples=True)
    found = Page(page)
    inputs = {a["id"] for t, a in found.tags if t == "input"}
    labels = {a["for"] for t, a in found.tags if t == "label"}
    used = {c for t, a in found.tags if t == "article" for c in str(a["class"]).split() if c != "pair"}
    assert inputs == labels == {"mark-all", *(f"mark-{c}" for c in used)}
    for mark in used:
        assert f"#mark-{mark}:checked ~ .pairs .pair:not(.{mark})" in page


def test_marked_words() -> None:
    assert marked("He was born in Tarn.", "born in Tarn") == [
        ("He was ", False), ("born", True), (" in ", False), ("Tarn", True), (".", False),
    ]  # fmt: skip
    assert marked("", "born") == []
    assert plain("a\u202eb\x07\n\tc") == "a\ufffdb\ufffd\n\tc"


@pytest.fixture(scope="module")
def measured_run(quick_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(quick_run, tmp_path_factory.mktemp("report") / "run"))
    for suite in ("basic", "tofu"):
        ran = call("eval", folder, "--data", "sandbox:hallucination", "--rows", 6, "--suite", suite)
        assert ran.code == 0, ran.stderr
    return folder


def test_a_run_from_end_to_end(measured_run: Path) -> None:
    ran = call("report", measured_run, "--json")
    assert ran.code == 0, ran.stderr
    path = measured_run / REPORT
    assert ran.json["report"] == str(path)
    assert path.stat().st_mode & 0o777 == 0o600
    page = path.read_text(encoding="utf-8")
    assert ran.json["bytes"] == len(page.encode())
    found = check_safe(page)
    for heading in (
        "In pictures",
        "Before and after: basic",
        "Before and after: tofu",
        "Answers",
        "What was not tested",
    ):
        assert heading in found.text, heading
    for title in ("Loss over steps", "Forgetting over steps", "Drift over steps", "Forgetting against drift",
                  "Forgetting against retention", "Row by row", "Right against wrong"):  # fmt: skip
        assert title in found.text, title
    assert sum(t == "svg" and a.get("role") == "img" for t, a in found.tags) == 7
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    references = {str(a["xlink:href"])[1:] for _, a in found.tags if "xlink:href" in a}
    assert references <= set(ids)
    record = json.loads((measured_run / RECORD).read_text())
    assert record["model"]["fingerprint"] in found.text
    for word in ("Orla", "Millbrook"):
        assert word not in page
    assert call("report", measured_run).code == 0
    assert path.read_text(encoding="utf-8") == page  # the same records, the same page


def test_with_samples(measured_run: Path, tmp_path: Path) -> None:
    ran = call("report", measured_run, "-o", tmp_path / "r.html", "--include-samples")
    assert ran.code == 0, ran.stderr
    found = check_safe((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "Where was Orla Finch born?" in found.text


def test_a_run_that_was_not_evaluated(quick_run: Path, tmp_path: Path) -> None:
    ran = call("report", quick_run, "-o", tmp_path / "r.html")
    assert ran.code == 0, ran.stderr
    found = check_safe((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "Trained, not yet evaluated" in found.text
    assert "run `qunlearn eval`" in found.text


def test_an_interrupted_run_ends_in_half_a_line(quick_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quick_run, tmp_path / "run"))
    with (folder / METRICS).open("a") as file:
        file.write('{"step": 13, "asc')
    assert len(read_story(folder).events) == 13


def test_what_was_measured_while_training_is_drawn(quick_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quick_run, tmp_path / "run"))
    assert "Forgotten and kept" not in Page(render(read_story(folder), include_samples=False)).text
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    for event in lines[::4]:
        of = {"n": 6, "exact_match": 1 - event["step"] / 12, "probability": 0.5}
        event["measured"] = {"forget": of, "holdout": {"n": 6, "exact_match": 1.0, "probability": float("nan")}}
    lines[8]["measured"] = {"$\\frac{": 3, "forget": "edited"}  # what is none of ours is left out
    (folder / METRICS).write_text("".join(json.dumps(event) + "\n" for event in lines))
    page = render(read_story(folder), include_samples=False)
    found = check_safe(page)
    assert "Forgotten and kept by step" in found.text
    pictures = [part.split("</svg>")[0] for part in page.split("<svg")[1:]]
    drawn = next(svg for svg in pictures if "What comes back and what stays" in svg)
    assert ">forget<" in drawn and ">holdout<" in drawn and ">normal" not in drawn
    assert "var(--bad)" in drawn and "var(--good)" in drawn


def test_what_a_person_can_get_wrong(tmp_path: Path, quick_run: Path) -> None:
    for folder, words in ((tmp_path / "none", "no such folder"), (tmp_path, "no run and no evaluation")):
        ran = call("report", folder)
        assert ran.code == 6, ran.stderr
        assert words in ran.stderr
    (tmp_path / EVAL).write_text("{oops")
    assert "edited or cut off" in call("report", tmp_path).stderr
    assert call("report", quick_run, "-o", tmp_path / "no" / "r.html").code == 9
    assert (quick_run / ADAPTER).is_dir()


def _metrics(text: bytes) -> Any:
    return lambda folder: (folder / METRICS).write_bytes(text)


def _record(change: Any) -> Any:
    def edit(folder: Path) -> None:
        record = json.loads((folder / RECORD).read_text())
        change(record)
        (folder / RECORD).write_text(json.dumps(record))

    return edit


def _evaluation(change: Any) -> Any:
    def edit(folder: Path) -> None:
        result = evaluation(["a", "b"])
        change(result)
        (folder / EVAL).write_text(json.dumps({"suites": {"basic": result}}))

    return edit


_STEP = b'{"step": 1, "ga": 0.5, "forget": 0.4, "drift": 0.1}\n'
_HUGE = b'{"step": 1, "ga": 1' + b"0" * 400 + b', "forget": 1e308, "drift": 1}\n{"step": 1' + b"0" * 400 + b"}\n"


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (_metrics(_STEP + b"\xff\xfe" + _STEP), 0),
        (_metrics(_STEP + _HUGE), 0),
        (_metrics(_STEP + b'{"step": true}\n{"step": -1}\n[[[\n'), 0),
        (_record(lambda r: r["training"].update(best={})), 6),
        (_record(lambda r: r["training"].update(best={"step": 1, "drift": "much"})), 6),
        (_record(lambda r: r.update(before={"forget": []})), 6),
        (_record(lambda r: r.update(data=[])), 6),
        (_record(lambda r: r["model"].update(asked="caf\udce9")), 0),
        (_evaluation(lambda r: r.update(measures=[])), 6),
        (_evaluation(lambda r: r["measures"]["forget"].update(leaks={"adapter": {"n": 1}})), 6),
        (_evaluation(lambda r: r["measures"].update({"$\\foo$": {}})), 6),
        (_evaluation(lambda r: r["scores"].update(stranger={})), 6),
        (_evaluation(lambda r: r["items"].update({"$\\foo$": [item("a", 0.5, None)]})), 0),
        (_evaluation(lambda r: r["items"]["forget"][0].update(outputs=["a"])), 6),
        (_evaluation(lambda r: r["conclusion"].update(level=[])), 6),
        (_evaluation(lambda r: r["measures"]["holdout"]["exact_match"].pop("base")), 0),
    ],
)
def test_a_damaged_run_is_told_or_refused_by_name(quick_run: Path, tmp_path: Path, damage: Any, code: int) -> None:
    run = Path(shutil.copytree(quick_run, tmp_path / "run"))
    for name in (EVAL, REPORT):
        (run / name).unlink(missing_ok=True)
    damage(run)
    ran = call("report", run)
    assert ran.code == code, ran.stderr
    if (run / EVAL).is_file():
        assert call("compare", run, run).code in (0, 6)
