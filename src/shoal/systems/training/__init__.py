"""Learning together without a server that everything depends on."""
