"""Randomized smoothing: noise, votes, bounds, radii, and the engine that draws them."""
