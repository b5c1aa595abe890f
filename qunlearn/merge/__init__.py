"""Adapters into weights, tensor by tensor: `plan` decides, `stream` writes, `measure` looks at what was written."""
