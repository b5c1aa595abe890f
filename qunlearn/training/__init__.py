"""`qunlearn forget`: request, preparation, the loop (read `loop.py` first), and what a run leaves."""
