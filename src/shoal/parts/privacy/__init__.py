"""What a mechanism guarantees, counted exactly, and sums of which nobody sees the summands."""
