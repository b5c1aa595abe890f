"""One HTML file a manager and an engineer can both read. Made from records, never from models."""
