"""The workshop's kit: plans, short notebooks, slides, archives, and a class's table."""
