"""This room makes the system calls on files: fs, paths, strict JSON, signals, waiting, tracing, sizes."""
