"""Rounds in a loop: program, run, evaluation, checkpoint."""
