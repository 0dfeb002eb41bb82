"""Public contract suites: whoever writes a part, a program or a strategy runs ours on it."""
