"""Model folders: found, downloaded, and checked before anything is loaded. No torch here."""
