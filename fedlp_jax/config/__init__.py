"""A file -> the arguments of simulate()."""
