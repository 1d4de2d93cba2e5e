"""Foreign checkpoints: their names and layouts turned into ours, one module a source."""
