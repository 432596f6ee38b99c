"""Who generates: SGLang's API as types, clients for it, and the engines behind it."""
