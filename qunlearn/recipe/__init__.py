"""Whole stories, from data to verdict: short YAML files, and the stages that carry them out."""
