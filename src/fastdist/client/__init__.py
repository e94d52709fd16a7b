"""Commands that talk to a running fastdist, or about its files: send, top, replay."""
