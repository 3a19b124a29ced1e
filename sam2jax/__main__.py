"""`python -m sam2jax`: the command line."""

from sam2jax.cli import app

if __name__ == "__main__":
    app(prog_name="sam2jax")
