"""Estimate the memory of a run by component, from numbers alone.

A training step has moments: its reference pass, the output head with the logits' tiles, the backward pass of the last
block, the optimizer's step. What the run needs is the largest of them; what is alive at that moment adds up to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qunlearn.memory.architecture import Shape
from qunlearn.memory.block_ops import BlockPass, block_tape
from qunlearn.memory.resident import Choices, adapted_names, adapter_parameters, loading_bytes, resident_bytes
from qunlearn.memory.tiles import block_tokens, restored_rows, tile_tokens

# Of the output head (model/head.py): tiles of logits, and blocks of them in fp32. The KL has both models' logits, and
# beside them the reference's probabilities and the products to be added up; log-probabilities have the logits, and what
# their log-sum-exp is taken of. What is not in fp32 is there as a block once more.
_KL_TILES, _KL_BLOCKS = 2, 2
_LOGP_TILES, _LOGP_BLOCKS = 1, 1
# Key-value cache of a batch of answers: at most so much, and at least one row and some, whatever a step needs.
CACHE_BYTES = 1 << 30
# On a GPU with more room: a batch's steps are launched one by one, and take as long for few rows as for many.
GPU_CACHE_BYTES = 8 << 30
_CACHE_SPARE_TOKENS = 8
# Beside everything torch allocates: a bare context is 426 MiB with torch 2.10 + CUDA 13.0 on an RTX 6000 Ada (reported
# in unslothai/unsloth-zoo#1053; pytorch/pytorch#109888 says about 400), plus kernels that are loaded as they are used.
CONTEXT_BYTES = 448 << 20

_FP32 = 4


@dataclass(frozen=True)
class Load:
    """The largest work of a step: `tokens` of one pass with its padding, in rows of `row_tokens`; `supervised` of them.

    `reference`: tokens of the whole step whose reference states are held; `longest`: those of one example. Where rows
    lie end to end `tokens` have no padding, and `places` are those with it.
    """

    tokens: int
    row_tokens: int
    supervised: int
    reference: int
    longest: int
    places: int | None = None


@dataclass(frozen=True)
class Part:
    """One component: its size, and how much of it is alive at the moment that needs most."""

    name: str
    size_bytes: int
    counted_bytes: int


@dataclass(frozen=True)
class Needs:
    """What a run needs. `allocated_bytes` is the largest moment of a training step, by torch's own counting.

    Before the first step the model is loaded. Between steps it answers: to make its own normal data, to be measured.
    With a key-value cache of `cache_bytes`, and `prompts_bytes` for the pass over what is asked, that needs no more
    than a step where possible.
    """

    moment: str
    parts: tuple[Part, ...]
    allocated_bytes: int
    loading_bytes: int
    idle_bytes: int
    cache_bytes: int
    prompts_bytes: int
    context_bytes: int

    @property
    def answering_bytes(self) -> int:
        return self.idle_bytes + self.cache_bytes + self.prompts_bytes

    def cache_within(self, limit_bytes: int) -> int:
        """Return the cache that fits when there is more memory than a step needs: at most CACHE_BYTES, or half of what
        a large GPU has to spare."""
        spare = max(0, limit_bytes - self.context_bytes - self.answering_bytes)
        share = self.cache_bytes / (self.cache_bytes + self.prompts_bytes)
        fits = self.cache_bytes + int(spare * share)
        return max(min(CACHE_BYTES, fits), min(GPU_CACHE_BYTES, int(spare * share) // 2))

    @property
    def total_bytes(self) -> int:
        return max(self.allocated_bytes, self.answering_bytes, self.loading_bytes) + self.context_bytes


def run_needs(shape: Shape, choices: Choices, load: Load) -> Needs:
    """The table for one model, one set of choices and one load. Raises ModelError for modules that are not there."""
    adapted = adapted_names(shape, choices.target_modules)
    static = resident_bytes(shape, choices, adapted)
    step = Step(shape, choices, load, adapted)
    sets = 1 + choices.apart  # kept by loss, beside those that a pass leaves
    gradients = {"gradients": sets * _FP32 * adapter_parameters(shape, choices.r, adapted)}
    if choices.recorded:
        static["recorded"] = sum(gradients.values()) + step.pass_bytes
    moments = {
        "the output head": {**gradients, **step.head()},
        "the backward pass": {**gradients, **step.backward()},
        "the reference pass": step.reference(),  # the gradients of the step before are gone by then
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    live = {**static, **moments[moment]}
    sizes = {**static, **gradients, **step.sizes()}
    parts = tuple(Part(name, sizes[key], live.get(key, 0)) for key, name in _names(choices).items())
    allocated = sum(live.values())
    idle = sum(static.values()) - static["optimizer state"] + sum(gradients.values())
    cache, prompts = step.answering(allocated - idle)
    # Without a GPU weights are read where the system has mapped them.
    loading, context = (loading_bytes(shape, choices), CONTEXT_BYTES) if choices.on_gpu else (0, 0)
    return Needs(moment, parts, allocated, loading, idle, cache, prompts, context)


def _names(choices: Choices) -> dict[str, str]:
    """Every component by its key, in the order of the table."""
    double = " + double quantisation" if choices.double_quant and choices.quant in ("nf4", "fp4") else ""
    kind = {"none": "16-bit" if choices.compute_bytes == 2 else "32-bit"}.get(choices.quant, choices.quant)
    where = ", embeddings on the host" if choices.embeddings == "cpu" else ""
    head = "head in 8 bits" if choices.head == "8bit" else "head"
    return {
        "weights": f"weights, {kind}{double}",
        "embeddings": f"embeddings, {head}, norms{where}",
        "adapters": f"adapters, r = {choices.r}",
        "gradients": "gradients",
        "optimizer state": f"optimizer state, {choices.optimizer}",
        "saved": "saved activations" + (", on the host" if choices.offload else ""),
        "block": "one block, recomputed" if choices.checkpointing else "one block, backward",
        "dequantisation": "dequantisation buffer",
        "states": "final states and reference",
        "tiles": "tiles of logits",
        "masks": "masks and positions",
        **({"recorded": "recorded passes (CUDA graphs)"} if choices.recorded else {}),
        "workspace": "cuBLAS workspace",
    }


# -- the moments of a step -------------------------------------------------------------------------------


class Step:
    """What comes and goes. Every method returns bytes by component."""

    def __init__(self, shape: Shape, choices: Choices, load: Load, adapted: frozenset[str]) -> None:
        self.shape, self.choices, self.load = shape, choices, load
        c = choices.compute_bytes
        run = BlockPass(
            tokens=load.tokens,
            row_tokens=load.row_tokens,
            compute_bytes=c,
            r=choices.r,
            adapted=adapted,
            quant=choices.quant,
            masked=choices.packed or shape.traits.windowed,
            on_gpu=choices.on_gpu,
            places=load.places,
        )
        self.tape = block_tape(shape, run)
        self.frozen = block_tape(shape, replace(run, adapted=frozenset()))
        bare = block_tape(shape, replace(run, dequantise=False))
        self.layer_input = c * load.tokens * shape.hidden
        self.inputs = self.layer_input * (1 if choices.offload and choices.checkpointing else shape.layers)
        int8 = _kept_by_int8(shape, c * load.tokens) if choices.quant == "int8" else 0
        blocks = min(choices.kept_blocks, shape.layers) if choices.checkpointing else shape.layers
        # What the last block keeps is in `block`. When others are recomputed, those that kept theirs are done.
        moments = []
        self.kept, self.kept_a_block = shape.layers * int8, int8
        if blocks < shape.layers:
            held = self.inputs + (shape.layers - blocks - 1) * int8
            moments.append((held, self.tape.checkpointed().most, bare.checkpointed().most))
        if blocks:
            peak = self.tape.remembered()
            kept = max(peak.kept, int8)
            self.kept += blocks * (kept - int8)
            self.kept_a_block = kept if blocks == shape.layers else int8
            moments.append((self.inputs + self.kept - kept, peak.most, bare.remembered().most))
        self.saved, most, self.block = max(moments, key=lambda moment: moment[0] + moment[1])
        self.dequantisation = most - self.block
        # Learned positions are added to the tokens' embeddings, which stay as well.
        self.embedded = c * load.tokens * shape.embedding_width if shape.positions else 0
        self.final = load.tokens * shape.hidden * (c if shape.traits.norm == "layer" else _FP32)
        self.state = c * shape.embedding_width
        turned = 2 * c * load.tokens * int(shape.head_dim * shape.traits.rotary)
        self.masks = (load.places or load.tokens) * (load.row_tokens if run.masked else 0) + load.tokens * 48 + turned

    @property
    def pass_bytes(self) -> int:
        """What a recorded pass keeps to itself, forward and backward: an unrecorded one may be made beside it."""
        return self.saved + self.block + self.dequantisation

    def sizes(self) -> dict[str, int]:
        largest = max(x.weights for x in self.shape.block) * self.choices.compute_bytes
        return {
            "saved": self.inputs + self.kept + self.embedded,
            "block": self.block,
            "dequantisation": 0 if self.choices.quant == "none" else largest,
            "states": self.held_states() + 2 * self.load.supervised * self.state + self.final,
            "tiles": self._tiles(),
            "masks": self.masks,
        }

    def backward(self) -> dict[str, int]:
        """The last block, all others' inputs still there."""
        return {
            "saved": self.saved + self.embedded,
            "block": self.block,
            "dequantisation": self.dequantisation,
            "states": self.held_states(),
            "masks": self.masks,
        }

    def head(self) -> dict[str, int]:
        """The last tile of the last loss; the states' gradients are formed already."""
        return {
            "saved": self.inputs + self.kept + self.embedded,
            "states": self.held_states() + 2 * self.load.supervised * self.state + self.final,
            "tiles": self._tiles(),
            "masks": self.masks,
        }

    def reference(self) -> dict[str, int]:
        """A pass without adapters and without gradients."""
        return {
            "saved": self.layer_input + self.embedded,
            "block": self.frozen.passing(),
            "states": self.load.reference * self.state,
            "masks": self.masks,
        }

    def answering(self, room: int) -> tuple[int, int]:
        """The cache of a batch of answers in so much room, and what else the longest pass over its prompts takes."""
        shape, load = self.shape, self.load
        per_token = shape.layers * self._cache_bytes_a_token()
        prompt = (self.frozen.passing() + self.layer_input) / load.tokens
        # A layer's cache is copied when it grows.
        tokens = int(room / (per_token * (1 + 2 / shape.layers) + prompt))
        tokens = max(load.longest + _CACHE_SPARE_TOKENS, min(tokens, CACHE_BYTES // per_token))
        return per_token * tokens, int((2 * per_token / shape.layers + prompt) * tokens)

    def held_a_block(self) -> int:
        """Bytes that each block holds while later ones are computed, or the keys and values of the fewest answers."""
        choices = self.choices
        inputs = 0 if choices.offload and choices.checkpointing else self.layer_input
        tokens = self.load.longest + _CACHE_SPARE_TOKENS
        return max(inputs + self.kept_a_block, tokens * self._cache_bytes_a_token())

    def working(self) -> int:
        """Bytes beside that where a block is computed: in a step, or in a pass over what is asked."""
        tokens = self.load.longest + _CACHE_SPARE_TOKENS
        prompt = (self.frozen.passing() + self.layer_input) * tokens // self.load.tokens
        moved = self.layer_input if self.choices.offload else 0
        step = self.block + self.dequantisation + moved
        return max(step, prompt + 2 * tokens * self._cache_bytes_a_token())

    def head_working(self) -> int:
        """Bytes beside `held_states` while the head computes its last tile."""
        return 2 * self.load.supervised * self.state + self.final + self._tiles()

    def _cache_bytes_a_token(self) -> int:
        return 2 * self.choices.compute_bytes * self.shape.kv_heads * self.shape.head_dim

    def held_states(self) -> int:
        """Final states of the supervised tokens and, twice, the reference's: as computed and as the loss sees them."""
        both = min(self.load.reference, self.load.supervised) + self.load.reference
        return self.state * (self.load.supervised + both)

    def _tiles(self) -> int:
        """Tiles of logits and the blocks beside them, where a loss has fewer tokens only so many."""
        vocabulary, c, on_gpu = self.shape.vocabulary, self.choices.compute_bytes, self.choices.on_gpu
        tile, block = tile_tokens(vocabulary, c, on_gpu=on_gpu), block_tokens(vocabulary, on_gpu=on_gpu)
        most = 0
        for tokens, tiles, blocks in (
            (min(self.load.reference, self.load.supervised), _KL_TILES, _KL_BLOCKS),
            (self.load.supervised, _LOGP_TILES, _LOGP_BLOCKS),
        ):
            copied = tiles if c != _FP32 or self.shape.soft_cap else 0
            slope = 1 if self.shape.soft_cap else 0
            aside = (blocks + copied + slope) * min(tokens, block) * _FP32 * vocabulary
            at_once = min(tokens, tile)
            most = max(most, tiles * at_once * c * vocabulary + max(aside, self._restored(at_once)))
        return most

    def _restored(self, tokens: int) -> int:
        """Rows of a head in 8 bits while a tile of so many tokens is multiplied, and the gradient they add up to."""
        if self.choices.head != "8bit":
            return 0
        c, width = self.choices.compute_bytes, self.shape.embedding_width
        rows = min(self.shape.vocabulary, restored_rows(width, c))
        return c * rows * width + (_FP32 + c) * tokens * width


def _kept_by_int8(shape: Shape, number: int) -> int:
    """bitsandbytes' 8-bit product keeps its input where checkpointing does not see it: those of a whole block."""
    mlp = 0 if shape.traits.parallel and shape.traits.norms == 1 else shape.hidden
    return number * (shape.hidden + shape.heads * shape.head_dim + mlp + shape.intermediate)
