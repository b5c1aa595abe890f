"""What is shown on a terminal, and signals from it."""

from __future__ import annotations

import io
import os
import signal

import pytest
from rich.console import Console

from qunlearn.utils import console, signals


def test_nothing_that_is_shown_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of folders come from elsewhere: an escape sequence in one is shown, and [/x] is no markup."""
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=200)
    monkeypatch.setattr(console, "err", lambda: terminal)
    name = "esc\x1b]0;OWNED\x07[/x][bold]run"
    with console.stage(f"merging {name}"):
        pass
    console.facts(name, [(name, name)])
    console.table(name, [console.Column(name)], [[name]])
    with console.Meter(name, 2) as meter:
        meter.at(1, name)
    assert "\x1b]0;" not in shown.getvalue() and shown.getvalue().count("[/x][bold]run") >= 7


def test_a_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """No code of an emoji is one, a tab is a tab, and what other languages write with is no control character."""
    text = "lst[:x:2] a[:m:]\tb :100: Qui\u00a0? \u6771\u4eac\u3000\u99c5 \u0645\u06cc\u200c\u062e"
    console.write_out(text)
    console.say(text.replace("\t", " "))
    printed = capsys.readouterr()
    assert printed.out == f"{text}\n"
    assert printed.err == text.replace("\t", " ") + "\n"
    assert console.clean("a\u202eb\x1bc\ud800") == "a\\x202eb\\x1bc\\xd800"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal")
def test_a_scheduler_ends_a_command_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(signals, "_asked", [])
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signals.as_interrupts()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        # A library that loses the exception does not lose the wish.
        with pytest.raises(KeyboardInterrupt), console.stage("planning"):
            pass
        signals.answered()
        with console.stage("planning"):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
