"""What people and programs are shown of a plan or a run."""
