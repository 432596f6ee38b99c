"""Built-in dynamic filters and what is needed to call and count them."""
