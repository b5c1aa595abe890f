"""Rows by role: forget set, retain set, other answers, and the weights of their tokens."""
