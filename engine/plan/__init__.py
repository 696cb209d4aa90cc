"""Layout, memory and throughput of a run, computed from the configuration before anything is allocated."""
