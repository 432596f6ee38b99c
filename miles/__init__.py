"""miles: reinforcement-learning post-training for language models, with every stage replaceable by a function."""

__version__ = "0.1.0"
