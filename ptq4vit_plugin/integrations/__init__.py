"""Other people's software, one module or folder each."""
