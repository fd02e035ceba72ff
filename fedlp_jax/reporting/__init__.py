"""What a run leaves for people: run directory, progress, plots."""
