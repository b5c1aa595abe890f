"""Run folders: read, listed, and traced to their base model and data files."""
