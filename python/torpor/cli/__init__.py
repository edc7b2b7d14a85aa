"""The command line. Nothing here is imported by anything outside; verbs are imported when they are called."""
