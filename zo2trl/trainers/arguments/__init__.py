"""Arguments of the trainers, and what becomes of every argument of the upstream configs."""
