"""The memory plan: an estimate from config.json alone. No torch here."""
