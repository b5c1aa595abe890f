"""Models: finding, checking, loading, generating, and the adapter on top. Every module here may be imported alone."""

import logging

# On its first import bitsandbytes reports a missing optional kernel as a warning; nothing is wrong.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
