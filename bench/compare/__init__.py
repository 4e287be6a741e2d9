"""Runs compared with one another and with a saved baseline."""
