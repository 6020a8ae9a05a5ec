"""Orders of rows and columns that make a matrix easier to fold."""
