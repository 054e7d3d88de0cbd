def vectorized(cls):
    return cls
