"""Distributed Shampoo (arXiv 2002.09018), as DALL·E Mega was trained with it.

`optimizer` is the front: groups, steps, state dict. `options` are its settings, `bucket` is the state of equally
shaped parameters and `update` what happens to them. `blocking` cuts tensors into blocks, `preconditioner` holds their
matrices, `matrix_roots` takes their roots, `grafting` gives each update its size, `quantization` keeps momenta in 8
bits, `saving` takes the state to names and back, `sharding` is what a mesh of devices has to answer.
"""
