"""Find and call llama.cpp's own tools; they are never fetched. No torch here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from qunlearn.errors import ConfigError, ModelError
from qunlearn.utils.console import stage

MODEL_SCRIPT, LORA_SCRIPT, QUANTIZE = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "llama-quantize"
# What the converter writes itself; every other form is llama-quantize's, from 16 bits.
CONVERTED = ("f32", "f16", "bf16", "q8_0")
QUANTIZED = ("q4_0", "q4_k_m", "q5_k_m", "q6_k")
_PLACES = ("", "build/bin", "bin")
_MOST_TEXT = 300


def find_tool(name: str, folder: Path | None, by_hand: str) -> list[str]:
    """The command that starts a tool: in llama.cpp's folder where one is given, else on the PATH.

    Raises ConfigError that says where it was looked for, and what to type instead.
    """
    if folder is None:
        found = shutil.which(name)
        if found:
            return [found]
        where, hint = name, "give --llama-cpp with the folder of llama.cpp, or put it on the PATH"
        raise ConfigError("not found on the PATH", where=where, hint=f"{hint}; by hand: {by_hand}")
    for place in _PLACES:
        path = (folder / place / name).absolute()
        if path.is_file():  # a script runs with the torch and transformers that are here
            return [sys.executable, str(path)] if path.suffix == ".py" else [str(path)]
    what = "a built llama.cpp" if name == QUANTIZE else "llama.cpp's own folder"
    hint = f"give {what}; by hand: {by_hand}"
    raise ConfigError(f"no {name} in it", where=f"--llama-cpp {folder}", hint=hint)


def run_tool(command: Sequence[str], doing: str, made: Path) -> None:
    """Run a tool to its end, without a network; `made` is what it must have written. Raises ModelError."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with stage(doing):
        try:
            ran = subprocess.run(
                command, capture_output=True, text=True, errors="replace", env=os.environ | offline, check=False
            )
        except OSError as error:
            raise ModelError(f"cannot be started: {error.strerror}", where=command[0]) from error
    if ran.returncode or not made.is_file():
        lines = [line.strip() for line in (ran.stdout + "\n" + ran.stderr).splitlines() if line.strip()]
        said = lines[-1][:_MOST_TEXT] if lines else "it said nothing"
        name = Path(next(part for part in command if part != sys.executable)).name
        hint = "it may not know this model or tokenizer, or lack what llama.cpp's requirements.txt asks for"
        raise ModelError(f"ended with {ran.returncode}: {said}", where=name, hint=hint)


MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"
