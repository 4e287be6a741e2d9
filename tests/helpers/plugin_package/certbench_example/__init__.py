"""An example plug-in for certbench."""
