"""A plug-in whose import fails."""

raise RuntimeError("this plug-in needs a library that is not installed")
