"""Export GGUF for llama.cpp: a merged model, or the adapter alone, by llama.cpp's own converters."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.errors import AdapterError, ModelError
from qunlearn.hub.preflight import within
from qunlearn.hub.side_files import copy_into
from qunlearn.merging.llamacpp import (
    ADAPTER_FILE,
    CONVERTED,
    LORA_SCRIPT,
    MODEL_FILE,
    MODEL_SCRIPT,
    QUANTIZE,
    find_tool,
    run_tool,
)
from qunlearn.merging.lora_tensors import CONFIG, WEIGHTS, Update, read_adapter
from qunlearn.utils.console import say, stage, warn
from qunlearn.utils.files import write_json
from qunlearn.utils.json_files import read_object
from qunlearn.utils.output import Place
from qunlearn.utils.staging import staged
from qunlearn.utils.text import command_line

SIXTEEN = "auto"  # the 16-bit form that is nearest to the model's


@dataclass(frozen=True)
class ModelTools:
    """The commands that make a GGUF of a model: the converter, and what quantises further where that is asked for."""

    convert: Sequence[str]
    quantize: Sequence[str] | None


def model_tools(quant: str | None, folder: Path | None) -> ModelTools:
    """Raises ConfigError for a tool that is not there, with the line that does it by hand."""
    kind = quant if quant in CONVERTED else SIXTEEN
    convert = find_tool(MODEL_SCRIPT, folder, f"python {MODEL_SCRIPT} MERGED --outfile {MODEL_FILE} --outtype {kind}")
    if quant is None or quant in CONVERTED:
        return ModelTools(convert, None)
    return ModelTools(convert, find_tool(QUANTIZE, folder, f"{QUANTIZE} 16-BIT.gguf {MODEL_FILE} {quant.upper()}"))


def write_gguf(tools: ModelTools, merged: Path, made: Path, quant: str | None, name: str) -> None:
    """A GGUF file `made` of a merged model's folder. Raises ModelError for what the tools refuse."""
    kind = quant if quant in CONVERTED else SIXTEEN
    first = made.with_name("16-bit.gguf") if tools.quantize else made
    convert = [*tools.convert, str(merged), "--outfile", str(first), "--outtype", str(kind), "--model-name", name]
    run_tool(convert, "converting to GGUF", first)
    if tools.quantize and quant:
        run_tool([*tools.quantize, str(first), str(made), quant.upper()], f"quantising to {quant}", made)
        first.unlink()
    made.chmod(0o600)


def drop_code(folder: Path) -> None:
    """Take what names Python code out of a model's JSON files: the converter would trust it."""
    for path in sorted(folder.glob("*config.json")):
        found = read_object(path)
        if found.pop("auto_map", None) is not None:
            write_json(path, found)


def can_read_back(architecture: str) -> bool:
    """Return whether the GGUF file of a model can be read back to be measured, which takes the package gguf and a
    reader of transformers for its kind; say so if not."""
    if not importlib.util.find_spec("gguf"):
        warn("what was written is not measured: reading GGUF back needs `pip install gguf`")
        return False
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    if architecture.removesuffix("_text") in GGUF_SUPPORTED_ARCHITECTURES:
        return True
    warn(f"what was written is not measured: transformers does not read {architecture} from GGUF")
    return False


def read_back(made: Path, beside: Mapping[str, Path], config: Mapping[str, Any], folder: Path) -> None:
    """Write the model that a GGUF file holds as a folder that can be measured: its weights dequantised, to 16 bits.

    beside: the other files of the folder by name; config: its config.json. Raises ModelError.
    """
    folder.mkdir(mode=0o700)
    _save(_read(made), beside, config, folder)


