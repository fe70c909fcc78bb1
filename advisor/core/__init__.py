"""Pure and deterministic: facts in, records out. No I/O, no clock, no environment."""
