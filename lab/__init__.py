"""The laboratory: a small world whose truth is known, and the experiments and measurements made in it."""
