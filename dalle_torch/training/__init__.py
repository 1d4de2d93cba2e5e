"""Training loops; the networks, data and checkpoints they drive live in the packages below."""
