"""Models that travel with the package: `tiny_gpt_oss`."""
