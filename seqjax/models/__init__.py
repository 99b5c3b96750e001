"""A cell with a head: losses, objectives, pooling and generation."""
