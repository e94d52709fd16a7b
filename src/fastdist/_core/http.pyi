"""Reading HTTP/1.1. For the other compiled modules only; Python sees nothing of it."""
