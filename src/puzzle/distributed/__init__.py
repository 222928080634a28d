"""The only place that knows of several processes and machines."""
