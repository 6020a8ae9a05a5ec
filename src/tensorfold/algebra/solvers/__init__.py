"""Cores for a given matrix."""
