"""Starting and joining worker processes, and the control connections to them."""
