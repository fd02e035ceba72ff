"""What of the network a client holds, trains and sends: layers, submodels, masks."""
