"""Attacks on the smoothed classifier of a finished run: its images, its weights, its noise level."""
