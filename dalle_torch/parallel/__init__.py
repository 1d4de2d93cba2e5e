"""Devices, and what is spread over them; the one home of torch_xla."""
