"""Results for human eyes: HTML pages of one file that open offline, and charts."""
