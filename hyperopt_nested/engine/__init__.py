"""The engine: nested differentiation of optimizers, one step at a time."""
