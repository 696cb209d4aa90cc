"""What a run will need, before it has it: pure arithmetic on the configuration and the parameter table."""
