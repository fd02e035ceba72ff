"""Modelled parameters, bytes and MACs; never a clock."""
