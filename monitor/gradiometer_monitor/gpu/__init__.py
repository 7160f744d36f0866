"""What NVML tells of this host's GPUs."""
