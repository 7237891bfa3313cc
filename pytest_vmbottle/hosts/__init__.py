"""Workers on other hosts: the connection to a host, and what runs there."""
