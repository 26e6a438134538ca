"""Weights of a trainer into running servers."""
