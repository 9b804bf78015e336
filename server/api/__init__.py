"""All the HTTP of the server."""
