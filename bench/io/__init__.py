"""Files, tensors, and downloads: bounded reads, atomic writes, hashes."""
