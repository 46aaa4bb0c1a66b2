"""Learning of rounding and scales, block by block: quantizers that learn, and the loop."""
