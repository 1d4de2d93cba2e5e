"""Studies that glue the other parts together: one command each, ending in a table and a picture."""
