"""What the pipeline costs on this machine, as ratios of two things measured alternately."""
