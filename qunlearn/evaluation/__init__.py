"""`qunlearn eval`: measures, what they are made of, and what they say."""
