"""Runs on a Ray cluster: the driver, its workers, and their pool."""
