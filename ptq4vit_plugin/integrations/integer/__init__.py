"""Integer checkpoints: int8 weights in a file, and a PyTorch model that computes with codes."""
