"""What stage one is made of: the job, the teacher on its images, and the blocks of a cache."""
