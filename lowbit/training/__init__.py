"""Losses, validation and optimisers of a run."""
