"""Middlewares that come with miles. Each is named by its path in --miles-router-middleware-paths."""
