"""ACE-Step, the two released generations of it: music from a caption and lyrics."""
