"""What `antefix doctor` looks at, a module for each place where trouble comes from."""
