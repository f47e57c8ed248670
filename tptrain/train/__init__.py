"""Training: the step, the schedule, the loop and its journal. Runs on any backend."""
