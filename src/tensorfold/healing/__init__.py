"""Recover the quality that folding cost: block by block, then end to end."""
