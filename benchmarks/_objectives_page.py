def render(*a):
    pass
