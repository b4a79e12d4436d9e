"""System calls on files, and what they need: paths, strict JSON, signals, waiting, tracing, sizes."""
