"""The supervisor: listeners, worker processes, health checks, reloads, the service manager."""
