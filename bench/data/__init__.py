"""Data sets: cards, sources, pictures, and splits."""