def read_back_as(made: Path, base: Path, folder: Path, *, trust: bool) -> None:
    """Write the model of a GGUF file as `read_back` does, with the configuration and tokenizer of the base that it was
    made of. trust: whether code that the base brings is run. Raises ModelError for the file of another model."""
    from qunlearn.hub.preflight import read_config
    from qunlearn.hub.side_files import companions
    from qunlearn.merging.name_mapping import skeleton
    from qunlearn.merging.plan import plain_config

    wanted, model = skeleton(base, trust_remote_code=trust), _read(made)
    ours, theirs = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (wanted, model))
    if ours != theirs:
        differ = sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        hint = "give a GGUF file that was made of this very run"
        raise ModelError(f"is of another model than the run's base: {differ[0]} differs", where=str(made), hint=hint)
    _save(model, companions(base, trust_remote_code=trust), plain_config(read_config(base), trust), folder)


def _read(made: Path) -> Any:
    """The model of a GGUF file, in float16. Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM

    from qunlearn.model.quiet import quiet_transformers

    # By a link in a folder of its own: transformers would take in an adapter that lies beside the file. Its progress
    # bar asks nobody whether it is wanted.
    with (
        tempfile.TemporaryDirectory() as alone,
        stage("reading GGUF back"),
        quiet_transformers(),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        (Path(alone) / made.name).symlink_to(made.resolve())
        try:
            return AutoModelForCausalLM.from_pretrained(alone, gguf_file=made.name, dtype=torch.float16)
        except Exception as error:  # the reader and transformers raise many kinds for what they do not know
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            hint = "is the file whole, and does transformers read this architecture's GGUF?"
            raise ModelError(f"cannot be read: {first}", where=str(made), hint=hint) from error


def _save(model: Any, beside: Mapping[str, Path], config: Mapping[str, Any], folder: Path) -> None:
    from safetensors.torch import save_model

    save_model(model, str(folder / "model.safetensors"))
    copy_into(folder, beside)
    write_json(folder / "config.json", dict(config))


def adapter_gguf(adapter: Path, base: Path, place: Place, tools: Path | None) -> list[str]:
    """The adapter alone, for llama.cpp beside a GGUF of its base; returns the names of its files.

    A GGUF adapter has one alpha, divided by each tensor's rank: rsLoRA's is converted, alphas of single modules that
    no one number can say are refused. Raises QunlearnErrors.
    """
    by_hand = f"python {LORA_SCRIPT} ADAPTER --base {base} --outfile {ADAPTER_FILE}"
    convert = find_tool(LORA_SCRIPT, tools, by_hand)
    alpha = one_alpha(read_adapter(adapter), adapter)
    output = place.folder
    with staged(place) as folder:
        plain, made = folder / "adapter", folder / ADAPTER_FILE
        plain.mkdir()
        shutil.copyfile(within(adapter, adapter / WEIGHTS), plain / WEIGHTS)
        write_json(plain / CONFIG, _plain(read_object(within(adapter, adapter / CONFIG)), alpha))
        # In fp32, as it was trained: nothing is rounded, so there is nothing to measure again.
        command = [*convert, str(plain), "--base", str(base), "--outfile", str(made), "--outtype", "f32"]
        run_tool(command, "converting to GGUF", made)
        made.chmod(0o600)
        shutil.rmtree(plain)
    say(f"{(output / ADAPTER_FILE).stat().st_size / 2**20:.1f} MiB in {output / ADAPTER_FILE}")
    say(f"next: {command_line('llama-cli', '-m', 'BASE.gguf', '--lora', output / ADAPTER_FILE)}", style="bold")
    return [ADAPTER_FILE]


def one_alpha(updates: Sequence[Update], folder: Path) -> float:
    """scale * rank, which must be the same number for every module. Raises AdapterError."""
    alphas = {round(update.scale * update.a.shape[0], 6) for update in updates}
    if len(alphas) > 1:
        message = f"its modules have {len(alphas)} different alphas, and a GGUF adapter can say one"
        raise AdapterError(message, where=str(folder / CONFIG), hint="--format gguf, with the adapter merged in")
    return alphas.pop()


def _plain(config: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    return {**config, "lora_alpha": alpha, "use_rslora": False, "alpha_pattern": {}}
