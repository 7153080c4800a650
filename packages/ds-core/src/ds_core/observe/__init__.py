"""What happened: traces, metrics, diagnosis."""
