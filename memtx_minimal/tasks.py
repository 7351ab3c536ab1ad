"""Streams with a known right answer, made up as they go: what a memory must hold is known to the token.

Each yields endlessly what `training.train` takes in place of a stream: (tokens, targets, at_start), tokens and
targets (B, T) int64. Targets of -100 do not count.
"""
