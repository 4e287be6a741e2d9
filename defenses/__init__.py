"""The built-in defenses, one file each; a file's name is the defense's name."""
