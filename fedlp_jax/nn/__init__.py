"""Networks, and how their layers are computed fast."""
