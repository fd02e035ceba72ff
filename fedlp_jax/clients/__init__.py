"""One client: its training, its device, its failures."""
