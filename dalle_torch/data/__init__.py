"""Data that networks are trained and judged on."""
