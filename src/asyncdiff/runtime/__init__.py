"""Running a schedule: the interpreter of one rank, the local executor, the driver's and the worker's side."""
