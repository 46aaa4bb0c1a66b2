"""timm: models from recipes, attention made visible."""
