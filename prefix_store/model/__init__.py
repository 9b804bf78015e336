"""What a prefix means to a frozen model: loading, prompts, and the differentiable reference."""
