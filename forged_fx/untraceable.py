"""What a graph would lose of a model is no graph."""


class Untraceable(Exception):
    """A module that cannot become a graph without changing what it does; the message says why."""
