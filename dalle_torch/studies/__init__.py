"""Studies: what a model is worth, which setting or variant is best, what a data set holds; each ends in one folder."""
