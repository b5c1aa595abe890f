"""Recipes and chat templates that must be refused, and prompts that must come out harmless."""

from __future__ import annotations

from collections.abc import Iterator


def recipes() -> Iterator[tuple[str, bytes]]:
    yield "tag-python", b"model: !!python/object/apply:os.system ['touch evil_marker']"
    yield "tag-new", b"!!python/object/new:os.system [touch evil_marker]"
    yield "tag-module", b"model: !!python/module:evil_marker"
    yield "tag-name", b"train: {lr: !!python/name:os.system }"
    yield "tag-own", b"model: !evil {name: x}"
    yield "tag-binary", b"model: {name: !!binary aGVsbG8=}"
    yield "tag-set", b"model: !!set {a, b}"
    nine = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 10))
    yield "laughs", f"l0: &l0 [lol]\n{nine}\nmodel: {{name: *l9}}".encode()
    yield (
        "laughs-in-a-value",
        (
            "model:\n  name: &a0 [x, x]\n"
            + "\n".join(f"  n{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))
            + "\ntrain:\n  lr: *a9\n"
        ).encode(),
    )
    yield "merge-bomb", b"a: &a {x: 1}\nmodel: {<<: [*a, *a, *a], name: [1]}"
    yield "self-reference", b"model: &a {name: *a}"
    yield "undefined-alias", b"model: *nothing"
    yield "deep", b"model: " + b"[" * 20_000
    yield "deep-block", b"\n".join(b" " * i + b"a:" for i in range(1000))
    yield "too-long", b"# " + b"x" * (1 << 20) + b"\nmodel: {}"
    yield "long-number", b"train: {steps: " + b"9" * 5000 + b"}"
    yield "date", b"train: {steps: 2026-99-99}"
    yield "sexagesimal", b"train: {lr: 1:99:99:x}"
    yield "nul", b"model: {name: a\0b}"
    yield "latin", b"model: {name: \xe9}"
    yield "control", b"model: {name: \x1b[2J}"
    yield "tabs", b"model:\n\tname: x"
    yield "list", b"- a\n- b"
    yield "text", b"hello"
    yield "number-key", b"3: {a: 1}"
    yield "list-key", b"? [a, b]\n: 1"
    yield "unknown-section", b"modle: {name: x}"
    yield "unknown-key", b"model: {nmae: x}"
    yield "unknown-key-escape", b'model: {"\\e[2J": x}'
    yield "number-name", b"model: {1: x}"
    yield "section-list", b"model: [name]"
    yield "two-documents", b"model: {}\n---\nmodel: {}"
    for value in ("nan", ".nan", ".inf", "-1", "[]", "{}", "true", "1e999", "0x", "''"):
        yield f"steps-{value}", f"train: {{steps: {value}}}".encode()
    yield "batch-~", b"train: {batch_size: ~}"


def templates() -> Iterator[tuple[str, str]]:
    """Chat templates that must end as a ModelError, within the limits."""
    loop = "{% for i in range(99999) %}"
    end = "{% endfor %}"
    yield "loop-huge", "{% for i in range(10**12) %}x{% endfor %}"
    yield "loops-nested", loop * 3 + end * 3
    yield "loops-nested-output", loop * 2 + "x" + end * 2
    yield (
        "doubling",
        ("{% set n = namespace(a='xxxxxxxx') %}{% for i in range(64) %}{% set n.a = n.a ~ n.a %}{% endfor %}{{ n.a }}"),
    )
    yield "times", "{{ 'x' * 99999999999 }}"
    yield "power", "{{ 9 ** 9 ** 9 }}"
    yield "center", "{{ 'x'.center(99999999999) }}"
    yield "format", "{{ '%99999999999d' % 1 }}"
    yield "list-times", "{{ ([0] * 99999999999)|length }}"
    yield "grows", "{% for i in range(90000) %}{{ messages[0].content }} and on and on {% endfor %}"
    yield "recursion", "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}"
    yield "class", "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    yield "globals", "{{ cycler.__init__.__globals__.os.system('touch evil_marker') }}"
    yield "import", "{% import 'os' as os %}"
    yield "include", "{% include '/etc/passwd' %}"
    yield "syntax", "{% for %}"
    yield "raises", "{{ raise_exception('\x1b[2Jno') }}"
    yield "undefined", "{{ messages.nothing.at.all }}"
    yield "divides", "{{ 1 // 0 }}"
    yield "drops-the-answer", "hello"
    yield "mutates", "{% set _ = messages.append(1) %}"


def prompts() -> Iterator[tuple[str, str]]:
    yield "clear", "\x1b[2J\x1b[H"
    yield "title", "\x1b]0;owned\x07"
    yield "link", "\x1b]8;;http://x\x1b\\here\x1b]8;;\x1b\\"
    yield "bell", "\x07" * 5
    yield "backspace", "abc\x08\x08\x08xyz"
    yield "return", "safe\rEVIL"
    yield "c1", "\x9b2J"
    yield "bidi", "\u202egnp.exe"
    yield "markup", "[bold red]x[/] [link=http://x]y[/link] [/nothing]"
    yield "markup-open", "[/]" * 10
    yield "emoji", ":skull: :smiley:"
    yield "html", "<script>alert(1)</script><img src=x onerror=alert(1)>"
    yield "svg", "</svg><script>alert(1)</script>"
    yield "jinja", "{{ 7 * 7 }}{% for x in y %}"
    yield "percent", "%s%n%d {0} {prompt}"
    yield "template-word", "{prompt}{prompt}"


ODD_RECIPES: dict[str, str] = {
    "empty": "",
    "comments": "# nothing\n---\n...\n",
    "null": "~",
    "empty section": "train:\nlora:\n",
    "norway": "model: {name: no}",
    "yes": "output: {overwrite: yes}",
    "octal": "train: {steps: 010}",
    "exponent without a point": "train: {lr: 1e-3}",
    "sixty": "train: {steps: 1:30}",
    "date": "model: {name: 2026-01-01}",
    "underscores": "train: {steps: 1_000}",
    "quoted number": "train: {steps: '3'}",
    "plus": "train: {steps: +3}",
    "float for whole": "train: {steps: 3.0}",
    "half": "train: {steps: 3.5}",
    "true for a number": "train: {steps: true}",
    "duplicates": "train: {steps: 3}\ntrain: {clip: 2}",
    "duplicate leaves": "train: {steps: 3, steps: 4}",
    "merge key": "lora: &a {r: 4}\ntrain: {<<: *a}",
    "anchor": "train: {steps: &a 3, batch_size: *a}",
    "json": '{"train": {"steps": 3}}',
    "crlf": "train:\r\n  steps: 3\r\n",
    "bom": "\ufefftrain: {steps: 3}",
    "nel": "train:\x85  steps: 3",
    "unicode key": "tráin: {steps: 3}",
    "block text": "model:\n  name: |\n    sandbox\n",
    "folded": "model:\n  name: >\n    sand\n    box\n",
    "huge": "train: {steps: 1" + "0" * 4000 + "}",
    "tag of YAML itself": "train: {steps: !!int '3'}",
    "percent directive": "%YAML 9.9\n---\ntrain: {steps: 3}",
    "unclosed": "train: {steps: 3",
    "backtick": "train: `3`",
    "at": "model: @sandbox",
    "paths": "data: {bad: ~/x.jsonl, normal: $HOME/x}",
    "merge of nothing": "train: {<<: 3}",
}

ODD_TEMPLATES: tuple[str, ...] = (
    *("", " ", "raw", "qa", "chat", "auto", "RAW", "vicuna", "{prompt}", "{prompt}{prompt}", "{prompt", "prompt}"),
    *("{}", "{0}", "{prompt!r}", "{prompt:>99999999}", "{prompt.__class__}", "{system}{prompt}", "%s", "{{prompt}}"),
    *("\x1b[2J{prompt}", "{prompt}\0", "x" * 100_000 + "{prompt}", "{prompt}\udce9", "<|im_start|>{prompt}", "\n"),
    *("./t.jinja", "/dev/zero", "{% for i in range(10**9) %}{% endfor %}{prompt}", "</s>{prompt}</s>", "{PROMPT}"),
)
