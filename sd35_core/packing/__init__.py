"""Weights in 8 or 2 bits."""
