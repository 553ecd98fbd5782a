"""A run among other processes: how it stops, what it writes whole or not at all, and what it leaves to nobody."""
