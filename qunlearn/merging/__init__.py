"""Merge adapters into weights, tensor by tensor: `plan` decides, `writer` writes, `verify` measures the result."""
