"""Learning while some peers lie or vanish."""
