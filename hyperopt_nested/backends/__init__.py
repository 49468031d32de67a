"""What runs a step of `HyperOptimizer`: programs that are made from the engine, and do what it does, faster."""
