"""Foreign prefix formats, one file a format; each foreign layout is known to exactly one module."""
