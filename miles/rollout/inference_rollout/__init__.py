"""The published class tree: the default under `MILES_EXPERIMENTAL_ROLLOUT_REFACTOR=1`."""
