"""Everything that touches checkpoint bytes and decides when, what and which.

Knows nothing of models or the trainer: it is given named tensors and gives them back.
"""
