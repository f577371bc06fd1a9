"""Triton kernels, each with its definition in plain torch."""
