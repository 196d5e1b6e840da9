"""Scripts that export with other libraries, each run in an environment that has them. Nothing imports them."""
