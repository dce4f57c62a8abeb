"""What the rest runs on, and knows no networks: paths, jobs, cancellation, caches, logging, sandboxes, safe files."""
