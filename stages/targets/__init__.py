"""What an epoch of a student learns from: the rows of its view, from one cache or several."""
