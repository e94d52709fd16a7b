"""What stands on the disk: the queue's folder and its rings, dead letters, syncs."""
