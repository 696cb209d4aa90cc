"""What a run will need: pure arithmetic on the configuration and the parameter table, before anything is allocated."""
