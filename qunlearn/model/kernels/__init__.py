"""Layers that compute in less memory: padding-free attention and fused LoRA."""
