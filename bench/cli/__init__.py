"""The command line: options, commands, and what they print."""

from bench.cli.app import main

__all__ = ["main"]
