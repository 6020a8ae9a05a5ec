"""Products of cores: with vectors, with each other, and row by row; and the search for the fastest path."""
