"""Settings: their defaults, and how files, `--set` and flags lay over them."""
