"""A training step, compiled for TPUs that are not there: what it needs, moves and takes."""
