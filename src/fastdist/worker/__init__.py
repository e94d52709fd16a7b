"""One worker process: from emitters' connections to the ring, and from there to the analyzers."""
