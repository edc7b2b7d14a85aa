"""What the tests share: the command under test, bundles, workloads, and the search for things left behind."""
