"""Closed-form repair of a linear whose input and weight are quantized: pure tensors."""
