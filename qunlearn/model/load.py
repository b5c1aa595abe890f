"""Load a checked folder as a base model in 4-bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qunlearn.config.settings import Config, ModelConfig
from qunlearn.data.batch import Batch
from qunlearn.errors import DoesNotFitError, ModelError, is_out_of_memory
from qunlearn.hub.preflight import TOKENIZERS, read_config
from qunlearn.memory.gpus import plan_answers
from qunlearn.memory.step import CACHE_BYTES
from qunlearn.model.device import choose_dtype, device_facts
from qunlearn.model.gpus import SHARDED, Spans, chosen_devices, least_dtype, module_devices
from qunlearn.model.head import Head
from qunlearn.model.host_embedding import keep_embeddings_on_host
from qunlearn.model.kernels.attention import layout_arguments, use_layouts
from qunlearn.model.kernels.fused import fuse
from qunlearn.model.quantized_head import keep_head_in_8_bits
from qunlearn.model.quiet import quiet_transformers


@dataclass(frozen=True)
class LoadSpec:
    """How a base is loaded. `quant`: nf4, fp4, int8 or none; `device`: auto, cpu, cuda or cuda:N.

    `as_stored`: in the checkpoint's own dtype, to be written again, rather than in the one that computes best.
    `host_embeddings`: the input embeddings stay in the host's memory. `head`: full, or in 8bit. `cache_bytes`: of a
    batch that is generated. `device_map`: none, auto, over all GPUs, or fsdp, to be sharded; `spans`: the blocks of
    each GPU (from, up to but not including), where the memory plan has said so.
    """

    quant: str = "nf4"
    double_quant: bool = True
    device: str = "auto"
    trust_remote_code: bool = False
    as_stored: bool = False
    host_embeddings: bool = False
    head: str = "full"
    cache_bytes: int = CACHE_BYTES
    device_map: str = "none"
    spans: Spans = ()


def load_spec(m: ModelConfig, *, quant: str | None = None, device: str | None = None) -> LoadSpec:
    """Return how a run's settings load its base; in another form where `quant` is given, its head included, and on one
    device where a certain one is named."""
    return LoadSpec(
        quant or m.quant,
        m.double_quant,
        device or m.device,
        m.trust_remote_code,
        host_embeddings=m.embeddings == "cpu",
        head="full" if quant else m.head,
        device_map="auto" if m.device_map == "auto" and device in (None, "auto", m.device) else "none",
    )


@dataclass(frozen=True)
class Base:
    """A frozen base model, its tokenizer and head, and what was decided while loading it.

    `device`: where rows come in and hidden states come out; `gpus`: all that the model is laid over, where several.
    """

    model: Any
    tokenizer: Any
    head: Head
    device: torch.device
    folder: Path
    quantization: str  # "nf4+dq, bf16 compute", "none (bfloat16)", "gptq, as the checkpoint has it", ...
    notes: tuple[str, ...]
    cache_bytes: int = CACHE_BYTES
    gpus: tuple[torch.device, ...] = ()
    spans: Spans = ()
    counted: int = 0  # parameters, where the model cannot count its own

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return self.gpus or (self.device,)

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states (B, T, D): what the head multiplies."""
        placed: dict[str, Any] = {}
        if batch.layout is not None:
            placed = layout_arguments(batch)
        elif batch.mask is not None:
            placed = {"attention_mask": batch.mask, "position_ids": batch.position_ids}
        out = backbone(self.model)(input_ids=batch.input_ids, **placed)
        return out.last_hidden_state  # type: ignore[no-any-return]

    def hidden_behind(self, batch: Batch, layer: int) -> Tensor:
        """Hidden states behind block `layer` (B, T, D), from 0; the blocks above it are not computed."""
        blocks = decoder_blocks(self.model)
        above, tap = blocks[layer + 1], _Tap(blocks[layer + 1])
        blocks[layer + 1] = tap
        try:
            self.hidden(batch)
        except _Reached as reached:
            return reached.hidden.to(self.device)  # another GPU's block may have computed them
        finally:
            blocks[layer + 1] = above
        raise ModelError(f"block {layer + 1} was never reached", where="objective.layer", hint="choose a lower one")

    @property
    def blocks(self) -> int:
        return len(decoder_blocks(self.model))

    @property
    def parameters(self) -> int:
        return self.counted or int(self.model.num_parameters())

    @property
    def bytes(self) -> int:
        return int(self.model.get_memory_footprint())


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer, with a pad token. Raises ModelError."""
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in TOKENIZERS):
        # For some architectures transformers makes one up that has no tokens.
        hint = "copy tokenizer.json (or the vocabulary) and tokenizer_config.json of the same model beside it"
        raise ModelError("no tokenizer files", where=str(folder), hint=hint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # every tokenizer library has its own exceptions
        raise ModelError(f"the tokenizer cannot be loaded: {_first_line(error)}", where=str(folder)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a panic of the tokenizers library is no Exception
            raise
        raise ModelError("the tokenizer is damaged: its library gave up", where=str(folder)) from error
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so any token will do; the end-of-text token is never out of range.
        tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    return tokenizer


def load_base(folder: Path, spec: LoadSpec) -> Base:
    """Load a checked folder (see `source.preflight_folder`) as a frozen base.

    Raises ModelError, DeviceError, DoesNotFitError.
    """
    gpus, notes = chosen_devices(spec.device, spec.device_map), []
    device, dtype = gpus[-1], least_dtype(gpus)
    if dtype is torch.float16:
        notes.append("this GPU has no bf16: computing in fp16, which is less stable")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # transformers raises many kinds for a config it does not know
        hint = "is transformers recent enough for this architecture?"
        raise ModelError(_first_line(error), where=str(folder / "config.json"), hint=hint) from error
    if spec.device_map == SHARDED:  # from here it goes to the GPUs in shards
        device = torch.device("cpu")
        gpus = (device,)
    spans = spec.spans or _spans(folder, spec, gpus)
    placed = _module_devices(config, spans, gpus, spec.trust_remote_code)
    options: dict[str, Any] = {"config": config, "dtype": "auto" if spec.as_stored else dtype, "device_map": placed}
    if (stored := getattr(config, "quantization_config", None)) is not None:
        kind = stored.get("quant_method", "?") if isinstance(stored, dict) else stored.quant_method
        quantization = f"{kind}, as the checkpoint has it{_head(spec)}"
        notes.append(f"the checkpoint is already quantised ({kind}): loaded as it is, --quant {spec.quant} not applied")
    else:
        quantization = describe_quantization(spec, dtype)
        if spec.quant != "none":
            options["quantization_config"] = bnb_config(spec, dtype)
    with quiet_transformers(), _named_load_errors(folder, spec.quant):
        model: Any
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=spec.trust_remote_code, output_loading_info=True, **options
        )
    if absent := sorted(loaded["missing_keys"]):
        message = f"{len(absent)} tensors of the architecture are not in the weights, {absent[0]} first"
        raise ModelError(message, where=str(folder), hint="copy the model again; is a shard missing?")
    keep_training_path(model)
    use_layouts(model)
    if device.type == "cuda":
        fuse(model if len(gpus) == 1 else decoder_blocks(model))  # to a fused norm outside them nothing is moved
    # A table that both use is rounded on its way back from the host.
    if spec.host_embeddings:
        notes.append(keep_embeddings_on_host(model, shared=spec.head == "8bit"))
    if spec.head == "8bit":
        notes.append(keep_head_in_8_bits(model, device))
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    tokenizer = _fitting_tokenizer(model, folder, spec)
    base = Base(model, tokenizer, Head.of(model), device, folder, quantization, tuple(notes), spec.cache_bytes)
    if len(gpus) > 1:
        base = replace(base, gpus=gpus, spans=spans)
    _check_head(base)
    return base


def _fitting_tokenizer(model: Any, folder: Path, spec: LoadSpec) -> Any:
    """The tokenizer of the folder. Raises ModelError where it has tokens that the model does not embed."""
    tokenizer = load_tokenizer(folder, trust_remote_code=spec.trust_remote_code)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        hint = "the tokenizer belongs to another model"
        raise ModelError("the tokenizer has more tokens than the model embeds", where=str(folder), hint=hint)
    return tokenizer


def _spans(folder: Path, spec: LoadSpec, gpus: tuple[torch.device, ...]) -> Spans:
    """The blocks of each GPU where no plan of a run has said so. Raises DoesNotFitError, ModelError."""
    if len(gpus) == 1:
        return ()
    settings = Config(model=ModelConfig(quant=spec.quant, double_quant=spec.double_quant, head=spec.head))
    facts = [device_facts(gpu) for gpu in gpus]
    return plan_answers(settings, read_config(folder), facts).spans


def _module_devices(config: Any, spans: Spans, gpus: tuple[torch.device, ...], trusted: bool) -> dict[str, str]:
    """Return what transformers takes as `device_map`. Raises ModelError."""
    if len(gpus) == 1:
        return {"": str(gpus[0])}
    with quiet_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    return module_devices(model, decoder_blocks(model), spans, gpus)


def dequantized(base: Base) -> Base:
    """The base with weights, in the dtype it computes in, that hold exactly what its quantised ones mean."""
    model = base.model.dequantize(dtype=choose_dtype(base.device)) if _is_quantized(base.model) else base.model
    return replace(base, model=model, head=Head.of(model), quantization=f"dequantised {base.quantization}")


def decoder_blocks(model: Any) -> torch.nn.ModuleList:
    """The list of decoder blocks: the longest list of modules in the model. Raises ModelError."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    if not lists:
        raise ModelError("no list of decoder blocks in this architecture", hint="choose another objective than rmu")
    return max(lists, key=len)


