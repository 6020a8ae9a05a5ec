"""What a transformers model is made of: its matrices, blocks, tables and ties."""
