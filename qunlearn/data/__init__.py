"""Data files: read, checked, rendered through the template, tokenised, packed into batches."""
