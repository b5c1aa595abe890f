"""Console, files, outputs, locks, signals, limits: what knows nothing of models or data."""
