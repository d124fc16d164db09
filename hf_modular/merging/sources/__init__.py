"""Where tensors are read from: checkpoints, quantised ones, and models with adapters."""
