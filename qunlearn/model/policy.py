"""The policy: a frozen base with a LoRA adapter, which with its adapter off is the reference as well."""

from __future__ import annotations

import contextlib
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from qunlearn.config.settings import LoraConfig
from qunlearn.data.batch import Batch, Row, Span, collate
from qunlearn.data.tokenize import Example
from qunlearn.errors import AdapterError, BaseChangedError, ModelError, NoGradientError, TrainingError
from qunlearn.hub.adapter_files import check_adapter
from qunlearn.model.kernels.buckets import bucketed
from qunlearn.model.kernels.graphs import REFERENCE, TRAINED, CudaGraphs, Graphs
from qunlearn.model.kernels.lora import cast_once, make_lean
from qunlearn.model.load import Base
from qunlearn.model.packing_check import Packing, packing_of
from qunlearn.parallel.parts import any_in_shards, cut, part
from qunlearn.parallel.ranks import current

_FAINT = 1e-6  # root mean square of a gradient


class Policy:
    """A base with one LoRA adapter. Holds the model; everything else is a function of it."""

    def __init__(self, base: Base, model: Any) -> None:
        self.base, self.model = base, model
        self.tokenizer, self.head, self.device = base.tokenizer, base.head, base.device
        self.cache_bytes = base.cache_bytes
        self.layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
        make_lean(self.layers, whole=self.device.type == "cuda")
        self.graphs: Graphs | None = None
        self._adapter_off = False
        self._modules = list(model.modules())
        self._packing: Packing | None = None
        self._checksums: dict[str, int] = {}
        self.in_shards = any_in_shards([p for p in model.parameters() if p.requires_grad])
        self._parts: list[Tensor] = []

    @classmethod
    def new(
        cls, base: Base, lora: LoraConfig, *, seed: int = 0, checkpointing: bool = True, kept_blocks: int = 0
    ) -> Policy:
        """A base with a fresh adapter, B = 0, so that it starts as the base itself. Raises ModelError. With
        `checkpointing` the last `kept_blocks` blocks keep their activations all the same."""
        torch.manual_seed(seed)  # LoRA's A is drawn here
        config = PeftLoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=_target_modules(lora.target_modules),
            bias="none",
            task_type="CAUSAL_LM",
        )
        try:
            with _quiet_peft():
                policy = cls(base, get_peft_model(base.model, config))
        except ValueError as error:
            hint = "all-linear, or names of linear layers such as q_proj,v_proj"
            raise ModelError(str(error).splitlines()[0][:300], where="--target-modules", hint=hint) from error
        if checkpointing and getattr(base.model, "supports_gradient_checkpointing", False):
            _enable_checkpointing(base.model, random=policy.draws, kept_blocks=kept_blocks)
        return policy

    @classmethod
    def load(cls, base: Base, folder: Path) -> Policy:
        """A base with the adapter of a folder, for measuring and merging. Raises AdapterError."""
        stored = check_adapter(folder)
        try:
            with _quiet_peft():  # missing keys are reported as warnings; checked below
                model = PeftModel.from_pretrained(base.model, str(folder))
        except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
            hint = "is it the adapter of another model, or of another kind than LoRA?"
            raise AdapterError(str(error).splitlines()[0][:300], where=str(folder), hint=hint) from error
        expected = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(model).items()}
        if expected != stored:
            odd = sorted(expected.items() ^ stored.items())[0][0]
            hint = "the adapter belongs to another base; give the one it was trained on"
            raise AdapterError(f"its tensors are not those of this model, {odd} first", where=str(folder), hint=hint)
        model.requires_grad_(False)
        model.eval()
        return cls(base, model)

    @property
    def hidden_size(self) -> int:
        return int(self.head.weight.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Return what hidden states are computed in."""
        dtype: torch.dtype = self.base.model.dtype
        return dtype

    # -- forward -------------------------------------------------------------------------------------

    @property
    def packing(self) -> Packing:
        """Return how rows may be laid out: tried once."""
        if self._packing is None:
            self._packing = packing_of(self.base)
        return self._packing

    def packs(self, examples: Sequence[Example]) -> bool:
        """Return whether these examples may share rows."""
        return max(len(example.input_ids) for example in examples) <= self.packing.longest

    def collate(self, examples: Sequence[Example], spans: Sequence[Span], rows: Sequence[Row], *, pack: bool) -> Batch:
        """A batch of these rows on the policy's device; where examples may be packed, and the model can, without
        padding; in the shape of a bucket where passes are recorded."""
        close_up, pad = pack and self.packing.layouts, self.tokenizer.pad_token_id
        batch = collate(examples, spans, pad, rows, close_up=close_up, always=self.graphs is not None)
        if self.graphs is not None and batch.layout is not None:
            batch = bucketed(batch, pad)
        return batch.to(self.device)

    def hidden(self, batch: Batch, layer: int | None = None) -> Tensor:
        """Final hidden states, or those behind a block (B, T, D). The adapter's layers were put into the base's own
        modules."""
        if layer is not None:
            return self.base.hidden_behind(batch, layer)
        trained = torch.is_grad_enabled()
        if self.graphs is None or batch.layout is None or not (trained or self._adapter_off):
            return self.base.hidden(batch)
        return self.graphs.hidden(self.base.hidden, batch, TRAINED if trained else REFERENCE)

    @property
    def draws(self) -> bool:
        """Return whether a training pass draws random numbers: dropout, of the adapter or of the model."""
        dropouts = (torch.nn.modules.dropout._DropoutNd,)
        config = self.base.model.config.get_text_config()
        attention = getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0)
        return bool(attention) or any(isinstance(m, dropouts) and m.p > 0 for m in self._modules)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The base as it was: adapters off, no gradient. Never run a backward pass inside.

        The flag is flipped on the collected layers: `disable_adapter()` would walk every tensor at each entry.
        """
        training = self.model.training
        for layer in self.layers:
            layer._disable_adapters = True
        self._adapter_off = True
        self._set_training(False)
        try:
            with torch.no_grad():
                yield
        finally:
            for layer in self.layers:
                layer._disable_adapters = False
            self._adapter_off = False
            self._set_training(training)

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """The policy as it will answer: no dropout, no gradient. In training again afterwards, where it was."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    # -- of a step -----------------------------------------------------------------------------------

    @property
    def records(self) -> bool:
        """Return whether passes can be recorded: on one GPU, without padding and without random numbers."""
        one = self.device.type == "cuda" and len(self.base.devices) == 1
        return one and self.packing.layouts and not self.draws

    def record_passes(self, give_up: Callable[[str], None]) -> None:
        """Record passes of a shape that comes again as CUDA graphs, where the model and its device allow it.

        `give_up` hears why when they turn out not to.
        """
        if self.records:
            self.graphs = Graphs(list(self.trainable().values()), CudaGraphs(), give_up)

    def drop_recorded(self) -> bool:
        """Give up recorded passes and the memory that they hold; return whether there were any."""
        return self.graphs is not None and self.graphs.drop()

    def zero_grad(self) -> None:
        """Set the adapter's gradients to nothing, or, where recorded passes add to them, to zeros in their place."""
        grads = [p.grad for p in self.trainable().values() if p.grad is not None]
        for mine in self._parts:
            mine.grad = None
        if self.graphs is None or not self.graphs.shapes:
            self.model.zero_grad(set_to_none=True)
        elif grads:
            torch._foreach_zero_(grads)

    def cast_once(self) -> contextlib.AbstractContextManager[None]:
        """Cast the adapter to the dtype that the model computes in once for all passes inside; in shards, where it is
        there for a block at a time, each pass casts it."""
        if self.in_shards:
            return contextlib.nullcontext()
        return cast_once(self.layers, self.dtype)

    def _set_training(self, training: bool) -> None:
        """As `model.train(training)`, which takes 15 ms for the thousands of modules of a large model."""
        for module in self._modules:
            module.__dict__["training"] = training

    # -- the adapter ---------------------------------------------------------------------------------

    def trainable(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def parts(self) -> list[Tensor]:
        """Return what this process trains: the parameters, or its part of those that are in shards, in their memory."""
        if not self.in_shards:
            return [*self.trainable().values()]
        if not self._parts:
            self._parts = [part(p) for p in self.trainable().values()]
        return self._parts

    def take_gradients(self) -> None:
        """Give the gradients of parameters in shards to the parts that are trained. An empty part has none."""
        if not self.in_shards:
            return
        for p, mine in zip(self.trainable().values(), self.parts(), strict=True):
            if mine is not p:
                mine.grad = part(p.grad) if p.grad is not None and mine.numel() else None
                p.grad = None

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Let these be the gradients of what this process trains."""
        for mine, gradient in zip(self.parts(), gradients, strict=True):
            mine.grad = gradient if mine.numel() else None

    def adapter_state(self) -> dict[str, Tensor]:
        """A copy of the whole adapter on the CPU, by parameter name; of one in shards all processes make it at once."""
        found = self.trainable()
        wholes = current().whole([part(p) for p in found.values()], [*found.values()])
        return {name: t.detach().to("cpu", copy=True) for name, t in zip(found, wholes, strict=True)}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.trainable().items():
                part(p).copy_(cut(state[name], p))

    # -- the checks ----------------------------------------------------------------------------------

    def check_gradients(self, layer: int | None = None) -> bool:
        """Check that after the first backward pass every B has a gradient and every A was reached; return whether the
        gradient is so faint that AdamW's epsilon (1e-8) is a part of its size.

        LoRA starts with B = 0, so the gradient of A is exactly zero there; it must exist all the same. Where the
        loss looks at a block's output, the blocks above it are not expected to have any.
        Raises NoGradientError naming the first tensors concerned.
        """
        parameters = self.trainable()
        mine = dict(zip(parameters, self.parts(), strict=True))
        unreached = {name for name, t in mine.items() if t.grad is None and t.numel()}
        of_b = {name: p for name, p in parameters.items() if ".lora_B." in name and name not in unreached}
        grads = [g if (g := mine[name].grad) is not None else torch.zeros(0) for name in of_b]
        numbers = current().over_parts([float(g.count_nonzero()) for g in grads], [*of_b.values()])
        unreached |= {name for name, number in zip(of_b, numbers, strict=True) if not number}
        missing = [n for n in parameters if n in unreached and not (layer is not None and _block_of(n) > layer)]
        if missing:
            named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            hint = (
                "choose --target-modules that take part in the forward pass; where the model is certain of the bad "
                "answers, --objective logodds has a gradient"
            )
            raise NoGradientError(f"no gradient reached {named}", where="step 1", hint=hint)
        squares = current().over_parts([float(g.float().square().sum()) for g in grads], [*of_b.values()])
        return math.sqrt(sum(squares) / sum(p.numel() for p in of_b.values())) < _FAINT

    def seal_base(self) -> None:
        """Remember a checksum of every base tensor, for `check_base`."""
        self._checksums = dict(self._base_checksums())

    def check_base(self) -> None:
        """Raises BaseChangedError unless the base is bit-identical to what was sealed."""
        if not self._checksums:
            raise TrainingError("the base was never sealed")
        changed = [name for name, sum_ in self._base_checksums() if self._checksums.get(name) != sum_]
        if changed:
            named = ", ".join(changed[:3])
            raise BaseChangedError(
                f"{len(changed)} base tensors changed during training: {named}", hint="please report"
            )

    def _base_checksums(self) -> Iterator[tuple[str, int]]:
        for name, tensor in _base_tensors(self.model):
            flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            yield name, zlib.crc32(flat.numpy().tobytes())


def _block_of(name: str) -> int:
    """The number of the decoder block a parameter belongs to, which is the first number in its name; else -1."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def _base_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, p in model.named_parameters():
        if not p.requires_grad:
            yield name, p.data.to_local() if hasattr(p.data, "to_local") else p.data  # of one in shards its own
            state = getattr(p, "quant_state", None)
            if state is not None:
                yield f"{name}.absmax", state.absmax
    yield from model.named_buffers()


@contextlib.contextmanager
def _quiet_peft() -> Iterator[None]:
    """Without peft's advice, and without warnings about names of transformers that peft itself uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _enable_checkpointing(model: Any, *, random: bool, kept_blocks: int) -> None:
    # The state of the random numbers is kept for the recomputation only where any are drawn.
    # transformers 5.22 renamed it; the old name warns there.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": random})
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in blocks[max(0, len(blocks) - kept_blocks) :]:  # whose backward passes come first
        block.gradient_checkpointing = False


def _target_modules(text: str) -> str | list[str]:
    return text if text == "all-linear" else [name.strip() for name in text.split(",") if name.strip()]


def save_adapter(policy: Policy, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the plain PEFT layout: adapter_config.json and adapter_model.safetensors; of a state, as an adapter in
    shards is given, else of the policy's own."""
    more = {} if state is None else {"state_dict": dict(state)}
    with _quiet_peft():  # it looks for the base's config on the hub to see whether the vocabulary grew; ours never does
        policy.model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False, **more)
