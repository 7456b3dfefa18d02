"""The laboratory: a small world whose truth is known, and experiments and measurements in it."""
