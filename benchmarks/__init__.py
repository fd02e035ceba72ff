"""Measurements, each with its baseline in the same run; see README.md here."""
