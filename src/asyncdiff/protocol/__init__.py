"""Control messages between the driver and its workers. Pure."""
