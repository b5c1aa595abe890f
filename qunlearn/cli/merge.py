"""The commands `qunlearn merge` and `qunlearn export`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qunlearn import api
from qunlearn.cli.ask import BaseModel, Device, Json, RunFolder, Trust
from qunlearn.cli.flags import take_parameters
from qunlearn.errors import GateError

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in that folder.")]
RunFolders = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Run folders of `qunlearn forget`, added in this order.")
]
MergeBase = Annotated[
    str, typer.Option(help="original: the 16-bit weights. dequantized: the weights the adapter was trained on.")
]
BadFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--bad", "--forget", help="The bad file, where it is not where the run found it."),
]
Gate = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="FORMS", help="Measure it quantised too: nf4, fp4, int8, or none. Default: nf4."),
]
Measure = Annotated[
    bool, typer.Option(help="Load what was written and measure it; takes the memory of the whole model.")
]
Format = Annotated[
    str,
    typer.Option(
        metavar="FORMAT",
        help="peft: the adapter alone, for peft and vLLM. merged: a whole model. gguf, gguf-lora: either one for "
        "llama.cpp, by its own converters.",
    ),
]
Form = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="FORM",
        help="merged: nf4, fp4 or int8, as bitsandbytes stores it. gguf: f16, bf16, f32, q8_0; with llama-quantize "
        "q4_0, q4_k_m, q5_k_m, q6_k.",
    ),
]
LlamaCpp = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="gguf: the folder of llama.cpp, where its converters are not on the PATH."),
]


def merge(*, json: bool, **options: Any) -> None:
    """Merge runs' adapters into their base: a model folder that needs nothing of ours, in little memory."""
    from qunlearn.utils.console import emit_json

    with api.together() as ranks:
        report = api.merge(**options)
        if json:
            emit_json(report.as_dict())
        if ranks.main:
            report.raise_if_back()
    if report.back:  # the main process has said so
        raise typer.Exit(GateError.exit_code)


take_parameters(
    merge, api.merge,
    {
        "runs": RunFolders, "output": Output, "base": MergeBase, "model": BaseModel, "bad": BadFile, "gate": Gate,
        "measure": Measure, "device": Device, "trust_remote_code": Trust, "overwrite": Overwrite,
    },
)  # fmt: skip


def export(
    run: RunFolder,
    output: Output,
    format: Format = "peft",
    quant: Form = None,
    llama_cpp: LlamaCpp = None,
    base: MergeBase = "original",
    model: BaseModel = None,
    bad: BadFile = None,
    measure: Measure = True,
    device: Device = "auto",
    trust: Trust = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write what others load: the adapter alone, or a merged model, in 16 bits or quantised."""
    from qunlearn.cli.flags import check_unused
    from qunlearn.merging.export_adapter import export_adapter, export_adapter_gguf
    from qunlearn.merging.request import MergeOptions, check_export, check_merge, gates
    from qunlearn.utils.console import emit_json

    check_export(format, quant, llama_cpp)
    if format in ("peft", "gguf-lora"):
        merging = {"--base": base != "original", "--bad": bad is not None, "--no-measure": not measure}
        loading = {"--model": model is not None, "--trust-remote-code": trust} if format == "peft" else {}
        check_unused(f"--format {format}", {**merging, "--device": device != "auto", **loading})
        if format == "peft":
            files = export_adapter(run, output, overwrite=overwrite)
        else:
            files = export_adapter_gguf(run, output, model, llama_cpp, overwrite=overwrite, trust=trust)
        if json:
            emit_json({"status": "done", "output": str(output), "files": files})
        return
    plain = format == "merged" and quant is None
    forms = gates(None, measure) if plain else ()  # what is written quantised is measured as it is
    request = check_merge([run], output, MergeOptions(base, model, bad, overwrite, measure, forms, trust))
    if format == "gguf":
        from qunlearn.merging.gguf import model_tools

        tools = model_tools(quant, llama_cpp)  # before torch is imported: they may not be there
    from qunlearn.merging.export import export_gguf, export_quantized
    from qunlearn.merging.merge import merge as merge_run

    if format == "gguf":
        report = export_gguf(request, quant, tools, device)
    else:
        report = export_quantized(request, quant, device) if quant else merge_run(request, device)
    if json:
        emit_json(report.as_dict())
    report.raise_if_back()


def add_carry(app: typer.Typer, guarded: Callable[..., Any]) -> None:
    """Both commands, each wrapped like the others."""
    for command in (merge, export):
        app.command()(guarded(command))
