"""The compiled hot path. Each module is one room; nothing here imports from the rest of fastdist."""
