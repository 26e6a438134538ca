"""How a bucket of weights gets from a trainer to an engine: the two ends of each way."""
