"""Exact changes of a float model's parameters that make its activations easier to quantize."""
