"""Learning from losses alone: shared noise, two-point estimates, numbers in one byte, replay."""
