"""Publish runs to the Hugging Face hub or a folder, read them back, and verify them (docs/publish.md)."""
