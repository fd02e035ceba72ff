"""Many lanes on many devices; knows nothing of federated learning."""
