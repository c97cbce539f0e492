"""Low-bit weights: the layers that train them, and the starts of a conversion."""
