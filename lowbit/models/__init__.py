"""Decoders, and where teachers come from."""
