"""Methods: each makes a spec of a shape and a budget, and says which solver fills it."""