class _Reached(Exception):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Tap(torch.nn.Module):
    """Stands in for a block and ends the forward pass in front of it."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self._block = [block]  # in a list: not a submodule

    def __getattr__(self, name: str) -> Any:  # what the body asks of a block before it calls it
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(hidden)


def backbone(model: Any) -> Any:
    """The decoder below the output head: its `last_hidden_state` is what the head multiplies."""
    return getattr(model, model.base_model_prefix)


def _is_quantized(model: Any) -> bool:
    return getattr(model, "hf_quantizer", None) is not None


def bnb_config(spec: LoadSpec, dtype: torch.dtype) -> BitsAndBytesConfig:
    if spec.quant == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quant,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def describe_quantization(spec: LoadSpec, dtype: torch.dtype) -> str:
    """Return how a model that is not stored quantised is loaded, in words."""
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    if spec.as_stored:
        return "none (as stored)"
    if spec.quant == "none":
        return f"none ({short}){_head(spec)}"
    double = " + double quantisation" if spec.double_quant and spec.quant != "int8" else ""
    return f"{spec.quant}{double}{_head(spec)}, {short} compute"


def _head(spec: LoadSpec) -> str:
    return ", 8-bit head" if spec.head == "8bit" else ""


def keep_training_path(model: Any) -> None:
    """Keep 4-bit layers on the path that has a gradient.

    On a CPU with AVX512-BF16 one no-grad forward in eval mode repacks the weight into an inference layout, after
    which training forwards lose the input's gradient. The flag turns the repacking off.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _check_head(base: Base) -> None:
    """Compare the model's own logits with head(hidden) once: an unknown head must not pass in silence."""
    ids = torch.arange(1, 9, device=base.device).unsqueeze(0) % max(2, base.head.weight.shape[0])
    with torch.no_grad():
        own = base.model(input_ids=ids).logits[0].float()
        ours = base.head.logits(backbone(base.model)(input_ids=ids).last_hidden_state[0])
    where = str(base.folder)
    if not torch.isfinite(own).all():
        raise ModelError("the model's outputs are not finite numbers", where=where, hint="are the weights damaged?")
    if not torch.allclose(own, ours, rtol=2e-2, atol=2e-2 * float(own.abs().max())):
        kind = base.model.config.model_type
        hint = "please report the architecture; an output head of this kind is not supported yet"
        raise ModelError(f"the logits of {kind!r} are not a projection of its hidden states", where=where, hint=hint)


@contextlib.contextmanager
def _named_load_errors(folder: Path, quant: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        hint = "install the package it names"
        raise ModelError(f"loading needs a package that is not installed: {_first_line(error)}", hint=hint) from error
    except (OSError, ValueError, RuntimeError, MemoryError, KeyError, TypeError, AttributeError) as error:
        if is_out_of_memory(error):
            hint = "a smaller model, or --quant nf4" if quant != "nf4" else "a smaller model"
            raise DoesNotFitError("the weights do not fit on the device", where=str(folder), hint=hint) from error
        raise ModelError(f"the model cannot be loaded: {_first_line(error)}", where=str(folder)) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
