"""IN: bytes from producers become validated, authenticated, counted requests."""
