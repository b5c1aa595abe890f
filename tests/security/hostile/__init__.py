"""A corpus of files no one should be sent: all built by code, tiny, and refused by name."""
