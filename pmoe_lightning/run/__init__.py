"""One run from its parts: what it needs, how it is assembled, fitted, resumed and swept, what it says at its end."""
