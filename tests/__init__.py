"""The test suite, in the order of the packages that it tests; what tests share is in ``helpers``."""
