"""certbench: certified defenses compared through one certification engine."""

__version__ = "0.3.0"
