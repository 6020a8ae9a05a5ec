"""Pure functions on tensors: specs, contraction, decompositions and solvers. Knows neither modules nor models."""
