"""Scripts that export with other libraries, each run where those are installed. Nothing imports them."""
