"""Models: loading, generating, and the adapter on top. Every module here may be imported alone."""

import logging
import os

# On its first import bitsandbytes reports a missing optional kernel as a warning; nothing is wrong.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# On a CPU oneDNN and PyTorch's layer over it keep what they have compiled for each shape of a product, 1,024 of them,
# with their buffers. Sizes differ in every step, so resident memory grew to two and a half times the plan for nothing
# (docs/log.md, 2026-11-27). The names are the libraries' own; what the user has set stays.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "32")
