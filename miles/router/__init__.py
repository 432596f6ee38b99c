"""MilesRouter: one address in front of several engines.

    client --> server --> [middlewares, the last path first] --> lane --+--> own endpoints (app)
                                                                        +--> forward --> upstream --> an engine

    app          the FastAPI app: own endpoints, and the lane that takes every other path past FastAPI
    forward      one request's way to an engine and back: attempts, limits, streaming
    message      what the router reads and writes itself: heads, refusals
    upstream     HTTP/1.1 connections to engines: bytes in, bytes out
    balance      the table of engines: who is next, who is held
    health       who is quarantined, and who comes back
    doors        what happens when a middleware raises
    router       MilesRouter, which holds all of it, under its published name
    serve        `miles route`

Sessions live in `session/`; middlewares that come with miles in `middleware_hub/`.
"""
