"""Starting runs on machines that are not this one; not part of the installed package."""
