"""Pure-Python scheduling: who runs how many tokens. Integers only, no tensors."""
