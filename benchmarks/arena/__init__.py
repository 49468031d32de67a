"""Learned learning rates against tuned ones and against methods without tuning, on tasks that are batched over starts and seeds."""
