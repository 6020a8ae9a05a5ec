"""Handing a folded model on to other tools."""
