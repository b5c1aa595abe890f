"""A guarded model behind transformers' own server, asked as a client of OpenAI's asks; and what is refused."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from conftest import call
from transformers.utils.import_utils import is_serve_available

from qunlearn.data.records import read_dataset
from qunlearn.errors import ModelError
from qunlearn.guard import Guard
from qunlearn.guard.serve import guarded_loading
from qunlearn.sandbox import data_file

served = pytest.mark.skipif(not is_serve_available(), reason="needs pip install 'qunlearn[serve]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "guard"
    given = ("--model", "sandbox", "--bad", "sandbox:code/forget", "--normal", "sandbox:code/retain", "--rows", 16)
    ran = call("guard", "fit", *given, "-o", out, "--strength", "agnostic", "--device", "cpu")
    assert ran.code == 0, ran.stderr
    return out


def asked(port: int, model: str, prompts: list[str], **more: Any) -> list[str]:
    out = []
    for prompt in prompts:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 16, "temperature": 0}
        address = f"http://127.0.0.1:{port}/v1/chat/completions"
        request = urllib.request.Request(address, json.dumps({**body, **more}).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            out.append(json.load(answer)["choices"][0]["message"]["content"])
    return out


def started(model: Path) -> tuple[Any, int]:
    from transformers.cli.serve import Serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(force_model=str(model), device="cpu", host="127.0.0.1", port=port, non_blocking=True)
    for _ in range(200):
        if server.server.started:
            break
        time.sleep(0.05)
    return server, port


@served
def test_flagged_questions_are_answered_otherwise_and_the_rest_as_by_the_bare_server(
    folder: Path, sandbox_folder: Path
) -> None:
    bad, kept = ([r.prompt for r in read_dataset(data_file("code", s)).records[:4]] for s in ("forget", "general"))
    answers = []
    for guard in (None, Guard.open(folder)):
        if guard is None:
            server, port = started(sandbox_folder)
        else:
            with guarded_loading(guard, sandbox_folder):
                server, port = started(sandbox_folder)
        try:
            answers.append((asked(port, str(sandbox_folder), bad), asked(port, str(sandbox_folder), kept)))
        finally:
            server.kill_server()
    (bare_bad, bare_kept), (guarded_bad, guarded_kept) = answers
    assert guarded_kept == bare_kept and all(bare_bad)
    assert sum(a != b for a, b in zip(bare_bad, guarded_bad, strict=True)) >= 3


@pytest.mark.slow
@pytest.mark.skipif(is_serve_available(), reason="the packages are installed")
def test_missing_packages_are_named(folder: Path) -> None:
    ran = call("guard", "serve", folder, "--model", "sandbox", "--device", "cpu")
    assert ran.code == ModelError.exit_code and "qunlearn[serve]" in ran.stderr
