"""qunlearn: make a language model forget, on one small GPU."""

__version__ = "0.1.0"
