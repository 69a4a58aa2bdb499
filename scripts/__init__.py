"""Research entry points, run from a checkout: `python -m scripts.<name>`."""
