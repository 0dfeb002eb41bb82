"""What is measured of one model beyond a task's own metrics; see `shoal.rounds.measure`."""
