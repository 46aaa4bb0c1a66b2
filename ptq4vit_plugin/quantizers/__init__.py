"""Quantizers: numbers to codes and back.

Import from the modules (`base`, `uniform`, `piecewise`, `twin_gelu`, ...): nothing is imported
here, so that listing the registered quantizers stays cheap.
"""
