"""The conformance table: implementations of FP8 quantisation against edge cases, executed."""
