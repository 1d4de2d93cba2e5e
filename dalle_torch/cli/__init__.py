"""The commands of `dalle-torch`: one module each, with a docstring, `add_arguments(parser)` and `run(args)`."""
