"""Run folders: schema, reading, writing, merging, importing, verifying."""
