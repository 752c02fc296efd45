"""Triton kernels: the one place for code that runs on a GPU. Imported only where there is one.

Conventions: activations are contiguous in their last dimension; sums are made in float32 and rounded once, where
transformers rounds; row counts may differ from call to call without a new compilation.
"""
