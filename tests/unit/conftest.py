collect_ignore = ["fixtures"]  # test files to be read, not run
