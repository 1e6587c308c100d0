"""Many ranks: the processes of a test, the modes that they run, and what must hold of what they note."""
