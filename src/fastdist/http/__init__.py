"""Every request but packets: API, statistics, metrics, dashboard. From values to values, no sockets."""
