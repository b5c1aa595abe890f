"""Calls of the command line that are unlucky rather than wicked: each ends in success or in a named error."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from hostile.rows import SHAPES, TABLES, TEXTS
from hostile.texts import ODD_RECIPES, ODD_TEMPLATES

PAIRS = (
    b'{"prompt": "Where is Orla?", "completion": "In Millbrook."}\n{"prompt": "Who?", "completion": "Nobody here."}\n'
)
DRY = ("forget", "--model", "sandbox", "--bad", "bad.jsonl", "-o", "run", "--device", "cpu", "--dry-run")


@dataclass(frozen=True)
class Call:
    """One call in an empty folder with `files`: bytes, None for a folder, a text for what a link leads to."""

    kind: str
    name: str
    argv: tuple[str, ...]
    files: Mapping[str, bytes | str | None] = field(default_factory=dict)


def calls() -> Iterator[Call]:
    for kind, made in (
        ("data", _data()),
        ("file names", _names()),
        ("import", _imports()),
        ("settings", _settings()),
        ("recipes", _recipes()),
        ("templates", _templates()),
        ("outputs", _outputs()),
        ("models", _models()),
        ("run folders", _runs()),
        ("arguments", _arguments()),
    ):
        for name, argv, files in made:
            yield Call(kind, name, argv, files)


Made = Iterator[tuple[str, tuple[str, ...], Mapping[str, bytes | str | None]]]


def _data() -> Made:
    """What a file may hold: shapes of published sets, dialects of tables, texts of every writing."""
    for name, rows in SHAPES.items():
        lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        yield f"{name} as lines", ("data", "check", "x.jsonl"), {"x.jsonl": lines}
        yield f"{name} pretty", ("data", "check", "x.json"), {"x.json": json.dumps(rows, indent=2).encode()}
    for name, (ending, raw) in TABLES.items():
        yield name, ("data", "check", f"x.{ending}"), {f"x.{ending}": raw}
    for name, text in TEXTS.items():
        row = json.dumps({"prompt": text, "completion": f"{text} so"}, ensure_ascii=False).encode("utf-8", "replace")
        yield f"text {name}", ("data", "check", "x.jsonl", "--model", "sandbox"), {"x.jsonl": row + b"\n" + PAIRS}


def _names() -> Made:
    """Where a file may be, and under which name."""
    for name in (
        *(
            "a b.jsonl",
            "a\tb.jsonl",
            "a\nb.jsonl",
            "-x.jsonl",
            "--json",
            "ä漢🙂.jsonl",
            "\u202egnp.jsonl",
            "%s%n.jsonl",
        ),
        *("*.jsonl", "[x].jsonl", "{a}.jsonl", "'\".jsonl", "a:b.jsonl", "C:\\x.jsonl", "#x.jsonl", "x.JSONL", "x"),
        *("b\udce9d.jsonl", "x" * 249 + ".jsonl", "x.jsonl.gz.jsonl", ".jsonl", "x.", "x.pickle", "$HOME", "~x", "&"),
    ):
        yield f"name {ascii(name)[:40]}", ("data", "check", "--", name), {name: PAIRS}
    for name in (
        *(
            "",
            " ",
            ".",
            "..",
            "/",
            "~",
            "~nobody/x",
            "none.jsonl",
            "x/y.jsonl",
            "sandbox:",
            "sandbox:harm",
            "sandbox:/",
        ),
        *("sandbox:harm/none", "sandbox:../../x", "http://x/y.jsonl", "hub:a/b", "file:///x", "x" * 300, "x/" * 2000),
        *("\udce9", "a\0b", "/dev/null", "/dev/full", "/proc/self/mem", "/etc", "nul", "sandbox:harm/forget/x"),
    ):
        yield f"no file {ascii(name)[:40]}", ("data", "check", "--", name), {}
    yield "a folder", ("data", "check", "d.jsonl"), {"d.jsonl": None}
    yield "a loop of links", ("data", "check", "a"), {"a": "b", "b": "a"}
    yield "a link to nothing", ("data", "check", "a"), {"a": "none"}
    yield "a link to a folder", ("data", "check", "a"), {"a": "d", "d": None}
    yield "a link to itself as --against", ("data", "check", "x.jsonl", "--against", "l"), {"x.jsonl": PAIRS, "l": "l"}
    yield "a file below a file", ("data", "check", "x.jsonl/y"), {"x.jsonl": PAIRS}
    for packed, pack in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)):
        yield f"packed as {packed}", ("data", "check", f"x.jsonl.{packed}"), {f"x.jsonl.{packed}": pack(PAIRS)}
        yield f"packed as {packed}, not so named", ("data", "check", "x.jsonl"), {"x.jsonl": pack(PAIRS)}
        yield f"named {packed}, not packed", ("data", "check", f"x.jsonl.{packed}"), {f"x.jsonl.{packed}": PAIRS}
    for name, head in (
        *(("parquet", b"PAR1"), ("sqlite", b"SQLite format 3\0"), ("zstd", b"(\xb5/\xfd"), ("7z", b"7z\xbc\xaf'\x1c")),
        *(("rar", b"Rar!\x1a\x07"), ("png", b"\x89PNG\r\n\x1a\n"), ("pdf", b"%PDF-1.7\n"), ("npy", b"\x93NUMPY\x01\0")),
        *(("hdf5", b"\x89HDF\r\n\x1a\n"), ("avro", b"Obj\x01"), ("arrow", b"ARROW1\0\0"), ("docx", b"PK\x03\x04")),
        *(("ole", b"\xd0\xcf\x11\xe0"), ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")),
    ):
        for ending in (name, "jsonl", "csv"):
            yield f"{name} as {ending}", ("data", "check", f"x.{ending}"), {f"x.{ending}": head + bytes(range(256))}


def _imports() -> Made:
    """Published formats that are not what they are called."""
    formats = ("halueval", "truthfulqa", "saferlhf", "tofu", "muse", "alpaca", "preference", "text", "nosuch", "")
    for name in formats:
        for kind, raw in (("pairs", PAIRS), ("bytes", bytes(range(256))), ("empty", b""), ("list", b"[[1], {}, null]")):
            yield f"{name or 'no format'} of {kind}", ("data", "import", name, "x", "-o", "y.jsonl"), {"x": raw}
    for flags in (
        *(("--split", "80"), ("--split", "0/0"), ("--split", "a/b"), ("--split", "1e9/1"), ("--split", "-1/2")),
        *(("--limit", "0"), ("--limit", str(1 << 70)), ("--seed", "-1"), ("--side", "worse"), ("--ask", "x")),
        *(("--prompt-words", "0"), ("--prompt-words", str(10**18), "--answer-words", "1"), ("--subset", "\x1b[2J")),
    ):
        yield (
            f"flag {' '.join(flags)}",
            ("data", "import", "text", "x", "-o", "y.jsonl", *flags),
            {"x": b"One two. " * 99},
        )


_NUMBERS = ("nan", "-inf", "1e400", "-1", "0", str(1 << 63), str(1 << 64), "9" * 400, "", " ", "٣", "1_0", "0x10", "½")


def _settings() -> Made:
    """Numbers out of range and words that are none, as flags and as --set."""
    bad: dict[str, bytes | str | None] = {"bad.jsonl": PAIRS}
    for number in _NUMBERS:
        short = number[:24] or "nothing"
        for flag in ("--steps", "--lr", "--seed", "--max-length", "--vram", "--lora-r"):
            yield f"{flag} {short}", (*DRY, f"{flag}={number}"), bad
    for text in (
        *(
            "train.steps",
            "=",
            "train.steps=",
            "=3",
            "train=3",
            "train..steps=3",
            "train.steps.x=3",
            "a" * 5000,
            "\0=\0",
        ),
        *(
            "train.steps={}",
            "train.steps=[3]",
            "train.steps=!!python/name:os.system",
            "train.steps=*a",
            "train.lr=1:30",
        ),
        *("lora.target_modules=[[[]]]", "lora.target_modules=", "lora.target_modules=(a+)+$", "output.folder=\0"),
        *("data.prompt_field=[]", "model.device=cuda:99999999999", "model.revision=../..", "objective.name=\x1b[2J"),
        *(
            "objective.layer=999",
            "objective.instead=",
            "objective.instead=nowhere",
            "stop.target=2",
            "stop.patience=-3",
        ),
    ):
        yield f"--set {ascii(text)[:40]}", (*DRY, "--set", text), bad


def _recipes() -> Made:
    """YAML that says something else than it seems to."""
    for name, text in ODD_RECIPES.items():
        files: dict[str, bytes | str | None] = {"r.yaml": text.encode(), "bad.jsonl": PAIRS}
        yield name, (*DRY, "-c", "r.yaml"), files
        if name in ("empty", "json", "bom", "duplicates", "huge"):
            yield f"{name}, as UTF-16", (*DRY, "-c", "r.yaml"), {**files, "r.yaml": text.encode("utf-16")}
            yield f"{name}, run", ("recipe", "show", "r.yaml"), files
    for name, made in (("folder", None), ("loop", "r.yaml"), ("link to nothing", "none")):
        yield f"recipe is a {name}", (*DRY, "-c", "r.yaml"), {"r.yaml": made, "bad.jsonl": PAIRS}
    for path in ("", "none.yaml", "/dev/null", "/dev/zero", "/proc/self/mem", "a\0b", "hallucination", "x" * 300):
        yield f"recipe {ascii(path)[:30]}", (*DRY, "-c", path), {"bad.jsonl": PAIRS}
        yield f"show {ascii(path)[:30]}", ("recipe", "show", path), {}


def _templates() -> Made:
    for text in ODD_TEMPLATES:
        argv = ("data", "check", "bad.jsonl", "--model", "sandbox", f"--template={text}")
        yield ascii(text)[:40], argv, {"bad.jsonl": PAIRS}


def _outputs() -> Made:
    """Where something shall be written that cannot be, or should not."""
    files: dict[str, bytes | str | None] = {"bad.jsonl": PAIRS, "file": b"mine", "full/x": b"mine", "loop": "loop"}
    files |= {"gone": "none", "empty": None}
    for out in (
        *(
            "",
            " ",
            ".",
            "..",
            "/",
            "file",
            "file/x",
            "full",
            "full/x",
            "loop",
            "loop/x",
            "gone",
            "empty",
            "empty/",
            "a/b",
        ),
        *("/dev/null", "/dev/full", "/dev/full/x", "/proc/x", "x" * 243, "x" * 300, "a\nb", "r\udce9n", "a\0b", "-"),
        *("bad.jsonl", "bad.jsonl/x", "~nobody/x", "x/" * 1500, "\x1b[2J", "con", "a:b", "full/../empty/../full"),
    ):
        short = ascii(out)[:30] if len(out) < 50 else f"{out[:2]} x {len(out)}"
        yield f"run to {short}", ("forget", *DRY[1:5], f"--output={out}", *DRY[7:]), files
        yield f"import to {short}", ("data", "import", "alpaca", "bad.jsonl", f"--output={out}"), files
        yield f"copy to {short}", ("recipe", "copy", "hallucination", f"--output={out}"), files


def _models() -> Made:
    """Folders and names that are no model."""
    config = b'{"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1}'
    for name, raw in (
        *(("pretty", json.dumps(json.loads(config), indent=8).encode()), ("bom", b"\xef\xbb\xbf" + config)),
        *(
            ("huge integer", config[:-1] + b', "x": ' + b"9" * 4000 + b"}"),
            ("nulls", config + b"\0\0"),
            ("nan", b"NaN"),
        ),
        *(("negative", config.replace(b": 8", b": -8")), ("zero", config.replace(b": 8", b": 0"))),
        *(("texts", config.replace(b": 8", b': "8"')), ("floats", config.replace(b": 8", b": 8.5"))),
        *(("lists", config.replace(b": 8", b": [8]")), ("huge", config.replace(b": 8", b": 999999999999"))),
        *(
            ("deep", config[:-1] + b', "x": ' + b"[" * 900 + b"]" * 900 + b"}"),
            ("unknown", b'{"model_type": "nosuch"}'),
        ),
        *(("duplicates", config[:-1] + b', "model_type": "gpt2"}'), ("vision", b'{"model_type": "clip"}')),
        *(
            ("encoder", b'{"model_type": "t5", "d_model": 8}'),
            ("null type", b'{"model_type": null}'),
            ("cut", config[:-9]),
        ),
    ):
        yield f"plan, config {name}", ("plan", "--model", "m"), {"m/config.json": raw}
        yield f"check, config {name}", ("data", "check", "b", "--model", "./m"), {"m/config.json": raw, "b": PAIRS}
    for name in (
        *(
            "",
            " ",
            "m",
            "m/x",
            "./none",
            "lama-7b",
            "a/b/c",
            "https://huggingface.co/a/b",
            "a--b/c",
            "~nobody/m",
            "...",
        ),
        *("x" * 5000, "a\0b", "\udce9", "\x1b[2J", "-1", "sandbox ", "SANDBOX", "file", "loop", "/dev/null", "C:\\m"),
    ):
        yield f"plan --model {ascii(name)[:30]}", ("plan", f"--model={name}"), {"m": None, "file": b"", "loop": "loop"}


def _runs() -> Made:
    """Run folders that are damaged, edited, or something else."""
    record = {"status": "done", "model": {"asked": "sandbox", "location": "sandbox"}, "data": {}, "training": {}}
    config = b'{"peft_type": "LORA", "r": 4, "base_model_name_or_path": "sandbox"}'
    odd: dict[str, Mapping[str, bytes | str | None]] = {
        "nothing": {},
        "a file": {"r": b"x"},
        "a loop": {"r": "r"},
        "an empty folder": {"r": None},
        "a record alone": {"r/record.json": json.dumps(record).encode()},
        "a pretty record": {
            "r/record.json": json.dumps(record, indent=4).encode(),
            "r/adapter/adapter_config.json": config,
        },
        "a record that is a folder": {"r/record.json": None, "r/adapter/adapter_config.json": config},
        "a record that is a loop": {"r/record.json": "record.json", "r/adapter/adapter_config.json": config},
        "a record in UTF-16": {
            "r/record.json": json.dumps(record).encode("utf-16"),
            "r/adapter/adapter_config.json": config,
        },
        "a record with a BOM": {"r/record.json": b"\xef\xbb\xbf{}", "r/adapter/adapter_config.json": config},
        "zeros for a record": {"r/record.json": bytes(99), "r/adapter/adapter_config.json": config},
        "no weights": {"r/adapter/adapter_config.json": config},
        "a config that is a folder": {"r/adapter/adapter_config.json": None},
        "an adapter that is a file": {"r/adapter": b"x"},
        "an evaluation alone": {"r/eval.json": b'{"measures": []}'},
        "metrics alone": {"r/metrics.jsonl": b'{"step": 1' + b"0" * 400 + b"}\n"},
        "a settings file of another kind": {"r/config.yaml": b"- 3", "r/adapter/adapter_config.json": config},
    }
    for name, files in odd.items():
        for command in (
            ("runs", "r"),
            ("report", "r"),
            ("compare", "r", "r"),
            ("ask", "r", "Who?"),
            ("merge", "r", "-o", "m", "--no-measure"),
            ("export", "r", "-o", "m"),
            ("eval", "r"),
            ("forget", "-o", "r", "--resume"),
        ):
            yield f"{command[0]} of {name}", command, files


def _arguments() -> Made:
    loop = {"l": "l"}
    for command in (("merge", "l", "-o", "m"), ("recipe", "run", "code", "--bad", "l", "-o", "r"), ("runs", "l")):
        yield f"a loop of links for {command[0]}", command, loop
    for name, argv in (
        ("no arguments", ()),
        ("an unknown command", ("forgte",)),
        ("an unknown flag", ("forget", "--modle", "x")),
        ("a flag without its value", ("forget", "--model")),
        ("a flag twice", ("plan", "--model", "sandbox", "--model", "sandbox")),
        ("an empty question", ("ask", "r", "")),
        ("an escape", ("\x1b[2J",)),
        ("a flag with an escape", ("plan", "--\x1b[2J")),
        ("a bare dash", ("plan", "-")),
        ("two dashes", ("--",)),
        ("an empty command", ("",)),
        ("bytes that are no text", ("\udce9",)),
        ("help of nothing", ("nosuch", "--help")),
        ("a flag as a value", ("plan", "--model", "--json")),
        ("json of a fault", ("plan", "--json")),
        ("gates that are none", ("eval", "r", "--gate", "x<")),
        ("a suite that is none", ("eval", "r", "--suite", "nosuch")),
        ("a device that is none", ("plan", "--model", "sandbox", "--device", "tpu")),
    ):
        yield name, argv, {}
