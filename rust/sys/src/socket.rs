//! Sockets of our own or borrowed from a task.
