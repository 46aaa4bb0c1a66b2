"""Search of the quantization parameters of one op: pure tensors, no model, no graph."""
