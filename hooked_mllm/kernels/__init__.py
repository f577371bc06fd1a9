"""Kernels, each with its definition in plain torch beside it."""
