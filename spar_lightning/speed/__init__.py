"""What things cost, measured in one run against the network alone and against the published procedure."""
