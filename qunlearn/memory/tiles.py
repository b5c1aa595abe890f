"""The tile sizes of the output head, shared by the head and the memory plan.

A tile is what the matrix products make at once: the fewer its tokens, the more often the whole head is read, which on
a large vocabulary takes longer than to multiply with it. Whatever else is done to logits is done block by block in
fp32: on a CPU small enough for its cache, on a GPU large enough for its launches not to count.
"""

from __future__ import annotations

_TILE_BYTES = {False: 24 << 20, True: 64 << 20}  # on a GPU?
_BLOCK_LOGITS = {False: 1 << 19, True: 1 << 23}
_RESTORED_BYTES = 16 << 20  # of a head in 8 bits, at once
HEAD_BLOCK = 256  # weights of a head in 8 bits that share a scale


def tile_tokens(vocabulary: int, number_bytes: int, *, on_gpu: bool) -> int:
    """Tokens of a tile of logits in numbers of so many bytes."""
    return max(1, _TILE_BYTES[on_gpu] // (vocabulary * number_bytes))


def block_tokens(vocabulary: int, *, on_gpu: bool) -> int:
    """Tokens of a block of logits in fp32."""
    return max(1, _BLOCK_LOGITS[on_gpu] // vocabulary)


def restored_rows(width: int, number_bytes: int) -> int:
    """Rows of a head in 8 bits that are restored at once: they begin and end whole blocks, whatever the width."""
    return max(1, _RESTORED_BYTES // (width * number_bytes) // HEAD_BLOCK) * HEAD_BLOCK
