"""What all processes of one fastdist share in memory: states, counters, histograms; and views of it."""
