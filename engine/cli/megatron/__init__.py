"""Translation of Megatron-LM's command line into a configuration."""
