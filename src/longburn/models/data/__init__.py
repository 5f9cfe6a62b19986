"""Models that travel with the package: `tiny_gpt_oss`, `minigrid_agent`, `minigrid_world`."""
