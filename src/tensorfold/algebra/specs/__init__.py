"""Shapes of structured matrices, without weights."""
