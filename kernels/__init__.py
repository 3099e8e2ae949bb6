"""What a mixture of LoRA experts computes: data, routing policies, definition, backends.

Imports torch only. `policy` and `mixture` are the data, `definition` the formulas, `backend` the
interface of the implementations.
"""
