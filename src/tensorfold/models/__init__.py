"""Anatomy of a transformers model: its matrices, blocks, tables and ties."""
