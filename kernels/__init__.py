"""What a mixture of LoRA experts computes: data, routing policies, definition, backends.

Imports torch (and triton) only. `policy` and `mixture` are the data, `definition` the formulas,
`backend` the interface, `torch_backend`, `cpu` and `triton` its implementations.
"""
