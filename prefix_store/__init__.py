"""What a prefix is, where it is kept, what has been asked for, and what it means to a frozen model."""
