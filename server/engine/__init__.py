"""All the torch of the server: one thread owns the device and does no I/O."""
