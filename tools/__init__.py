"""What developers and CI run besides the tests: the lock file and the vulnerability check."""
