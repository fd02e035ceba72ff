"""What is learnt: a network, its loss and its metrics."""
