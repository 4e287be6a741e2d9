"""Training: the resumable loop, objectives, and SPSA."""
